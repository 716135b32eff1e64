"""Planned anchors against all sets of anchors, one by one; float64."""

import itertools
import math

import pytest
import torch
from adjoint_models import inputs, sequence
from torch import Tensor, nn

from deeplimit import InputError, ResidualChain, gradient_error, plan_anchors, use_adjoint
from deeplimit.gradient import AnchorPlan
from deeplimit.network.blocks import TwoLayerResidual


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).sin().sum()


def uneven() -> nn.Sequential:
    """Ten blocks of different strength."""
    model = sequence(10)
    for n, gain in enumerate((0.1, 0.9, 0.2, 0.1, 1.2, 0.1, 0.3, 0.7, 0.2, 0.1)):
        model[n].gain = gain  # type: ignore[assignment]
    return model


def two_chains() -> nn.Sequential:
    """A strong and a weak chain with a projection between them."""
    strong, weak = sequence(6, gain=0.8), sequence(6, gain=0.2)
    return nn.Sequential(strong, nn.Linear(6, 6).double(), weak)


def error_with(model: nn.Module, anchors: tuple[str, ...]) -> float:
    use_adjoint(model, evaluations=2, anchors=anchors, on_drift="ignore")
    return gradient_error(model, loss_of, inputs(5, 6)).error


@pytest.mark.slow
@pytest.mark.parametrize("make", [uneven, two_chains])
@pytest.mark.parametrize("part", [0.5, 0.1, 0.01])
def test_no_smaller_set_of_anchors_would_do(make: object, part: float) -> None:
    """The tolerance is a part of the error without anchors."""
    model = make()  # type: ignore[operator]
    without = error_with(model, ())
    use_adjoint(model, evaluations=2, on_drift="ignore")
    plan = plan_anchors(model, loss_of, inputs(5, 6), part * without)
    assert plan.error_without == pytest.approx(without, rel=1e-9)
    assert plan.error == pytest.approx(error_with(model, plan.anchors), rel=1e-6, abs=1e-15)
    assert plan.error <= part * without
    inner = [[f"{n}" for n in range(1, 9)]]
    if make is two_chains:
        inner = [[f"0.{n}" for n in range(1, 5)], [f"2.{n}" for n in range(1, 5)]]
    candidates = list(itertools.chain(*inner))
    assert plan.candidates == len(candidates)
    assert set(plan.anchors) <= set(candidates)
    fewer = itertools.combinations(candidates, len(plan.anchors) - 1) if plan.anchors else ()
    assert all(error_with(model, smaller) > part * without for smaller in fewer)


def test_a_tolerance_that_is_met_needs_no_anchors() -> None:
    model = use_adjoint(sequence(6), evaluations=3, tolerance=0.5)
    plan = plan_anchors(model, loss_of, inputs(5, 6))
    assert plan.anchors == ()
    assert plan.tolerance == 0.5
    assert plan.error == plan.error_without < 0.5
    assert "0 of 4 states kept" in str(plan)


class AfterAddition(nn.Module):
    """ReLU after the addition, as in the original ResNet: not invertible."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.outer(self.inner(x).relu())).relu()


def test_a_network_that_cannot_be_inverted_ends_at_an_anchor_per_block() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(AfterAddition() for _ in range(6))).double()
    use_adjoint(model, evaluations=5, on_drift="ignore")
    plan = plan_anchors(model, loss_of, inputs(5, 6), 1e-3)
    assert plan.anchors == ("1", "2", "3", "4")
    assert plan.error < 1e-14
    assert plan.error_without > 1e-2
    assert "ordinary checkpointing" in str(plan)


@pytest.mark.slow
def test_the_plan_leaves_the_model_as_it_was() -> None:
    blocks = [TwoLayerResidual(6, 12, "tanh").double() for _ in range(8)]
    model = use_adjoint(ResidualChain(blocks, step=0.5), evaluations=1, anchor_every=3)
    before = gradient_error(model, loss_of, inputs(5, 6))
    plan = plan_anchors(model, loss_of, inputs(5, 6), 1e-3)
    assert gradient_error(model, loss_of, inputs(5, 6)) == before
    assert all(p.grad is None for p in model.parameters())
    assert isinstance(plan, AnchorPlan)
    for wrong in (0.0, -1.0, math.nan):
        with pytest.raises(InputError, match="must be a number > 0"):
            plan_anchors(model, loss_of, inputs(5, 6), wrong)


def test_gradient_error_says_what_is_wrong() -> None:
    model, x = sequence(3), inputs(5, 6)
    with pytest.raises(InputError, match="not switched; call use_adjoint"):
        gradient_error(model, loss_of, x)
    use_adjoint(model)
    with pytest.raises(InputError, match=r"shape \(5, 6\); expected a scalar"):
        gradient_error(model, lambda m, x: m(x), x)
    with pytest.raises(InputError, match="no parameter"):
        gradient_error(model.requires_grad_(False), loss_of, x)


def test_gradient_error_by_hand() -> None:
    model, x = sequence(6, gain=0.6), inputs(5, 6)
    exact = torch.autograd.grad(loss_of(model, x), list(model.parameters()))
    use_adjoint(model, evaluations=1, on_drift="ignore")
    got = torch.autograd.grad(loss_of(model, x), list(model.parameters()))
    gaps = [float((a - b).norm()) for a, b in zip(got, exact, strict=True)]
    sizes = [float(b.norm()) for b in exact]
    report = gradient_error(model, loss_of, x)
    assert report.error == pytest.approx(math.hypot(*gaps) / math.hypot(*sizes), rel=1e-9)
    floor = 0.01 * math.hypot(*sizes)
    own = [a / max(b, floor) for a, b in zip(gaps, sizes, strict=True)]
    assert report.worst_error == pytest.approx(max(own), rel=1e-9)
    names = [name for name, _ in model.named_parameters()]
    assert report.worst == names[own.index(max(own))]
    assert report.loss == pytest.approx(float(loss_of(model, x).detach()))
