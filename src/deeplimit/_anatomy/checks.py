"""Arguments and targets looked at before anything is computed with them."""

import math
import operator
from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn

from deeplimit.errors import InputError


def check_module(model: object) -> None:
    """Raises InputError unless it is a module."""
    if not isinstance(model, nn.Module):
        raise InputError(
            f"{shown(model)} given as the model; expected a torch.nn.Module, such as "
            "deeplimit.network.load(path) or the .network() of a LayerwiseMeasure"
        )


def check_number(
    name: str, value: Any, expected: str, fits: Callable[[float], bool] = math.isfinite
) -> float:
    """The value as a float; a tensor of one number is one."""
    single = isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex()
    real = single or (isinstance(value, Real) and not isinstance(value, bool))
    value = value.detach().item() if single else value
    if not real or not fits(float(value)):
        raise InputError(f"{name} is {shown(value)}; expected {expected}")
    return float(value)


def check_count(name: str, number: Any, least: int = 1, most: int | None = None) -> int:
    """The number as Python's own; a whole number of NumPy or a tensor of one is one."""
    try:
        whole = None if isinstance(number, bool) else operator.index(number)
    except TypeError:
        whole = None
    if whole is None or not least <= whole <= (math.inf if most is None else most):
        limit = f"≥ {least}" if most is None else f"from {least} to {most}"
        raise InputError(f"{name} is {shown(number)}; expected a whole number {limit}")
    return whole


def layer_numbers(layers: Iterable[SupportsIndex]) -> set[int]:
    """Layers as Python's whole numbers, each once: of a list, a NumPy array, a tensor.

    Raises:
        InputError: something else is among them, such as the True and False of a mask.
    """
    given = layers.tolist() if hasattr(layers, "tolist") else layers
    if not isinstance(given, Iterable) or isinstance(given, str):
        raise InputError(f"{given!r} given as layers; expected several, such as [3, 7]")
    numbers = set()
    for n in given:
        try:
            numbers.add(operator.index(n))
        except TypeError:
            raise InputError(f"layer {n!r} given; expected whole numbers, such as [3, 7]") from None
        if isinstance(n, bool):
            raise InputError(f"layer {n} given; expected whole numbers, such as [3, 7], not a mask")
    return numbers


def shown(value: object) -> str:
    """A value in one short line."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    text = repr(value)
    plain = isinstance(value, str | int | float | tuple | list) or value is None
    return text if plain and len(text) < 60 else f"a {type(value).__name__}"


IGNORED = -100  # as a target: what PyTorch's cross-entropy and transformers take for “none”


def classes_of(y: object) -> Tensor:
    """Targets as whole numbers of 64 bits, whatever whole numbers they were."""
    if not isinstance(y, Tensor):
        raise InputError(f"{shown(y)} given as the targets; expected a tensor: torch.as_tensor(y)")
    if y.dtype == torch.int64:
        return y
    if y.is_complex() or bool((other := y.long() != y).any()):
        given = y if y.is_complex() else y[other]
        raise InputError(
            f"targets of {y.dtype} given, such as {given.flatten()[0].item()}; expected classes, "
            "whole numbers: what is measured here are classifiers"
        )
    return y.long()


def fitted(logits: Tensor, y: object) -> Tensor:
    """Targets of logits [..., C] as `classes_of`: [...], each 0 … C − 1 or −100."""
    targets, classes = classes_of(y), logits.shape[-1]
    if logits.shape[:-1] != targets.shape:
        raise InputError(
            f"targets of shape {tuple(targets.shape)} given for logits of shape "
            f"{tuple(logits.shape)}; expected {tuple(logits.shape[:-1])}, a class per sample"
        )
    if targets.device.type == "cpu" and targets.numel():
        least, most = torch.aminmax(targets.masked_fill(targets == IGNORED, 0))
        if not 0 <= int(least) <= int(most) < classes:
            raise InputError(
                f"targets from {int(least)} to {int(most)} given; expected classes, 0 … "
                f"{classes - 1}, or {IGNORED} where there is none"
            )
    return targets
