"""Autocast with the state in float32, gradient scaling, and states of low precision."""

import copy
from collections.abc import Callable

import pytest
import torch
from adjoint_references import exact_gradients, gradients, inputs, loss_of, relative_error, tower
from torch import Tensor, nn

from deeplimit import drift, gradient_error, use_adjoint
from deeplimit.gradient import DriftWarning, layout
from deeplimit.gradient.meter import SAFETY

LossOf = Callable[[nn.Module, Tensor], Tensor]


def under_autocast(dtype: torch.dtype) -> LossOf:
    """The loss with linear layers in `dtype`, states and loss in float32."""

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=dtype):
            y = model(x)
        y = y.float()
        return (y.sin() + y.square() / 2).mean()

    return loss


# Rounding to bfloat16 in a residual function is seen as a drift that evaluations do not lower.
@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.bfloat16, 2e-3), (torch.float16, 5e-4)], ids=["bf16", "fp16"]
)
def test_autocast_runs_and_its_error_is_reported(dtype: torch.dtype, limit: float) -> None:
    model, x, loss = tower().float(), inputs(dtype=torch.float32), under_autocast(dtype)
    value, exact = exact_gradients(model, x, loss)
    _, in_float64 = exact_gradients(tower(), x.double())
    rounding = relative_error(exact, {name: g.float() for name, g in in_float64.items()})
    assert rounding > 1e-4  # autocast was on
    use_adjoint(model, evaluations=4, on_drift="ignore")
    value_now, found = gradients(model, x, loss)
    assert float(value_now) == float(value)
    error = relative_error(found, exact)
    assert 0 < error < limit
    assert error < SAFETY * drift(model)
    assert gradient_error(model, loss, x).error == pytest.approx(error, rel=1e-3)
    assert len(layout(model).rebuilt) == 5


def test_backward_outside_of_autocast_and_inside_agree() -> None:
    model, x, loss = tower().float(), inputs(dtype=torch.float32), under_autocast(torch.bfloat16)
    use_adjoint(model, evaluations=2, on_drift="ignore")
    _, outside = gradients(model, x, loss)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = model(x).float()
        (value.sin() + value.square() / 2).mean().backward()
    inside = {n: p.grad for n, p in model.named_parameters()}
    assert relative_error(inside, outside) == 0.0


def test_autocast_with_anchors_everywhere_is_backpropagation() -> None:
    model, x, loss = tower().float(), inputs(dtype=torch.float32), under_autocast(torch.bfloat16)
    _, exact = exact_gradients(model, x, loss)
    use_adjoint(model, evaluations=1, anchor_every=1)
    _, found = gradients(model, x, loss)
    assert relative_error(found, exact) == 0.0


def trained(model: nn.Module, scale: float) -> tuple[dict[str, Tensor], float]:
    """What three steps in float16 with gradient scaling change, and the last scale."""
    start = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    loss = under_autocast(torch.float16)
    for step in range(3):
        optimizer.zero_grad()
        scaler.scale(loss(model, inputs(step, torch.float32))).backward()
        scaler.step(optimizer)
        scaler.update()
    now = model.state_dict()
    return {name: now[name] - start[name] for name in now}, scaler.get_scale()


def test_float16_with_a_gradient_scaler() -> None:
    exact, scale = trained(tower().float(), 2.0**10)
    model = use_adjoint(tower().float(), evaluations=4, on_drift="ignore")
    found, scale_now = trained(model, 2.0**10)
    assert scale_now == scale == 2.0**10
    assert 0 < relative_error(found, exact) < 1e-3


def test_a_scale_that_overflows_skips_the_steps_it_would_skip() -> None:
    exact, scale = trained(tower().float(), 2.0**18)
    model = use_adjoint(tower().float(), evaluations=4, on_drift="raise", tolerance=0.1)
    found, scale_now = trained(model, 2.0**18)
    assert scale_now == scale == 2.0**17
    assert 0 < relative_error(found, exact) < 1e-2


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 0.05)], ids=["fp32", "bf16"]
)
def test_states_of_low_precision(dtype: torch.dtype, limit: float) -> None:
    model, x = tower().to(dtype), inputs(dtype=dtype)
    _, exact = exact_gradients(model, x)
    use_adjoint(model, evaluations=8, on_drift="ignore")
    _, found = gradients(model, x)
    error = relative_error(found, exact)
    assert error < limit
    assert error < SAFETY * drift(model)


def test_rounding_in_bfloat16_states_is_a_drift_that_warns() -> None:
    model = use_adjoint(tower().bfloat16(), evaluations=8)
    with pytest.warns(DriftWarning, match="drift .* at blocks"):
        gradients(model, inputs(dtype=torch.bfloat16), loss_of)
