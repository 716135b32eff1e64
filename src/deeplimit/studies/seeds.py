"""The seeds of a study."""

from collections.abc import Sequence

from deeplimit.errors import InputError


def check_seeds(seeds: Sequence[int]) -> None:
    """At least one, each once.

    Raises:
        InputError: they are not.
    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise InputError(
            f"seeds {' '.join(map(str, seeds)) or '(none)'} given; expected at least one, each once"
        )
