"""Memory by the allocator's own accounting, in a process of its own."""

import json
from collections.abc import Callable

import pytest
from bare_process import BareProcess

from deeplimit.network.blocks import ConvolutionalResidual

pytestmark = pytest.mark.slow

MEASURE = """
import gc, json, sys
import torch
from torch.profiler import ProfilerActivity, profile
from deeplimit import ResidualChain, use_adjoint
from deeplimit.network.blocks import ConvolutionalResidual

torch.set_num_threads(1)
torch.manual_seed(0)
gc.disable()  # nothing from before is released while a peak is measured
x = torch.randn(8, 4, 32, 32)  # a state of 128 kB

def peak_of(norm, evaluations, bits, depth):
    blocks = [ConvolutionalResidual(4, 4, norm, "gelu") for _ in range(depth)]
    chain = ResidualChain(blocks, step=1 / depth)
    if evaluations:
        use_adjoint(chain, evaluations=evaluations, bits=bits, on_drift="ignore")

    def step():
        chain(x).square().mean().backward()

    step()
    for p in chain.parameters():
        p.grad = None
    now = peak = 0
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        step()
    for event in run.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak - sum(4 * p.numel() for p in chain.parameters())  # gradients, made in the step

print(json.dumps([peak_of(*case) for case in json.loads(sys.argv[1])]))
"""

FLAT = [("group", 1), ("batch", 3)]
BITS = [2, 4, 8]
CASES = [(norm, evaluations, 0, depth) for norm, evaluations in FLAT for depth in (8, 32, 128)]
CASES += [("group", 1, bits, depth) for bits in BITS for depth in (96, 128)]
CASES += [("group", 0, 0, depth) for depth in (32, 128)]
PeakOf = Callable[[str, int, int, int], float]


@pytest.fixture(scope="module")
def peak_of(bare_process: BareProcess) -> PeakOf:
    """Peak bytes of a step, less its new gradients: by norm, evaluations, bits and depth."""
    done = bare_process.run(MEASURE, json.dumps(CASES))
    measured = dict(zip(CASES, json.loads(done.stdout), strict=True))
    return lambda *case: float(measured[case])


@pytest.mark.parametrize(("norm", "evaluations"), FLAT)
def test_the_peak_is_flat_in_depth(norm: str, evaluations: int, peak_of: PeakOf) -> None:
    """From N = 32 to N = 128 within 5 %, apart from parameters and their gradients."""
    eight, some, many = (peak_of(norm, evaluations, 0, depth) for depth in (8, 32, 128))
    assert many == pytest.approx(some, rel=0.05)
    assert some == pytest.approx(eight, rel=0.10)


@pytest.mark.parametrize("bits", BITS)
def test_a_coded_state_takes_its_bits(bits: int, peak_of: PeakOf) -> None:
    """Of 128 kB, b bits for each 32 and a scale of 16 bits for each 64 numbers.

    16 kB at b = 4, 1 kB of scales; and 2 kB: 256 entries of state and update. The peak is where the
    backward pass begins: before the gradients are there that are taken off.
    """
    some, many = (peak_of("group", 1, bits, depth) for depth in (96, 128))
    state = 8 * 4 * 32 * 32 * 4
    gradients = 4 * sum(
        p.numel() for p in ConvolutionalResidual(4, 4, "group", "gelu").parameters()
    )
    taken = state * (bits + 0.25) / 32 + 2**11 - gradients
    assert (many - some) / 32 == pytest.approx(taken, rel=0.02)


def test_plain_backpropagation_grows_and_is_above(peak_of: PeakOf) -> None:
    """The measurement sees what it should: plain memory grows in proportion to depth."""
    some, many = (peak_of("group", 0, 0, depth) for depth in (32, 128))
    assert many == pytest.approx(4 * some, rel=0.15)
    assert some > 5 * peak_of("group", 1, 0, 32)
