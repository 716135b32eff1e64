"""The orders of accuracy, measured: slopes of log error against log depth, h = 1/N, float64."""

import math

import pytest
import torch
from naive_adjoint import batch, chain_of, errors, gradient, mean_slopes, paper_gradient, relative

from deeplimit import use_adjoint

pytestmark = pytest.mark.slow

DEPTHS = [16, 32, 64, 128]
SEEDS = 2


@pytest.mark.parametrize("activation", ["tanh", "gelu"])
@pytest.mark.parametrize("evaluations", [1, 2, 3])
def test_euler_with_controls_smooth_in_depth(activation: str, evaluations: int) -> None:
    """States, ∇x_0 and ∇θ: −e."""
    slopes = mean_slopes(
        activation, evaluations, smooth=True, heun=False, depths=DEPTHS, seeds=SEEDS
    )
    for found in slopes:
        assert found == pytest.approx(-evaluations, abs=0.2)


@pytest.mark.parametrize("activation", ["tanh", "gelu"])
@pytest.mark.parametrize("evaluations", [1, 2, 3])
def test_euler_with_independent_controls(activation: str, evaluations: int) -> None:
    """∇θ: −e; states and ∇x_0 at most that, since errors of mean zero average."""
    state, first, controls = mean_slopes(
        activation, evaluations, smooth=False, heun=False, depths=DEPTHS, seeds=SEEDS
    )
    assert controls == pytest.approx(-evaluations, abs=0.2)
    assert max(state, first) <= -evaluations + 0.2


@pytest.mark.parametrize(
    ("activation", "evaluations"), [("tanh", 1), ("tanh", 2), ("tanh", 3), ("gelu", 2)]
)
@pytest.mark.parametrize(("smooth", "gained"), [(True, 3), (False, 1)])
def test_heun_from_its_own_start(
    activation: str, evaluations: int, smooth: bool, gained: int
) -> None:
    """∇θ: −(e + 3) smooth, −(e + 1) independent."""
    *_, controls = mean_slopes(
        activation, evaluations, smooth=smooth, heun=True, depths=DEPTHS, seeds=SEEDS
    )
    assert controls == pytest.approx(-(evaluations + gained), abs=0.3)


def test_relu_has_states_of_full_order_and_gradients_of_half() -> None:
    """A fraction O(h^e) of the units flips, so ∇θ is about −e/2; seen −0.6 and −0.4 at e = 1."""
    for smooth in (True, False):
        state, _, controls = mean_slopes(
            "relu", 1, smooth=smooth, heun=False, depths=DEPTHS, seeds=SEEDS
        )
        assert state <= -0.8
        assert controls == pytest.approx(-0.5, abs=0.25)


@pytest.mark.parametrize(("smooth", "factor"), [(True, 20), (False, 4)])
def test_better_than_the_paper_at_its_price(smooth: bool, factor: float) -> None:
    """Two evaluations a step at N = 64: the paper's gradient is of order 1, this of order 2."""
    for seed in range(3):
        chain, x = chain_of(64, "tanh", smooth=smooth, seed=seed), batch(seed)
        exact = gradient(chain, x)[1]
        paper = relative(paper_gradient(chain, x)[1], exact)
        assert paper > factor * errors(chain, x, 2)[2]


@pytest.mark.parametrize("heun", [False, True])
def test_the_papers_scheme_is_written_out_right(heun: bool) -> None:
    """The reference itself: order 1 (Euler) and 3 (Heun) for smooth controls, as [SAP22] has it."""
    found = []
    for depth in (32, 64):
        chain, x = chain_of(depth, "tanh", smooth=True, heun=heun), batch()
        found.append(relative(paper_gradient(chain, x)[1], gradient(chain, x)[1]))
    assert math.log2(found[0] / found[1]) == pytest.approx(3 if heun else 1, abs=0.25)


@pytest.mark.parametrize("heun", [False, True])
def test_with_enough_evaluations_the_gradient_is_exact(heun: bool) -> None:
    """The fixed point itself: what is left is rounding."""
    chain, x = chain_of(6, "tanh", smooth=False, heun=heun), batch()
    exact = gradient(chain, x)
    first, controls = gradient(use_adjoint(chain, evaluations=40, tolerance=1e-9), x)
    torch.testing.assert_close(first, exact[0], rtol=0, atol=1e-13)
    for got, expected in zip(controls, exact[1], strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("evaluations", [1, 2, 3, 4, 5])
def test_one_step_by_hand(evaluations: int) -> None:
    """Three steps, the middle one rebuilt: its ∇θ is the VJP at z^{e−1}, step by step."""
    chain, x = chain_of(3, "tanh", smooth=False), batch()
    h, phi = chain.step, chain.controls(1)[0]
    with torch.no_grad():
        _, _, x2, _ = chain.trajectory(x)
        z = x2
        for _ in range(evaluations - 1):
            z = x2 - h * phi(z)
    last = x2.clone().requires_grad_()
    (back,) = torch.autograd.grad((chain.advance(2, last)).square().sum(), [last])
    leaf = z.clone().requires_grad_()
    expected = torch.autograd.grad(leaf + h * phi(leaf), list(phi.parameters()), back)
    use_adjoint(chain, evaluations=evaluations, on_drift="ignore")
    got = torch.autograd.grad(chain(x).square().sum(), list(phi.parameters()))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-14)
