"""The errors that deeplimit raises on purpose, and how their lines count."""


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


def several(number: int | float, noun: str, plural: str | None = None) -> str:
    """A number and its noun: `1 seed`, `1,203 samples`, `0.5 points`, `2 batches`."""
    shown = f"{number:g}" if isinstance(number, float) else f"{number:,}"
    return f"{shown} {noun if shown == '1' else plural or f'{noun}s'}"
