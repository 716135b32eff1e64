"""Libraries of the extras, imported when they are used: a missing one is one line."""

import pkgutil
from types import ModuleType
from typing import cast

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
