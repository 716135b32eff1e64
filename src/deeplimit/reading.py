"""Files that may be damaged, or somebody else's: what comes out is a value or one line."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from deeplimit.errors import InputError
from deeplimit.memory import require


@contextmanager
def reading(path: Path, kind: str, remedy: str) -> Iterator[None]:
    """Around a library's reading of a file: whatever its bytes lead to becomes an `InputError`.

    Libraries raise dozens of kinds of errors on damaged bytes (SyntaxError, RecursionError,
    MemoryError, …), so all of them are meant; write nothing else into the with statement.

    Args:
        path: a file; it is there, is no pipe, and is not larger than the memory.
        kind: what was expected, with its article: "a JSON file".
        remedy: what to do.

    Raises:
        InputError: one line that names the file; those of the statement pass as they are.
    """
    try:
        if not path.is_file():
            raise InputError(f"{path}: {'not a' if path.exists() else 'no such'} file: {remedy}")
        require(path.stat().st_size, str(path), remedy)
        yield
    except InputError:
        raise
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise InputError(f"{path}: cannot be read ({reason}): {remedy}") from error
    except Exception as error:
        raise InputError(f"{path}: damaged, or not {kind} ({one_line(error)}): {remedy}") from error


def read_json(path: Path, remedy: str) -> Any:
    """The value in a JSON file; see `parse_json`, `reading`."""
    with reading(path, "JSON", remedy):
        return parse_json(path.read_text(encoding="utf-8"))


def parse_json(text: str) -> Any:
    """The value in a JSON text of finite numbers.

    Raises:
        ValueError: not JSON, or a number that is NaN, infinite or too large for a float.
        RecursionError: nested too deeply.
    """
    return json.loads(text, parse_constant=_refuse, parse_float=_finite)


def one_line(error: BaseException) -> str:
    """The first line of what an error says, or else its type."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits[:40]} is too large a number")
    return number
