"""Files that may be damaged, or somebody else's: what comes out is a value or one line."""

import errno
import json
import math
import os
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deeplimit.errors import InputError
from deeplimit.memory import require


@contextmanager
def reading(path: Path, fault: str, remedy: str) -> Iterator[None]:
    """Surrounds a library's reading of a file: whatever its bytes lead to becomes an `InputError`.

    Libraries raise dozens of kinds of errors on damaged bytes (SyntaxError, RecursionError,
    MemoryError, …), so all of them are meant; write nothing else into the with statement. A file
    that is not there, a pipe, or one larger than the memory is refused too. The line says the
    `fault`, such as "damaged, not TOML", and the `remedy`; an InputError passes as it is.
    """
    try:
        if not path.is_file():
            number = errno.EISDIR if path.is_dir() else errno.ENOENT
            reason = "not a file" if path.exists() and not path.is_dir() else os.strerror(number)
            raise InputError(f"{path}: cannot be read ({reason}): {remedy}")
        require(path.stat().st_size, str(path), remedy)
        yield
    except InputError:
        raise
    except Exception as error:
        reason = one_line(error)
        if isinstance(error, OSError) and error.strerror:  # libraries raise it without one, too
            fault, reason = "cannot be read", error.strerror
        raise InputError(f"{path}: {fault} ({reason}): {remedy}") from error


def read_json(path: Path, remedy: str) -> Any:
    """The value in a JSON file; see `parse_json`, `reading`."""
    with reading(path, "damaged", remedy):
        return parse_json(path.read_text(encoding="utf-8"))


def read_toml(path: Path, remedy: str) -> dict[str, Any]:
    """The tables in a TOML file of finite numbers; see `reading`."""
    with reading(path, "damaged, not TOML", remedy):
        return tomllib.loads(path.read_text(encoding="utf-8"), parse_float=_finite)


def parse_json(text: str) -> Any:
    """The value in a JSON text; ValueError for a number that is NaN, infinite or beyond 64 bits."""
    return json.loads(text, parse_constant=_finite, parse_float=_finite, parse_int=_whole)


def one_line(error: BaseException) -> str:
    """The first line of what an error says, or else its type."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits[:40]} is not a finite number")
    return number


def _whole(digits: str) -> int:
    number = int(digits)
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"{digits[:40]} is too large a whole number")
    return number
