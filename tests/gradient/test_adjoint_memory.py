"""Memory by the allocator's own accounting, each network in a process of its own."""

import subprocess
import sys
import textwrap

import pytest

MEASURE = """
import sys
import torch
from torch.profiler import profile
from deeplimit import ResidualChain, SoftCrossEntropy, use_adjoint
from deeplimit.network.blocks import ConvolutionalResidual

torch.set_num_threads(1)
torch.manual_seed(0)
kind, evaluations, depth = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
blocks = [ConvolutionalResidual(4, 4, kind, "gelu") for _ in range(depth)]
chain = ResidualChain(blocks, step=1 / depth)
if evaluations:
    use_adjoint(chain, evaluations=evaluations, on_drift="ignore")
x = torch.randn(8, 4, 32, 32)  # a state of 128 kB
gradients = sum(4 * p.numel() for p in chain.parameters())  # made during the step

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
print(peak - gradients)
"""


def peak(norm: str, evaluations: int, depth: int) -> float:
    """Peak bytes of a step, less its new gradients."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEASURE), norm, str(evaluations), str(depth)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


@pytest.mark.parametrize(("norm", "evaluations"), [("group", 1), ("batch", 3)])
def test_the_peak_is_flat_in_depth(norm: str, evaluations: int) -> None:
    """From N = 32 to N = 128 within 5 %, apart from parameters and their gradients."""
    peaks = {depth: peak(norm, evaluations, depth) for depth in (8, 32, 128)}
    assert peaks[128] == pytest.approx(peaks[32], rel=0.05)
    assert peaks[32] == pytest.approx(peaks[8], rel=0.10)


def test_plain_backpropagation_grows_and_is_above() -> None:
    """The measurement sees what it should: plain memory grows in proportion to depth."""
    plain = [peak("group", 0, depth) for depth in (32, 128)]
    assert plain[1] == pytest.approx(4 * plain[0], rel=0.15)
    assert plain[0] > 5 * peak("group", 1, 32)
