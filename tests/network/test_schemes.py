"""Euler and Heun: their formulas, their order, what they do where controls vanish."""

import copy

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor, nn

from deeplimit import Euler, Heun, ResidualChain
from deeplimit._anatomy.chain import SCHEMES
from deeplimit.network import LinearResidual, TwoLayerResidual

WIDTH, HIDDEN = 3, 6
DEPTHS = (16, 32, 64, 128)


class SmoothControl:
    """Two-layer residual functions whose parameters are smooth functions of s ∈ [0, 1]."""

    def __init__(self, seed: int):
        rng = np.random.default_rng(seed)
        self.inner, self.inner_wave = rng.normal(size=(2, HIDDEN, WIDTH))
        self.bias, self.bias_wave = rng.normal(size=(2, HIDDEN))
        self.outer, self.outer_wave = rng.normal(size=(2, WIDTH, HIDDEN)) / HIDDEN**0.5

    def at(self, s: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        wave = np.sin(2 * np.pi * s)
        return (
            self.inner + wave * self.inner_wave,
            self.bias + wave * self.bias_wave,
            self.outer + np.cos(2 * s) * self.outer_wave,
        )

    def residual(self, s: float) -> TwoLayerResidual:
        block = TwoLayerResidual(WIDTH, HIDDEN, "tanh").double()
        inner, bias, outer = map(torch.from_numpy, self.at(s))
        with torch.no_grad():
            block.inner.weight.copy_(inner)
            block.inner.bias.copy_(bias)
            block.outer.weight.copy_(outer)
        return block

    def flow(self, x: np.ndarray) -> np.ndarray:
        """The Neural ODE's solution at s = 1, to 1e-12."""

        def speed(s: float, x: np.ndarray) -> np.ndarray:
            inner, bias, outer = self.at(s)
            return outer @ np.tanh(inner @ x + bias)

        return solve_ivp(speed, (0, 1), x, method="DOP853", rtol=1e-12, atol=1e-13).y[:, -1]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2)])
def test_measured_order_of_convergence(name: str, order: int, seed: int) -> None:
    scheme = SCHEMES[name]
    control = SmoothControl(seed)
    start = np.random.default_rng(seed + 100).normal(size=WIDTH)
    exact = torch.from_numpy(control.flow(start))
    errors = []
    for depth in DEPTHS:
        blocks = [control.residual(n / depth) for n in range(depth + scheme.nodes - 1)]
        chain = ResidualChain(blocks, step=1 / depth, scheme=scheme)
        assert chain.horizon == depth
        with torch.no_grad():
            errors.append(float((chain(torch.from_numpy(start)) - exact).norm()))
    slope = np.polyfit(np.log(DEPTHS), np.log(errors), 1)[0]
    assert -slope == pytest.approx(order, abs=0.2), errors
    assert scheme.order == order


def test_heun_is_exactly_its_formula_on_a_linear_control() -> None:
    # φ = λx: one step multiplies by 1 + h(λ0 + λ1)/2 + h²λ0λ1/2.
    left, right = LinearResidual(1).double(), LinearResidual(1).double()
    with torch.no_grad():
        left.weight.fill_(0.5)
        right.weight.fill_(-0.25)
    x = torch.tensor([[3.0]], dtype=torch.float64)
    stepped = Heun().step([left, right], x, 0.5)
    assert stepped.item() == 3 * (1 + 0.5 * 0.25 / 2 - 0.25 * 0.125 / 2)
    assert Euler().step([left], x, 0.5).item() == 3 * 1.25


def _vanish(block: TwoLayerResidual) -> TwoLayerResidual:
    block = copy.deepcopy(block)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
    return block


@pytest.mark.parametrize("scheme", [Euler(), Heun()])
def test_vanishing_controls_leave_the_state_alone(scheme: Euler | Heun) -> None:
    torch.manual_seed(0)
    blocks = [_vanish(TwoLayerResidual(3, 4)) for _ in range(5)]
    x = torch.randn(7, 3)
    assert all(torch.equal(s, x) for s in ResidualChain(blocks, scheme=scheme).trajectory(x))


def test_a_heun_step_is_the_identity_only_if_both_controls_vanish() -> None:
    torch.manual_seed(0)
    live = TwoLayerResidual(3, 4, "tanh").double()
    dead = _vanish(live)
    x = torch.randn(7, 3, dtype=torch.float64)

    def step(*blocks: nn.Module) -> Tensor:
        return ResidualChain(blocks, step=0.5, scheme=Heun())(x)

    assert torch.equal(step(dead, dead), x)
    # One live control moves the state by half of an Euler step.
    half = x + 0.25 * live(x)
    assert torch.equal(step(dead, live), half)
    assert torch.equal(step(live, dead), half)
    assert (half - x).abs().min() > 1e-4


def test_horizon_counts_steps_and_the_step_size_is_one_or_what_is_given() -> None:
    blocks = [LinearResidual(2) for _ in range(6)]
    assert ResidualChain(blocks).horizon == 6
    assert ResidualChain(blocks, scheme=Heun()).horizon == 5
    assert ResidualChain(blocks[:1], scheme=Heun()).horizon == 0
    assert ResidualChain([]).horizon == 0
    assert ResidualChain(blocks).step == 1.0
    assert ResidualChain(blocks).scheme == Euler()
    assert ResidualChain(blocks, step=3 / 6).step == 0.5
    assert "horizon=5, step=0.5, scheme=Heun" in repr(
        ResidualChain(blocks, step=0.5, scheme=Heun())
    )
