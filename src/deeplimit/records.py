"""Records: typed dataclasses as the plain values that JSON and TOML hold, and back, checked."""

import json
import math
import types
from dataclasses import field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from deeplimit.errors import InputError, did_you_mean
from deeplimit.reading import one_line, parse_json, read_json
from deeplimit.tables import Shown

Kind = TypeVar("Kind")

EXPECTED = {int: "a whole number", float: "a number", bool: "true or false"}


class Record(Shown):
    """A frozen dataclass that goes to JSON and comes back the same."""

    def to_json(self) -> str:
        """Returns the text of JSON: tuples are lists, NaN is null, ±∞ the strings ±inf."""
        return to_json(self)

    @classmethod
    def from_json(cls: type[Kind], text: str) -> Kind:
        """Returns the record that `to_json` wrote.

        Raises:
            InputError: the text holds something else; the message names the field.
        """
        try:
            return from_plain(cls, parse_json(text))
        except (ValueError, RecursionError) as error:
            raise InputError(f"no JSON of a {cls.__name__} ({one_line(error)})") from error


def to_json(value: Any) -> str:
    """Returns the text of JSON of a record: tuples are lists, NaN is null, ±∞ the strings ±inf."""
    return json.dumps(to_plain(value), allow_nan=False, ensure_ascii=False)


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


def from_plain(kind: type[Kind], value: Any, where: str = "") -> Kind:
    """The dataclass that `to_plain` took apart; what may be None, or is `newer`, may be left out.

    Raises:
        InputError: an unknown, missing or ill-typed field; the message names it.
    """
    hints = field_types(kind)  # type: ignore[arg-type]
    if not isinstance(value, dict):
        raise _refusal(where or kind.__name__, value, "the fields of one")
    prefix = f"{where}." if where else ""
    for name in value:
        if name not in hints:
            raise InputError(f"unknown field {prefix}{name}{did_you_mean(name, hints)}")
    for name, hint in hints.items():
        absent = name not in value and type(None) not in get_args(hint)
        if absent and name not in _newer(kind):
            raise InputError(f"the field {prefix}{name} is missing")
    value = _newer(kind) | value
    return kind(**{n: coerce(hint, value.get(n), prefix + n) for n, hint in hints.items()})


def newer(default: Any) -> Any:
    """Declares a field that files lack which were written before it was there."""
    return field(default=default, metadata={"newer": True})


def _newer(kind: Any) -> dict[str, Any]:
    return {f.name: f.default for f in fields(kind) if "newer" in f.metadata}


def read_record(kind: type[Kind], path: Path, remedy: str) -> Kind:
    """The dataclass that a JSON file holds.

    Raises:
        InputError: the file is damaged, or holds something else; what to do says `remedy`.
    """
    value = read_json(path, remedy)
    try:
        return from_plain(kind, value)
    except Exception as error:  # also what the record's own checks make of values out of range
        raise InputError(f"{path}: damaged ({one_line(error)}): {remedy}") from error


def coerce(hint: Any, value: Any, where: str) -> Any:
    """The value as its annotation says it, converted only where nothing can be lost.

    A list becomes a tuple, a whole number a float, a string a path, None (in a float) NaN.

    Raises:
        InputError: it is of another type, or not among the choices.
    """
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        if value not in inner:
            choices = [str(one) for one in inner]
            near = did_you_mean(str(value), choices)
            raise _refusal(where, value, f"one of {', '.join(choices)}{near}")
        return value
    if origin in (Union, types.UnionType):
        (kind,) = (one for one in inner if one is not type(None))
        return None if value is None else coerce(kind, value, where)
    if origin is tuple:
        return _tuple(inner, value, where)
    if origin is dict:
        if not isinstance(value, dict):
            raise _refusal(where, value, "a table")
        return {key: coerce(inner[1], item, f"{where}.{key}") for key, item in value.items()}
    if is_dataclass(hint):
        return from_plain(cast(type, hint), value, where)
    if hint is float and (value is None or value in ("inf", "-inf")):
        return math.nan if value is None else float(value)
    if hint in (str, Path) and isinstance(value, str):
        return _text(hint, value, where)
    wanted = (int, float) if hint is float else hint
    if not isinstance(value, wanted) or (isinstance(value, bool) and hint is not bool):
        raise _refusal(where, value, EXPECTED.get(hint, hint.__name__))
    try:
        return float(value) if hint is float else value
    except OverflowError:
        raise _refusal(where, value, "a smaller number") from None


@cache
def field_types(kind: type[Any]) -> dict[str, Any]:
    """Returns the annotations of a dataclass's fields."""
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


def _tuple(inner: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, tuple | list):
        raise _refusal(where, value, "a list")
    kinds = [inner[0]] * len(value) if inner[-1] is Ellipsis else list(inner)
    if len(kinds) != len(value):
        raise InputError(f"{where} has {len(value)} entries; expected {len(kinds)}")
    pairs = enumerate(zip(kinds, value, strict=True))
    return tuple(coerce(kind, item, f"{where}[{i}]") for i, (kind, item) in pairs)


def _text(hint: Any, value: str, where: str) -> Any:
    """As it is, if it can be written to a file, or stand in a path."""
    if "\0" in value and hint is Path:
        raise _refusal(where, value, "a path, without a NUL character")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _refusal(where, value, "characters of Unicode") from None
    return Path(value) if hint is Path else value  # as it is: a mark such as `Named` stays on it


def _refusal(where: str, value: Any, expected: str) -> InputError:
    text = repr(value)
    shown = text if len(text) <= 60 else text[:57] + "…"
    return InputError(f"{where} is {shown}; expected {expected}")
