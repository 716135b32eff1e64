"""Tables of text, of at most a screen, and the numbers in them."""

import math
from collections.abc import Sequence
from html import escape

LINES = 20  # of a table, at most: a screen
FINE = 2000  # samples from which a hundredth of a point says something


class Shown:
    """A result that a notebook shows as a terminal does."""

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], lines: int = LINES) -> str:
    """Columns under their names, all but the first to the right; of many rows some, in order."""
    last = len(rows) - 1
    if last >= lines:
        rows = [rows[round(i * last / (lines - 1))] for i in range(lines)]
    cells = [list(header), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in cells
    )


def shown_depths(horizon: int, *more: int) -> list[int]:
    """All depths of a short network; of another 0, powers of two, quarters, N, and `more`."""
    if horizon < LINES:
        return list(range(horizon + 1))
    powers = (2**i for i in range(horizon.bit_length()))
    quarters = (round(i * horizon / 4) for i in range(5))
    return sorted({*powers, *quarters, *more})


def number(value: float | None, digits: int = 4) -> str:
    """A number of a table; nothing where there is none."""
    return "" if value is None or value != value else f"{value:.{digits}g}"


def numbers(
    values: Sequence[float], digits: int = 4, like: Sequence[float] | None = None
) -> list[str]:
    """A column of numbers with one number of decimals, at least so many digits of the smallest.

    That is the smallest of `like` these are.
    """
    sizes = [abs(v) for v in like or values if v and math.isfinite(v)]
    places = max(digits - 1 - math.floor(math.log10(min(sizes, default=1.0))), 0)
    return [f"{v:,.{places}f}" if math.isfinite(v) else "" for v in values]


def decimals(samples: int) -> int:
    """Decimals of a percentage of that many samples: no finer than one sample can move it."""
    return 2 if samples >= FINE else 1


def percent(value: float | None) -> str:
    """A fraction in percent; nothing where there is none."""
    return "" if value is None or value != value else f"{100 * value:.2f} %"
