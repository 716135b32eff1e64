"""The gap to the Neural ODE and its bounds: attained, of their order, and by naive references."""

import math
from collections.abc import Callable

import pytest
import torch
from gap_models import assert_bounds_hold, rough_chain
from hypothesis import given, settings
from hypothesis import strategies as st
from model_families import sample
from naive_ode import NaiveODE
from smooth_networks import batch, slope, smooth_chain
from torch import Tensor, nn

from deeplimit.network import Heun, LinearResidual, ResidualChain, anatomy
from deeplimit.ode import discretization_gap
from deeplimit.ode.discretization import FRACTIONS, SEGMENT, WEIGHTS
from deeplimit.ode.field import VectorField
from deeplimit.ode.solvers import solve_by_layer

pytestmark = pytest.mark.slow


@torch.no_grad()
def linear_chain(weights: list[Tensor], step: float) -> ResidualChain:
    chain = ResidualChain([LinearResidual(len(w)) for w in weights], step=step).double()
    for block, weight in zip(chain, weights, strict=True):
        block.weight.copy_(weight)
    return chain


def test_exponential_growth_attains_the_integral_form():
    """x_{n+1} = (1 + hλ) x_n beside e^{λs}: every step of the bound is an equality."""
    rate, horizon = 1.0, 100
    chain = linear_chain([rate * torch.eye(3)] * horizon, 1 / horizon)
    x = batch()
    found = discretization_gap(chain, x)
    nodes = [n / horizon for n in range(horizon + 1)]
    size = float(x.norm(dim=1).max())
    exact = [size * (math.exp(rate * s) - (1 + rate / horizon) ** n) for n, s in enumerate(nodes)]
    assert found.gap == pytest.approx(exact, rel=1e-7, abs=1e-13)
    assert found.integral_bound == pytest.approx(exact, rel=1e-7, abs=1e-13)
    # (h/2) ∫ e^{λ(s_n − s)} λ² e^{λs} ds ‖x‖, the form it has as h → 0.
    limit = [size * rate**2 * s * math.exp(rate * s) / (2 * horizon) for s in nodes]
    assert found.integral_bound[-1] == pytest.approx(limit[-1], rel=0.01)
    assert found.lipschitz == pytest.approx([rate] * horizon, rel=1e-12)
    assert found.lipschitz_residual < 1e-12


def test_constant_acceleration_attains_the_bound():
    """φ = 3x + θ(s) with x(s) = s²/2 − s + 1; x′(1) = 0 where θ stops following it."""
    rate, horizon = 3.0, 200
    chain = ResidualChain([nn.Linear(1, 1).double() for _ in range(horizon)], step=1 / horizon)
    with torch.no_grad():
        for n, block in enumerate(chain):
            s = n / horizon
            block.weight.fill_(rate)
            block.bias.fill_(s - 1 - rate * (s * s / 2 - s + 1))
    found = discretization_gap(chain, torch.ones(1, 1))
    assert found.acceleration[:-1] == pytest.approx([1.0] * (horizon - 1), rel=0.01)
    expected = (math.exp(rate) - 1) / (2 * rate * horizon)
    assert found.bound[-1] == pytest.approx(expected, rel=0.01)
    assert 0.95 * found.bound[-1] < found.gap[-1] <= found.bound[-1]


def test_the_limit_of_the_integral_form_is_no_bound():
    """φ = θ_1 θ_2 falls as (1 − s/h)²: half of ∫‖x″‖ lies in the first third of the interval."""

    class Product(nn.Module):
        def __init__(self, value: float):
            super().__init__()
            self.left = nn.Parameter(torch.tensor(value))
            self.right = nn.Parameter(torch.tensor(value))

        def forward(self, x: Tensor) -> Tensor:
            return self.left * self.right * torch.ones_like(x)

    h = 0.1
    found = discretization_gap(
        ResidualChain([Product(1.0), Product(0.0)], step=h), torch.zeros(1, 1)
    )
    assert found.lipschitz == (0.0, 0.0)
    assert found.gap[1] == pytest.approx(2 * h / 3, rel=1e-6)
    assert found.integral_bound[1] == pytest.approx(2 * h / 3, rel=1e-6)
    assert found.gap[1] > h / 2 * 1.0  # (h/2) ∫ e^0 ‖x″‖ ds, ‖x″‖ = 2(1 − s/h)/h
    assert found.bound[1] == pytest.approx(h, rel=1e-6)


@pytest.mark.parametrize(("scheme", "order", "within"), [(None, 1, 0.1), (Heun(), 2, 0.2)])
def test_order_of_the_gap(scheme: Heun | None, order: int, within: float):
    depths = [16, 32, 64]
    found = [discretization_gap(smooth_chain(n, scheme), batch()) for n in depths]
    assert slope(depths, [max(g.gap) for g in found]) == pytest.approx(-order, abs=within)
    assert slope(depths, [max(g.mean_gap) for g in found]) == pytest.approx(-order, abs=within)
    assert found[0].scheme == ("euler" if scheme is None else "heun")
    if scheme is None:
        assert slope(depths, [g.bound[-1] for g in found]) == pytest.approx(-1, abs=0.1)
        assert slope(depths, [g.integral_bound[-1] for g in found]) == pytest.approx(-1, abs=0.1)
    else:
        assert {g.bound for g in found} == {g.integral_bound for g in found} == {None}


@pytest.mark.parametrize("interpolation", ["linear", "constant"])
@pytest.mark.parametrize("scheme", [None, Heun()])
@pytest.mark.parametrize("make", [rough_chain, smooth_chain])
def test_gap_by_scipy(make: Callable[..., ResidualChain], scheme: Heun | None, interpolation: str):
    """And the error that is stated: at least the true one, at most 1 % of the gap."""
    chain, x = make(5, scheme=scheme), batch()
    found = discretization_gap(chain, x, interpolation=interpolation, bound=False)
    with torch.no_grad():
        states = chain.trajectory(x)
    naive = NaiveODE(list(chain), chain.step, interpolation == "linear").gaps(states)
    assert found.gap == pytest.approx(naive.amax(1).tolist(), abs=found.solver_error, rel=0)
    assert found.mean_gap == pytest.approx(naive.mean(1).tolist(), abs=found.solver_error, rel=0)
    assert found.solver_error < 0.01 * max(found.gap)
    if make is rough_chain:
        assert found.solver_error > 1e-8  # so that the first lines compare something
    else:
        assert found.gap == pytest.approx(naive.amax(1).tolist(), rel=1e-5)


def test_gap_by_matrix_exponentials():
    """Linear φ, constant interpolation: x(s_n) = e^{hθ_{n−1}} … e^{hθ_0} x_0."""
    torch.manual_seed(0)
    weights = [torch.randn(4, 4, dtype=torch.float64) for _ in range(6)]
    x, h = batch(width=4), 0.2
    found = discretization_gap(linear_chain(weights, h), x, interpolation="constant")
    euler, exact, gaps, sizes = x, x, [0.0], [float(x.norm(dim=1).mean())]
    for w in weights:
        euler, exact = euler + h * euler @ w.T, exact @ torch.linalg.matrix_exp(h * w).T
        gaps.append(float((euler - exact).norm(dim=1).max()))
        sizes.append(float(exact.norm(dim=1).mean()))
    assert found.gap == pytest.approx(gaps, abs=found.solver_error)
    assert found.state_norm == pytest.approx(sizes, abs=found.solver_error)
    norms = [float(torch.linalg.matrix_norm(w, 2)) for w in weights]
    assert found.lipschitz == pytest.approx(norms, rel=1e-9)


def test_parts_of_the_bound_by_full_jacobians_and_differences():
    chain, x = smooth_chain(6), batch()
    h, horizon = chain.step, chain.horizon
    found = discretization_gap(chain, x)
    naive = NaiveODE(list(chain), h, linear=True)
    path = naive.solution(x, horizon, FRACTIONS)
    with torch.no_grad():
        states = chain.trajectory(x)
    nodes = [x, *path[:, -1]]
    bend = torch.stack(
        [
            torch.stack([naive.acceleration(n, c, path[n, i]) for i, c in enumerate(FRACTIONS)])
            for n in range(horizon)
        ]
    )
    points = [[torch.lerp(states[n], nodes[n], c) for c in SEGMENT] for n in range(horizon)]
    norms = [max(naive.jacobian_norm(n, y) for y in points[n]) for n in range(horizon)]
    assert found.segment_points == 3
    # Between the nodes the path is dopri5's interpolation, good to the tolerance it solves with.
    assert found.acceleration == pytest.approx(bend.amax((1, 2)).tolist(), rel=2e-4)
    assert found.lipschitz == pytest.approx(norms, rel=1e-6)
    rate, worst = max(norms), float(bend.max())
    bound = [h * (math.exp(rate * n * h) - 1) / (2 * rate) * worst for n in range(horizon + 1)]
    assert found.bound == pytest.approx(bound, rel=2e-4)
    # Never sharper than the integral with each sample's own Lipschitz constants, and near it.
    total = torch.zeros(len(x))
    for n in range(horizon):
        rates = [
            max(naive.jacobian_norm(n, y[i : i + 1]) for y in points[n]) for i in range(len(x))
        ]
        kernel = sum(w * (1 - c) * b for w, c, b in zip(WEIGHTS, FRACTIONS, bend[n], strict=True))
        total = (1 + h * torch.tensor(rates)) * total + h * h * kernel
        assert found.integral_bound[n + 1] == pytest.approx(float(total.max()), rel=2e-4)


def test_quadrature_is_of_degree_five():
    for k in range(6):
        exact = sum(w * c**k for w, c in zip(WEIGHTS, FRACTIONS, strict=True))
        assert exact == pytest.approx(1 / (k + 1), rel=1e-14)


def test_jacobian_norm_of_large_states():
    """More components than Lanczos steps: within its residual of the full SVD."""
    from deeplimit.network import ConvolutionalResidual

    torch.manual_seed(0)
    chain = ResidualChain(
        [ConvolutionalResidual(4, 5, "group", "gelu") for _ in range(2)], step=0.1
    )
    chain.double()
    x = torch.randn(2, 4, 7, 7, dtype=torch.float64)
    found = discretization_gap(chain, x)
    exact = NaiveODE(list(chain), 0.1, linear=True).jacobian_norm(0, x)
    assert found.lipschitz[0] == pytest.approx(exact, rel=1e-4)
    assert found.lipschitz[0] <= exact * (1 + 1e-12)
    assert found.lipschitz_residual < 1e-3


@pytest.mark.parametrize("interpolation", ["linear", "constant"])
@pytest.mark.parametrize("name", ["rough", "smooth", "chain, linear", "chain"])
def test_bounds_hold(name: str, interpolation: str):
    chain = {"rough": rough_chain, "smooth": lambda: smooth_chain(20)}.get(name)
    model, x = (chain(), batch()) if chain else (sample(name).model, sample(name).x)
    assert_bounds_hold(discretization_gap(model, x, interpolation=interpolation))


@settings(max_examples=12, deadline=None)
@given(factor=st.floats(0.01, 100), seed=st.integers(0, 100))
def test_time_has_no_unit(factor: float, seed: int):
    """φ → cφ, h → h/c leaves the states, the gap and the bound alone."""
    chain = smooth_chain(4, seed=seed)
    other = smooth_chain(4, seed=seed)
    with torch.no_grad():
        for block in other:
            for p in block.outer.parameters():
                p.mul_(factor)
    found = discretization_gap(chain, batch(seed))
    scaled = discretization_gap(ResidualChain(list(other), step=chain.step / factor), batch(seed))
    near = 1e-9 * max(found.gap)
    assert scaled.gap == pytest.approx(found.gap, rel=1e-7, abs=near)
    assert scaled.integral_bound == pytest.approx(found.integral_bound, rel=1e-7)
    assert scaled.bound == pytest.approx(found.bound, rel=1e-7)
    assert max(scaled.lipschitz) == pytest.approx(factor * max(found.lipschitz), rel=1e-7)


def test_identical_layers_without_effect_have_no_gap():
    chain = linear_chain([torch.zeros(3, 3)] * 4, 1.0)
    found = discretization_gap(chain, batch())
    assert set(found.gap) == set(found.bound) == set(found.integral_bound) == {0.0}


@pytest.mark.parametrize("exponent", range(8, 24))
def test_a_step_that_ends_on_a_node_loses_no_node(exponent: int):
    """φ = ±x/2 in turn. One call of torchdiffeq with the nodes as jump_t is off by 1.7e-3 at
    tolerance 1.8e-5, since it sees the first three of seven only."""
    tolerance = 10 ** (-exponent / 4)
    weights = [0.5 * (-1) ** n * torch.eye(1, dtype=torch.float64) for n in range(8)]
    chain = linear_chain(weights, 1.0)
    field = VectorField(anatomy(chain).stacks[0], linear=False)
    x = torch.ones(1, 1, dtype=torch.float64)
    found = solve_by_layer(field, x, solver="dopri5", tolerance=tolerance)[:, -1, 0, 0]
    exact = torch.tensor([math.exp(0.5), 1.0] * 4, dtype=torch.float64)
    assert (found - exact).abs().max() < 20 * tolerance
