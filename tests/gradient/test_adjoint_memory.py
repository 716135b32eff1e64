"""Memory by the allocator's own accounting, each kind of network in a process of its own."""

import subprocess
import sys
import textwrap

import pytest

from deeplimit.network.blocks import ConvolutionalResidual

pytestmark = pytest.mark.slow

MEASURE = """
import sys
import torch
from torch.profiler import profile
from deeplimit import ResidualChain, SoftCrossEntropy, use_adjoint
from deeplimit.network.blocks import ConvolutionalResidual

torch.set_num_threads(1)
torch.manual_seed(0)
kind, evaluations, bits = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
x = torch.randn(8, 4, 32, 32)  # a state of 128 kB

def peak_of(depth):
    blocks = [ConvolutionalResidual(4, 4, kind, "gelu") for _ in range(depth)]
    chain = ResidualChain(blocks, step=1 / depth)
    if evaluations:
        use_adjoint(chain, evaluations=evaluations, bits=bits, on_drift="ignore")

    def step():
        chain(x).square().mean().backward()

    step()
    for p in chain.parameters():
        p.grad = None
    now = peak = 0
    with profile(profile_memory=True, acc_events=True) as run:
        step()
    for event in run.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak - sum(4 * p.numel() for p in chain.parameters())  # gradients, made in the step

print(*(peak_of(int(depth)) for depth in sys.argv[4:]))
"""


def peaks_of(norm: str, evaluations: int, *depths: int, bits: int = 0) -> list[float]:
    """Peak bytes of a step, less its new gradients, for each depth."""
    done = subprocess.run(
        [
            *(sys.executable, "-c", textwrap.dedent(MEASURE), norm),
            *map(str, (evaluations, bits, *depths)),
        ],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [float(peak) for peak in done.stdout.split()]


@pytest.mark.parametrize(("norm", "evaluations"), [("group", 1), ("batch", 3)])
def test_the_peak_is_flat_in_depth(norm: str, evaluations: int) -> None:
    """From N = 32 to N = 128 within 5 %, apart from parameters and their gradients."""
    eight, some, many = peaks_of(norm, evaluations, 8, 32, 128)
    assert many == pytest.approx(some, rel=0.05)
    assert some == pytest.approx(eight, rel=0.10)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_coded_state_takes_its_bits(bits: int) -> None:
    """Of 128 kB, b bits for each 32 and a scale of 16 bits for each 64 numbers.

    16 kB at b = 4, 1 kB of scales; and 2 kB: 256 entries of state and update. The peak is where the
    backward pass begins: before the gradients are there that are taken off.
    """
    some, many = peaks_of("group", 1, 96, 128, bits=bits)
    state = 8 * 4 * 32 * 32 * 4
    gradients = 4 * sum(
        p.numel() for p in ConvolutionalResidual(4, 4, "group", "gelu").parameters()
    )
    taken = state * (bits + 0.25) / 32 + 2**11 - gradients
    assert (many - some) / 32 == pytest.approx(taken, rel=0.02)


def test_plain_backpropagation_grows_and_is_above() -> None:
    """The measurement sees what it should: plain memory grows in proportion to depth."""
    plain = peaks_of("group", 0, 32, 128)
    assert plain[1] == pytest.approx(4 * plain[0], rel=0.15)
    assert plain[0] > 5 * peaks_of("group", 1, 32)[0]
