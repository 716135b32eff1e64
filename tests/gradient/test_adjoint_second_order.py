"""Second derivatives (create_graph=True) and forward-mode derivatives."""

import copy

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from adjoint_references import inputs, loss_of, relative_error, tower
from torch import Tensor, nn

from deeplimit import use_adjoint, use_backprop
from deeplimit.gradient import layout


def penalty_gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """∇θ ‖∇θ L‖² + ∇θ ‖∇x L‖²: Hessian-vector products, and a gradient penalty's."""
    x = x.clone().requires_grad_()
    parameters = dict(model.named_parameters())
    first = torch.autograd.grad(loss_of(model, x), [x, *parameters.values()], create_graph=True)
    penalty = sum(g.square().sum() for g in first)
    found = torch.autograd.grad(penalty, list(parameters.values()), allow_unused=True)
    return {n: g for n, g in zip(parameters, found, strict=True) if g is not None}


@pytest.mark.parametrize(("evaluations", "limit"), [(2, 1e-2), (5, 1e-5), (9, 1e-8)])
def test_double_backward_has_the_error_of_the_gradient(evaluations: int, limit: float) -> None:
    model, x = tower(), inputs()
    exact = penalty_gradients(model, x)
    assert all(g.norm() > 1e-9 for name, g in exact.items() if name != "head.bias")
    use_adjoint(model, evaluations=evaluations, on_drift="ignore")
    for _ in range(2):
        found = penalty_gradients(model, x)
        assert 1e-12 < relative_error(found, exact) < limit
    assert len(layout(model).rebuilt) == 5


def test_double_backward_with_anchors_everywhere_is_exact() -> None:
    model, x = tower(), inputs()
    exact = penalty_gradients(model, x)
    use_adjoint(model, evaluations=1, anchor_every=1)
    assert relative_error(penalty_gradients(model, x), exact) < 1e-14


def test_a_gradient_penalty_in_a_training_step() -> None:
    def step(model: nn.Module) -> dict[str, Tensor]:
        x = inputs().requires_grad_()
        loss = loss_of(model, x)
        (slope,) = torch.autograd.grad(loss, [x], create_graph=True)
        (loss + slope.square().sum()).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters()}

    exact = step(tower())
    found = step(use_adjoint(tower(), evaluations=9, on_drift="ignore"))
    assert 0 < relative_error(found, exact) < 1e-7


def derivative(model: nn.Module, x: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """(L, dL·direction) by forward-mode differentiation with respect to the input."""
    with forward_ad.dual_level():
        loss = loss_of(model, forward_ad.make_dual(x, direction))
        value, tangent = forward_ad.unpack_dual(loss)
        assert tangent is not None
        return value.detach(), tangent.detach()


@pytest.mark.parametrize("known", [False, True])
def test_forward_mode_is_right(known: bool) -> None:
    model, x, direction = tower(), inputs(), inputs(1)
    value, exact = derivative(model, x, direction)
    assert abs(exact) > 1e-3
    use_adjoint(model, on_drift="ignore")
    if known:
        loss_of(model, x).backward()
    value_now, found = derivative(model, x, direction)
    assert float(value_now) == float(value)
    assert float(found) == float(exact)


def test_forward_over_reverse_is_right() -> None:
    def product(model: nn.Module) -> Tensor:
        """Hessian of the input times a direction."""
        x = inputs().requires_grad_()
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, inputs(1))
            (slope,) = torch.autograd.grad(loss_of(model, dual), [dual])
            return forward_ad.unpack_dual(slope).tangent.detach()

    exact = product(tower())
    assert exact.norm() > 1e-3
    torch.testing.assert_close(product(use_adjoint(tower())), exact, rtol=1e-12, atol=1e-14)


def test_a_dual_level_entered_between_forward_and_backward() -> None:
    model, x = tower(), inputs()
    reference = copy.deepcopy(model)
    loss_of(reference, x).backward()
    use_adjoint(model, evaluations=9, on_drift="ignore")
    loss = loss_of(model, x)
    with forward_ad.dual_level():
        loss.backward()
    found = {n: p.grad for n, p in use_backprop(model).named_parameters()}
    exact = {n: p.grad for n, p in reference.named_parameters()}
    assert 0 < relative_error(found, exact) < 1e-7
