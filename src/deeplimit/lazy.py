"""Rooms import a public name when it is asked for: nothing waits for what it does not use."""

import pkgutil
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from deeplimit.extras import missing


def lazy(
    room: str, files: Mapping[str, str], old: Mapping[str, str] | None = None
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Makes `__getattr__` and `__dir__` of a room's `__init__`.

    Args:
        room: its `__name__`.
        files: the names that each of its files brings, separated by blanks.
        old: names that were public once, and what they are called now.

    Raises:
        MissingExtra: `__getattr__`, where a name needs a library of an extra that is not installed.
    """
    places = {name: file for file, names in files.items() for name in names.split()}
    old = old or {}

    def get(name: str) -> Any:
        new = old.get(name, name)
        if new not in places:
            raise AttributeError(f"module {room!r} has no attribute {name!r}")
        if name != new:
            warnings.warn(
                f"{room}.{name} is called {new} now, and goes with the next version",
                DeprecationWarning,
                stacklevel=2,
            )
        try:
            return pkgutil.resolve_name(f"{room}.{places[new]}:{new}")
        except ModuleNotFoundError as error:
            refusal = missing(error)
            if refusal is None:
                raise
            raise refusal from error

    return get, lambda: sorted({*places, *getattr(sys.modules[room], "__all__", ())})
