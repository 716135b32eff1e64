"""What people give to a model: how it is called, which output is read, batches of any form."""

import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from deeplimit._anatomy.checks import shown
from deeplimit._anatomy.evaluation import to_device, to_precision
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


TOKENS = 4


def batch_of(x: Any) -> int:
    """How many samples there are; 0 where no tensor tells."""
    parts = [x] if isinstance(x, Tensor) else [*x.values()] if isinstance(x, Mapping) else [*x]
    return next((len(p) for p in parts if isinstance(p, Tensor) and p.dim()), 0)


def mapped(x: Any, change: Callable[[Tensor], Any]) -> Any:
    """Inputs with `change` made to each tensor in them."""
    if isinstance(x, Tensor):
        return change(x)
    if isinstance(x, Mapping):
        return {k: change(v) if isinstance(v, Tensor) else v for k, v in x.items()}
    return tuple(change(v) if isinstance(v, Tensor) else v for v in x)


def placed(model: nn.Module, x: Any) -> Any:
    """Inputs where the model is: on its device, numbers with a fraction in its precision."""
    first = next((p for p in model.parameters() if p.is_floating_point()), None)
    if first is None:
        return x
    if isinstance(x, Tensor | Mapping):
        moved = to_device(x, first.device)
        return to_precision(moved, first.dtype)
    return mapped(x, lambda v: to_precision(v.to(first.device), first.dtype))


def first_sample(x: Any) -> Any:
    """The first sample of a batch."""
    count = batch_of(x)
    return mapped(x, lambda v: v[:1] if v.dim() and len(v) == count else v)


def small(x: Any) -> Any:
    """At most two samples of a batch, and of what has tokens at most so many of these."""
    count = batch_of(x)

    def less(v: Tensor) -> Tensor:
        v = v[:2] if v.dim() and len(v) == count else v
        return v if v.is_floating_point() or v.dim() < 2 else v[:, :TOKENS]

    return mapped(x, less)


def first_token(x: Any) -> Any:
    """The first token of the first sample, of what has tokens."""
    return mapped(
        first_sample(x), lambda v: v if v.is_floating_point() or v.dim() < 2 else v[:, :1]
    )


def others(model: nn.Module, x: Any) -> list[Any]:
    """Other inputs of the same kind: what a head that reads them would answer otherwise to.

    The latter half of some is padding, or tokens of a meaning: where a text ends, a head may look.
    """
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    said = vars(config) if hasattr(config, "__dict__") else {}
    told = [value for name, value in said.items() if name.endswith("_token_id")]
    marks = [m for value in told for m in (value if isinstance(value, list) else [value])]
    words = getattr(config, "vocab_size", None) or 0
    tokens = {0, *(m for m in marks if isinstance(m, int) and 0 <= m < words)}
    tokens |= {m.padding_idx or 0 for m in model.modules() if isinstance(m, nn.Embedding)}
    changes: list[Callable[[Tensor], Tensor]] = [partial(_ending, t) for t in sorted(tokens)]
    return [mapped(x, change) for change in (_otherwise, *changes)]


def _ending(token: int, x: Tensor) -> Tensor:
    """Ends in zeros; whole numbers other than those of a mask in this token."""
    other = x.clone()
    if other.dim() > 1:
        counts = other.dtype != torch.bool and not other.is_floating_point() and other.max() > 1
        other[:, other.shape[1] // 2 :] = token if counts else 0
    return other


def _otherwise(x: Tensor) -> Tensor:
    other = x.flip(0).clone()
    if other.is_floating_point():
        return other * -0.7 + 0.1
    if other.dim() > 1 and other.dtype != torch.bool:
        half = other.shape[1] // 2
        other[:, half:] = other[:, :1] if bool((other != other.flatten()[:1]).any()) else 0
    return other


def kind_of(x: Any) -> Any:
    """Of inputs, their names and dimensions."""
    if isinstance(x, Tensor):
        return x.dim()
    parts = dict(x.items() if isinstance(x, Mapping) else enumerate(x))
    return frozenset((name, v.dim()) for name, v in parts.items() if isinstance(v, Tensor))
