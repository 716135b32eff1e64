"""How a model is called with what people have, and which of its outputs is read."""

import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from deeplimit._anatomy.checks import shown
from deeplimit._anatomy.evaluation import to_precision
from deeplimit.errors import InputError

FAILS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
    RuntimeError,
    TypeError,
    ValueError,
)
ANSWERS = ("logits", "prediction_logits", "seq_relationship_logits", "last_hidden_state")


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside torch.compile, DataParallel and DistributedDataParallel."""
    while True:
        inside = getattr(model, "_orig_mod", None)
        if inside is None and isinstance(
            model, nn.DataParallel | nn.parallel.DistributedDataParallel
        ):
            inside = model.module
        if not isinstance(inside, nn.Module):
            return model
        model = inside


def call(model: nn.Module, x: Any) -> Tensor:
    """What a model answers to a batch: logits where it has them, else its first tensor.

    Args:
        model: any module.
        x: a tensor, tensors by name (then by keyword), or a tuple (then one after the other); of
            a model of transformers a tensor is its main input.

    Raises:
        InputError: there is no tensor in what it returns.
    """
    named = main_input(model)
    if isinstance(x, tuple | list) and not isinstance(x, Tensor):
        return answer(model, model(*x))
    if named is None:
        by_name = isinstance(x, Mapping) and _named(parameters_of(model), x)
        return answer(model, model(**x) if by_name else model(x))
    given: dict[str, Any] = {named: x} if isinstance(x, Tensor) else dict(x)
    parameter = next(model.parameters())
    if not torch.is_autocast_enabled(parameter.device.type):
        given = dict(to_precision(given, parameter.dtype))
    takes = parameters_of(model)
    if "use_cache" in takes:
        given.setdefault("use_cache", False)
    if "return_dict" in takes:
        given["return_dict"] = True
    return answer(model, model(**given))


def answer(model: nn.Module, output: Any) -> Tensor:
    """The tensor that is read: logits; several of one shape side by side; else the first one."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        starts, ends = output.get("start_logits"), output.get("end_logits")
        if isinstance(starts, Tensor) and isinstance(ends, Tensor) and starts.shape == ends.shape:
            return torch.stack([starts, ends], -1)
        for name in ANSWERS:
            if isinstance(output.get(name), Tensor):
                return cast(Tensor, output[name])
        parts = [v for name, v in output.items() if name != "loss"]
    else:
        parts = list(output) if isinstance(output, tuple | list) else []
    for part in parts:
        if isinstance(part, Tensor) and part.is_floating_point() and part.dim():
            return part
    raise InputError(
        f"{type(model).__name__} returns {shown(output)}; expected a tensor, or a mapping or tuple "
        "with one in it"
    )


def _named(takes: Mapping[str, inspect.Parameter], x: Mapping[str, Any]) -> bool:
    """Whether a mapping is for the parameters of a forward, and not for its first one."""
    anything = any(p.kind is p.VAR_KEYWORD for p in takes.values())
    return anything or any(name in takes for name in x)


def main_input(model: nn.Module) -> str | None:
    """The main input's name, of a model that is called by keywords as those of transformers."""
    name = getattr(model, "main_input_name", None)
    return name if isinstance(name, str) and hasattr(model, "config") else None


def parameters_of(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """What a model's forward takes."""
    return _parameters(type(model).forward)


@lru_cache
def _parameters(forward: Callable[..., Any]) -> Mapping[str, Any]:
    return inspect.signature(forward).parameters


def told(error: BaseException) -> str:
    """The first line of an error."""
    first = (str(error).strip().splitlines() or [""])[0]
    return first[:200] or type(error).__name__
