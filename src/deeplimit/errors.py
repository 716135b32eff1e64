"""The two errors that deeplimit raises on purpose."""


class InputError(ValueError):
    """Wrong input: says what was given, what was expected, what to do. Exit code 2."""


class RunError(RuntimeError):
    """A run failed, not for its input: a loss not finite, a full disk. Exit code 1."""
