"""Typed dataclasses as the plain values that JSON and TOML hold, and back, checked."""

import difflib
import math
import types
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from deeplimit.errors import InputError
from deeplimit.reading import one_line, read_json

Record = TypeVar("Record")


def to_plain(value: Any) -> Any:
    """Dicts, lists, strings and finite numbers only. NaN becomes None, ±∞ the strings ±inf."""
    if is_dataclass(value):
        return {f.name: to_plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, tuple | list):
        return [to_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def from_plain(kind: type[Record], value: Any, where: str = "") -> Record:
    """The dataclass that `to_plain` took apart; fields that may be None may be left out.

    Raises:
        InputError: an unknown, missing or ill-typed field; the message names it.
    """
    hints = get_type_hints(kind)
    names = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    if not isinstance(value, dict):
        raise InputError(f"{where or kind.__name__} is {_shown(value)}; expected the fields of one")
    prefix = f"{where}." if where else ""
    for name in value:
        if name not in names:
            raise InputError(f"unknown field {prefix}{name}{_meant(name, names)}")
    for name in names:
        if name not in value and type(None) not in get_args(hints[name]):
            raise InputError(f"the field {prefix}{name} is missing")
    return kind(**{n: conform(hints[n], value.get(n), prefix + n) for n in names})


def read_record(kind: type[Record], path: Path, remedy: str) -> Record:
    """The dataclass that a JSON file holds.

    Raises:
        InputError: the file is damaged, or holds something else; what to do says `remedy`.
    """
    value = read_json(path, remedy)
    try:
        return from_plain(kind, value)
    except Exception as error:  # also what the record's own checks make of values out of range
        raise InputError(f"{path}: damaged ({one_line(error)}): {remedy}") from error


def conform(hint: Any, value: Any, where: str) -> Any:
    """The value as its annotation says it, converted only where nothing can be lost.

    A list becomes a tuple, a whole number a float, a string a path, None (in a float) NaN.

    Raises:
        InputError: it is of another type, or not among the choices.
    """
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        if value not in inner:
            choices = ", ".join(map(str, inner))
            meant = _meant(value, inner)
            raise InputError(f"{where} is {_shown(value)}; expected one of {choices}{meant}")
        return value
    if origin in (Union, types.UnionType):
        (kind,) = (one for one in inner if one is not type(None))
        return None if value is None else conform(kind, value, where)
    if origin is tuple:
        return _tuple(inner, value, where)
    if origin is dict:
        if not isinstance(value, dict):
            raise InputError(f"{where} is {_shown(value)}; expected a table")
        return {key: conform(inner[1], item, f"{where}.{key}") for key, item in value.items()}
    if is_dataclass(hint):
        return from_plain(cast(type, hint), value, where)
    if hint is float:
        return _float(value, where)
    if hint in (str, Path) and isinstance(value, str):
        return _text(hint, value, where)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise _ill_typed(where, value, {int: "a whole number", bool: "true or false"}, hint)
    return value


def _tuple(inner: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, tuple | list):
        raise InputError(f"{where} is {_shown(value)}; expected a list")
    kinds = [inner[0]] * len(value) if inner[-1] is Ellipsis else list(inner)
    if len(kinds) != len(value):
        raise InputError(f"{where} has {len(value)} entries; expected {len(kinds)}")
    pairs = enumerate(zip(kinds, value, strict=True))
    return tuple(conform(kind, item, f"{where}[{i}]") for i, (kind, item) in pairs)


def _float(value: Any, where: str) -> float:
    if value is None:
        return math.nan
    if value in ("inf", "-inf"):
        return float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _ill_typed(where, value, {float: "a number"}, float)
    try:
        return float(value)
    except OverflowError:
        raise InputError(f"{where} is {_shown(value)}; expected a smaller number") from None


def _text(hint: Any, value: str, where: str) -> Any:
    """As it is, if it can be written to a file, or stand in a path."""
    if "\0" in value and hint is Path:
        raise InputError(f"{where} is {_shown(value)}; expected a path, without a NUL character")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InputError(f"{where} is {_shown(value)}; expected characters of Unicode") from None
    return Path(value) if hint is Path else value  # as it is: a mark such as `Named` stays on it


def _ill_typed(where: str, value: Any, words: dict[Any, str], hint: Any) -> InputError:
    return InputError(f"{where} is {_shown(value)}; expected {words.get(hint, hint.__name__)}")


def _meant(value: Any, names: Sequence[str]) -> str:
    """The nearest name, as a question."""
    close = difflib.get_close_matches(str(value), names, n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
