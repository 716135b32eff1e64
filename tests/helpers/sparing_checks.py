"""Checks of annotations that do not begin anew with every definition of a local function."""

from collections import Counter
from functools import partial
from typing import Any

DEFINITIONS = 20


def sparing(decorate: Any) -> Any:
    """A decorator that checks of each local function the first definitions only.

    It is defined anew at each call of the function around it, and decorated for up to a
    millisecond: a quarter of the suite's time, did it never end.
    """
    defined: Counter[Any] = Counter()

    def decorated(given: Any = None, **options: Any) -> Any:
        if given is None:
            return partial(decorated, **options)
        if "<locals>" in getattr(given, "__qualname__", "") and hasattr(given, "__code__"):
            defined[given.__code__] += 1
            if defined[given.__code__] > DEFINITIONS:
                return given
        return decorate(given, **options)

    return decorated
