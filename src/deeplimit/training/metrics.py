"""metrics.csv: one row per epoch, all of it floats or None; what is whole is written so."""

import csv
import io
from collections.abc import Sequence

COLUMNS = (
    *("epoch", "loss", "accuracy", "validation_loss", "validation_accuracy", "entry"),
    *("learning_rate", "seconds", "drift"),
)
WHOLE = ("epoch", "entry")

Row = dict[str, float | None]


def to_csv(rows: Sequence[Row]) -> str:
    """Returns the text of metrics.csv; None is an empty cell, numbers keep every digit."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _cell(name, row.get(name)) for name in COLUMNS} for row in rows)
    return text.getvalue()


def from_csv(text: str) -> tuple[Row, ...]:
    """Returns the rows in the text of metrics.csv; ValueError where it is not one."""
    reader = csv.DictReader(io.StringIO(text), strict=True)
    if tuple(reader.fieldnames or ()) != COLUMNS:
        raise ValueError(f"the columns are not {', '.join(COLUMNS)}")
    rows = list(reader)
    if any(None in row for row in rows):  # where the reader puts cells too many
        raise ValueError("a row has more cells than there are columns")
    return tuple({name: _number(row[name]) for name in COLUMNS} for row in rows)


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return str(int(value)) if name in WHOLE else repr(float(value))


def _number(cell: str | None) -> float | None:
    if cell is None:
        raise ValueError("a row is cut short")
    number = float(cell) if cell else None
    if number != number:
        raise ValueError(f"{cell} is no number")
    return number
