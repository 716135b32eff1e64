"""Arguments looked at before anything is computed with them: one line on what was expected."""

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, cast

import torch
from torch import Tensor, nn

from deeplimit.errors import InputError
from deeplimit.network import ResidualChain


def check_model(model: object) -> None:
    """Raises InputError unless it is a network."""
    if not isinstance(model, nn.Module):
        raise InputError(
            f"{shown(model)} given as the network; expected a torch.nn.Module, such as "
            "deeplimit.network.load(path) or the .network() of a LayerwiseMeasure"
        )


def check_number(
    name: str, value: Any, expected: str, fits: Callable[[float], bool] = math.isfinite
) -> float:
    """The value as a float; a tensor of one number is one.

    Raises:
        InputError: it is no real number, or does not fit.
    """
    single = isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex()
    real = single or (isinstance(value, Real) and not isinstance(value, bool))
    value = value.detach().item() if single else value
    if not real or not fits(float(value)):
        raise InputError(f"{name} is {shown(value)}; expected {expected}")
    return float(value)


def check_count(name: str, number: object, least: int = 1, most: int | None = None) -> None:
    """Raises InputError unless it is a whole number in this range."""
    whole = isinstance(number, int) and not isinstance(number, bool)
    if not whole or not least <= cast(int, number) <= (math.inf if most is None else most):
        limit = f"≥ {least}" if most is None else f"from {least} to {most}"
        raise InputError(f"{name} is {shown(number)}; expected a whole number {limit}")


def check_batch(model: nn.Module, x: object, shape: Sequence[int]) -> None:
    """Raises InputError unless x is a batch of samples of this shape, in the model's precision.

    The stem of a `ResidualClassifier` standardises what is of lower precision to the model's own.
    """
    if not isinstance(x, Tensor):
        raise InputError(f"{shown(x)} given as the samples; expected a tensor, one row per sample")
    dtype = next(p.dtype for p in model.parameters())
    taken = x.dtype if isinstance(model, ResidualChain) else torch.promote_types(x.dtype, dtype)
    if taken != dtype:
        raise InputError(
            f"samples of {x.dtype} given to a network of {dtype}; expected one precision: give "
            f"x.to({dtype})"
        )
    if x.shape[x.dim() - len(shape) :] != tuple(shape):
        size = ", ".join(map(str, shape))
        raise InputError(
            f"samples of shape {list(x.shape)} given; the network takes [samples, {size}]"
        )


def shown(value: object) -> str:
    """A value in one short line."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    text = repr(value)
    plain = isinstance(value, str | int | float | tuple | list) or value is None
    return text if plain and len(text) < 60 else f"a {type(value).__name__}"
