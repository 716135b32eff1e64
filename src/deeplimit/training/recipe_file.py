"""recipe.toml: a recipe on disk, with the versions it ran with and the names of its classes."""

import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tomli_w

from deeplimit.errors import InputError
from deeplimit.reading import read_toml

FORMAT = 1
TABLES = ("format", "versions", "recipe", "data")


def recipe_text(settings: dict[str, Any], class_names: Sequence[str]) -> str:
    """The text of recipe.toml; settings that are None are left out, as TOML has no word for it."""
    return tomli_w.dumps(
        {
            "format": FORMAT,
            "versions": {
                "deeplimit": version("deeplimit"),
                "torch": version("torch"),
                "python": platform.python_version(),
            },
            "recipe": {name: value for name, value in settings.items() if value is not None},
            "data": {"class_names": list(class_names)},
        }
    )


def read_recipe_file(path: Path) -> dict[str, Any]:
    """The tables of a recipe.toml, with "recipe" among them.

    Raises:
        InputError: no such file, not TOML, another format, or an unknown table.
    """
    tables = read_toml(path, "correct or replace it")
    if tables.get("format") != FORMAT:
        raise InputError(
            f"{path}: format {tables.get('format')!r}, this deeplimit reads {FORMAT}; it is of "
            "another version: use that version, or train again"
        )
    unknown = next((name for name in tables if name not in TABLES), None)
    if unknown is not None:
        raise InputError(f"{path}: unknown field {unknown}; expected {', '.join(TABLES)}")
    if "recipe" not in tables:
        raise InputError(f"{path}: the table [recipe] is missing; correct or replace the file")
    return tables
