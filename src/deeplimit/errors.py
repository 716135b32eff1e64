"""The errors that deeplimit raises on purpose, and the words in which errors are told."""

import difflib
import traceback
from collections.abc import Iterable
from pathlib import Path


class InputError(ValueError):
    """Wrong input: says what was given, what was expected, what to do. Exit code 2."""


class RunError(RuntimeError):
    """A run failed, not for its input: a loss not finite, a full disk. Exit code 1."""


class ProcessLost(RunError):
    """One of several processes is gone, which the others are told.

    Attributes:
        aloud: whether this process is the one that says so.
    """

    def __init__(self, message: str, *, aloud: bool):
        super().__init__(message)
        self.aloud = aloud


def refuse(source: object, faults: Iterable[str]) -> None:
    """Raises an InputError with the first fault of a source; no generator goes on behind that."""
    for fault in faults:
        raise InputError(f"{source}: {fault}")


def several(number: int | float, noun: str, plural: str | None = None) -> str:
    """A number and its noun: `1 seed`, `1,203 samples`, `0.5 points`, `2 batches`."""
    shown = f"{number:g}" if isinstance(number, float) else f"{number:,}"
    return f"{shown} {noun if shown == '1' else plural or f'{noun}s'}"


def did_you_mean(name: object, names: Iterable[str], *, cutoff: float = 0.6) -> str:
    """`, did you mean a, b?`, or nothing where no name is near."""
    close = difflib.get_close_matches(str(name), list(names), n=3, cutoff=cutoff)
    return f", did you mean {', '.join(close)}?" if close else ""


def describe_error(error: BaseException) -> str:
    """An error in a line: its type, the first line of what it says, and where it was raised."""
    lines = str(error).strip().splitlines()
    frames = traceback.extract_tb(error.__traceback__)
    at = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    if isinstance(error, SyntaxError) or (frames and frames[-1].filename.startswith("<")):
        at = ""  # the first says it itself; the others are in no file
    return f"{type(error).__name__}{f': {lines[0]}' if lines else ''}{at}"
