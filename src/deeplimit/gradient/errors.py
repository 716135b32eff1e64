"""What the adjoint raises, and what it warns of."""

from deeplimit.errors import RunError


class AdjointError(RunError):
    """A gradient that would be wrong: what happened, and what to do instead."""


class DriftWarning(UserWarning):
    """Rebuilt states are so far off that the gradient may be wrong beyond the tolerance."""
