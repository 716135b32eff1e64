"""Batches of inputs as people have them: a tensor, tensors by name, or a tuple."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from deeplimit._anatomy.evaluation import to_device, to_precision

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
        other[:, half:] = other[:, :1] if other.unique().numel() > 1 else 0
    return other


def kind_of(x: Any) -> Any:
    """Of inputs, their names and dimensions."""
    if isinstance(x, Tensor):
        return x.dim()
    parts = dict(x.items() if isinstance(x, Mapping) else enumerate(x))
    return frozenset((name, v.dim()) for name, v in parts.items() if isinstance(v, Tensor))
