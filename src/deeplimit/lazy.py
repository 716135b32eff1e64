"""Rooms import a public name when it is asked for: nothing waits for what it does not use."""

import ast
import pkgutil
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any, cast

from deeplimit.extras import missing


def lazy(
    room: str, old: Mapping[str, str] | None = None
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Makes `__getattr__` and `__dir__` of a room's `__init__`.

    They import the names that stand in its block `if TYPE_CHECKING:`, each from the file named
    there.

    Names of the `old` table were public once, and are called otherwise now. Where a name needs a
    library of an extra that is not installed `__getattr__` raises MissingExtra.
    """
    source = cast(Any, sys.modules[room].__spec__).loader.get_source(room)
    imports = next(node.body for node in ast.parse(source).body if isinstance(node, ast.If))
    places = {
        name.name: node.module
        for node in imports
        if isinstance(node, ast.ImportFrom)
        for name in node.names
    }
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
            return pkgutil.resolve_name(f"{places[new]}:{new}")
        except ModuleNotFoundError as error:
            refusal = missing(error)
            if refusal is None:
                raise
            raise refusal from error

    return get, lambda: sorted({*places, *getattr(sys.modules[room], "__all__", ())})
