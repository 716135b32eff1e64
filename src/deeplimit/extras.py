"""What is imported when it is used: public names, and libraries of the extras.

Nothing waits for what it does not use; a library that is missing is one line.
"""

import ast
import pkgutil
import sys
import warnings
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, cast

from deeplimit.errors import InputError


class MissingExtra(InputError, ImportError):
    """A library that an extra brings is not installed."""


# extra: the modules that it brings.
EXTRAS = {
    "ode": "torchdiffeq",
    "measures": "scipy ot lap sklearn",
    "cli": "tyro rich plotly jinja2 markupsafe lightning_fabric lightning_utilities datasets "
    "pyarrow PIL filelock tomli_w",
    "hub": "transformers",
}


def need(module: str, extra: str) -> ModuleType:
    """Imports a library, or a module of it, that an extra brings, or raises MissingExtra."""
    try:
        return cast(ModuleType, pkgutil.resolve_name(module))
    except ModuleNotFoundError as error:
        if not error.name or error.name.partition(".")[0] != module.partition(".")[0]:
            raise  # something that the library itself misses
        raise _refusal(error.name, extra) from error


def missing(error: ModuleNotFoundError) -> MissingExtra | None:
    """Says which extra brings a module that is not there; None where no extra does."""
    library = (error.name or "").partition(".")[0]
    extra = next((extra for extra, names in EXTRAS.items() if library in names.split()), None)
    return None if extra is None else _refusal(library, extra)


def _refusal(library: str, extra: str) -> MissingExtra:
    return MissingExtra(f'{library} is not installed; pip install "deeplimit[{extra}]"')


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
