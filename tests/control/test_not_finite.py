"""Losses of which nothing can be decided, and words that would change what is removed."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from adjoint_models import Block
from torch import Tensor, nn

from deeplimit import InputError, choose_cut, crop, turnpike_profile, verify_crop

MSE = nn.MSELoss()


def problem(spoilt: float | None = None) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), *(Block(8) for _ in range(4)), nn.Linear(8, 2))
    x = torch.randn(96, 5)
    y = model(x).detach() + 0.1 * torch.randn(96, 2)
    if spoilt is not None:
        y[90, 0] = spoilt
    return model, list(zip(x.split(32), y.split(32), strict=True))


CALLS: dict[str, Callable[[nn.Module, Any, Any], object]] = {
    "choice": lambda model, clean, spoilt: choose_cut(
        model, turnpike_profile(model, clean, MSE), spoilt, loss=MSE, rise=0.01
    ),
    "proof": lambda model, _, spoilt: verify_crop(model, crop(model, 2), spoilt, MSE),
}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("call", CALLS)
def test_one_loss_that_is_not_finite_is_said(call: str, value: float) -> None:
    model, clean = problem()
    _, spoilt = problem(value)
    with pytest.raises(InputError, match=r"the loss of 1 sample of .* is not finite"):
        CALLS[call](model, clean, spoilt)


def test_all_branches_but_what_a_model_needs_may_go() -> None:
    model, batches = problem()
    profile = turnpike_profile(model, batches, MSE)
    choice = choose_cut(model, profile, batches, loss=MSE, rise=1e9, granularity="branch")
    assert len(choice.branches or ()) == 3  # of four blocks of one branch
    assert verify_crop(model, crop(model, choice), batches, MSE).horizon_after == 1


def test_classes_that_are_weighed_are_refused() -> None:
    model, batches = problem()
    labelled = [(x, (x[:, 0] > 0).long()) for x, _ in batches]
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 9.0]))
    with pytest.raises(InputError, match="weighs classes"):
        verify_crop(model, crop(model, 2), labelled, loss)


def test_a_misspelt_granularity_removes_nothing() -> None:
    model, batches = problem()
    profile = turnpike_profile(model, batches, MSE)
    name: Any = "branches"
    for call in (
        lambda: crop(model, remove=[1], granularity=name),
        lambda: choose_cut(model, profile, batches, loss=MSE, rise=0.1, granularity=name),
    ):
        with pytest.raises(Exception, match="granularity"):
            call()
