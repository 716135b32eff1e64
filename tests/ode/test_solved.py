"""Chains run by other solvers: the network, its Neural ODE in the limit, accuracy and cost."""

import math
import sys

import pytest
import torch
from naive_ode import NaiveODE
from smooth_networks import smooth_chain
from torch import Tensor

from deeplimit import InputError, RunError
from deeplimit.network import Architecture, Euler, Heun, LinearResidual, ResidualChain
from deeplimit.ode import solver_accuracies, with_solver
from deeplimit.ode.solvers import ADAPTIVE, FIXED, check_solver


def exact(chain: ResidualChain, x: Tensor) -> Tensor:
    """x(T) by scipy."""
    return NaiveODE(chain, chain.step, linear=True).solution(x, chain.horizon)[-1, -1]


def classifier(scheme: str = "euler", depths: tuple[int, ...] = (6,)) -> torch.nn.Module:
    torch.manual_seed(0)
    kind = "vector" if len(depths) == 1 else "convolutional"
    shape = (8,) if len(depths) == 1 else (1, 8, 8)
    made = Architecture(
        kind, shape, 4, depths, 8, 12, "tanh", "group", step=0.4, scheme=scheme, reduction=1
    ).build()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made.double().eval()


@pytest.mark.parametrize(("scheme", "solver"), [("euler", "euler"), ("heun", "heun2")])
@pytest.mark.parametrize("depths", [(6,), (3, 3)])
def test_the_networks_own_scheme_and_steps_are_the_network(
    scheme: str, solver: str, depths: tuple[int, ...]
) -> None:
    model = classifier(scheme, depths)
    x = torch.randn(5, *model.architecture.shape, dtype=torch.float64)  # type: ignore[union-attr]
    again = with_solver(model, solver, depths[0])(x)
    assert torch.allclose(again, model(x), rtol=0, atol=1e-12)
    assert not again.requires_grad  # no parameter is left out of a training without a word
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("solver", [*FIXED, *ADAPTIVE])
def test_every_solver_tends_to_the_neural_ode(solver: str) -> None:
    chain, x = smooth_chain(6, Euler()), torch.linspace(-1, 1, 6, dtype=torch.float64).view(2, 3)
    end = exact(chain, x)
    if solver in ADAPTIVE:
        errors = [
            (with_solver(chain, solver, tolerance=tolerance)(x) - end).abs().max()
            for tolerance in (1e-2, 1e-6)
        ]
    else:
        errors = [(with_solver(chain, solver, steps)(x) - end).abs().max() for steps in (6, 96)]
    assert errors[1] < 1e-2 * errors[0].clamp(min=1e-4) + 0.1 * errors[0]
    assert errors[1] < 0.02 * end.abs().max()


@pytest.mark.slow
def test_orders_with_steps_that_meet_the_nodes() -> None:
    """Where every step lies in one interval θ is smooth: the methods have their orders."""
    chain, x = smooth_chain(4, Heun()), torch.ones(1, 3, dtype=torch.float64)
    end = exact(chain, x)
    for solver, order in (("euler", 1), ("midpoint", 2), ("rk4", 4)):
        coarse, fine = (
            float((with_solver(chain, solver, steps)(x) - end).norm()) for steps in (16, 64)
        )
        assert math.log(coarse / fine, 4) == pytest.approx(order, abs=0.2), solver


def test_accuracy_and_cost_are_counted() -> None:
    model = classifier()
    x = torch.randn(40, 8, dtype=torch.float64)
    own = model(x).argmax(-1)
    wrong = torch.arange(40) < 10
    y = torch.where(wrong, (own + 1) % 4, own)
    loader = [(x[:30], y[:30]), (x[30:], y[30:])]
    network, euler, rough, rk4, dopri5 = solver_accuracies(
        model, loader, [("euler", 6), ("euler", 2), ("rk4", 3), ("dopri5", None)]
    )
    assert (network.solver, network.steps, network.evaluations) == ("network", 6, 6)
    assert network.accuracy == 0.75
    assert network.agreement == 1
    assert (euler.accuracy, euler.agreement, euler.evaluations) == (0.75, 1, 6)
    assert (rough.evaluations, rk4.evaluations) == (2, 12)
    said = with_solver(model, "euler", 2)(x).argmax(-1)
    assert rough.accuracy == pytest.approx(float((said == y).double().mean()))
    assert rough.agreement == pytest.approx(float((said == own).double().mean()))
    assert rough.agreement < 1
    assert dopri5.steps is None
    assert dopri5.evaluations >= 7
    assert {row.samples for row in (network, euler, rough, rk4, dopri5)} == {40}


def test_the_model_is_left_alone() -> None:
    model = classifier().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    with_solver(model, "rk4", 2)(x).sum().backward()
    assert x.grad is not None
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_empty_chain_is_the_identity() -> None:
    x = torch.randn(2, 3)
    assert torch.equal(with_solver(ResidualChain([]), "euler", 3)(x), x)


WRONG = [
    ("rk5", 3, "expected one of euler"),
    ("rk4", None, "no steps given; rk4 needs at least 1"),
    ("euler", 0, "0 steps given; euler needs at least 1"),
    ("dopri5", 4, "4 steps given, but dopri5 chooses its own"),
]


@pytest.mark.parametrize(("solver", "steps", "said"), WRONG)
def test_a_wrong_solver(solver: str, steps: int | None, said: str) -> None:
    with pytest.raises(InputError, match=said):
        check_solver(solver, steps)


@pytest.mark.parametrize("tolerance", [0.0, -1e-3, math.nan, math.inf])
def test_a_tolerance_is_above_zero(tolerance: float) -> None:
    for call in (
        lambda: with_solver(classifier(), "dopri5", tolerance=tolerance),
        lambda: solver_accuracies(classifier(), [], [("dopri5", None)], tolerance=tolerance),
    ):
        with pytest.raises(InputError, match=r"tolerance is .*expected a number above 0"):
            call()


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["dopri5", "dopri8", "adaptive_heun"])
def test_no_solver_gets_through_what_is_not_a_number(
    solver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[with_solver.__module__], "MAX_STEPS", 100)  # not 10,000 of them
    chain = classifier().stages[0]
    x = torch.randn(3, 8, dtype=torch.float64)
    with pytest.raises(RunError, match=f"{solver} stopped at tolerance 1e-03"):
        with_solver(chain, solver)(x * math.nan)
    with pytest.raises(RunError, match=f"{solver} stopped at tolerance 1e-30"):
        with_solver(chain, solver, tolerance=1e-30)(x)


def test_a_loader_that_ends_is_refused_before_it_is_used_up() -> None:
    one = iter([(torch.randn(3, 8, dtype=torch.float64), torch.zeros(3).long())])
    with pytest.raises(InputError, match="can be gone through only once"):
        solver_accuracies(classifier(), one, [("euler", 2)])
    assert len(list(one)) == 1


def test_another_kind_of_model_and_no_data() -> None:
    with pytest.raises(InputError, match="Linear has no chain of residual functions"):
        with_solver(torch.nn.Linear(2, 2), "euler", 1)
    with pytest.raises(InputError, match="gave no batch"):
        solver_accuracies(classifier(), [], [])


@pytest.mark.slow
def test_an_ode_that_leaves_every_bound() -> None:
    class Square(LinearResidual):
        def forward(self, x: Tensor) -> Tensor:
            return x * x

    chain = ResidualChain([Square(1), Square(1)], step=1.0)
    with pytest.raises(RunError, match="dopri5 stopped"):
        with_solver(chain, "dopri5")(torch.tensor([[2.0]]))
