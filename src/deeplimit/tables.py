"""Tables of text, of at most a screen, and the numbers in them."""

from collections.abc import Sequence
from html import escape

LINES = 20  # of a table, at most: a screen


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


def number(value: float | None, digits: int = 4) -> str:
    """A number of a table; nothing where there is none."""
    return "" if value is None or value != value else f"{value:.{digits}g}"


def percent(value: float | None) -> str:
    """A fraction in percent; nothing where there is none."""
    return "" if value is None or value != value else f"{100 * value:.2f} %"
