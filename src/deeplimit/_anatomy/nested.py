"""Tensors inside mappings, tuples, lists and dataclasses: what models take and return."""

import copy
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor


def fields_of(value: Any) -> list[str]:
    """The names of the fields that a dataclass has; none of anything else."""
    if not is_dataclass(value) or isinstance(value, type):
        return []
    return [one.name for one in fields(value) if hasattr(value, one.name)]


def inside(values: Any) -> list[Any]:
    """The values of a mapping, tuple, list or dataclass; none of anything else."""
    if isinstance(values, Mapping):
        return list(values.values())
    if names := fields_of(values):
        return [getattr(values, name) for name in names]
    return list(values) if isinstance(values, tuple | list) else []


def rebuilt(values: Any, others: list[Any]) -> Any:
    """The same mapping, tuple, list or dataclass of other values; anything else as it is."""
    kind: Any = type(values)
    if isinstance(values, Mapping):
        named = dict(zip(values, others, strict=True))
        if fields_of(values):
            return kind(**named)  # as transformers' outputs are
        if not isinstance(values, MutableMapping):
            return named
        same = copy.copy(values)
        same.update(named)
        return same
    if names := fields_of(values):
        other = copy.copy(values)
        for name, value in zip(names, others, strict=True):
            object.__setattr__(other, name, value)  # a frozen one's, too
        return other
    if isinstance(values, tuple | list):
        return kind(*others) if hasattr(kind, "_fields") else kind(others)
    return values


def each_leaf(change: Callable[..., Any], *xs: Any) -> Any:
    """The same with `change` made of whatever has nothing inside it.

    Of several of one form `change` is given what they have at each place; the last is rebuilt.
    """
    last = xs[-1]
    if isinstance(last, Mapping):
        return rebuilt(last, [each_leaf(change, *(x[name] for x in xs)) for name in last])
    if isinstance(last, tuple | list) or fields_of(last):
        places = zip(*map(inside, xs), strict=True)
        return rebuilt(last, [each_leaf(change, *parts) for parts in places])
    return change(*xs)


def each_tensor(change: Callable[..., Any], *xs: Any) -> Any:
    """The same with `change` made of each tensor."""
    return each_leaf(lambda *v: change(*v) if isinstance(v[-1], Tensor) else v[-1], *xs)


def tensors_in(values: Any) -> list[Tensor]:
    """All tensors in it."""
    found = [values] if isinstance(values, Tensor) else []
    return found + [tensor for value in inside(values) for tensor in tensors_in(value)]
