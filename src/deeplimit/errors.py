"""The two errors that deeplimit raises on purpose."""


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
