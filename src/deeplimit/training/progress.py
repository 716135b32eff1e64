"""Metrics of the epochs: rows of metrics.csv, and what is seen of them while a network trains."""

import csv
import io
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from deeplimit.terminal import Terminal, tell

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


REFRESH = 0.25  # seconds between two looks at the running loss, each of which waits for the device

Figures = Callable[[], tuple[float, float]]


class Observer:
    """Told of every step and every epoch; this one shows no progress, the others do, on stderr."""

    def __enter__(self) -> "Observer":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def start(self, message: str) -> None:
        """Before the first epoch."""

    def step(self, figures: Figures) -> None:
        """After a step; figures() gives loss and accuracy of the epoch so far."""

    def epoch(self, row: Row) -> None:
        """After an epoch, with its metrics."""

    def warn(self, message: str) -> None:
        """Something that nobody should miss; where nothing is shown, as a warning of Python's."""
        from deeplimit.gradient import DriftWarning

        warnings.warn(message, DriftWarning, stacklevel=2)

    def close(self) -> None:
        """At the end, however it came."""


class Lines(Observer):
    """One plain line per epoch, for logs."""

    def __init__(self, epochs: int):
        self.epochs = epochs

    def start(self, message: str) -> None:
        """Says it."""
        tell(message)

    def epoch(self, row: Row) -> None:
        """A line."""
        told = f"epoch {row['epoch']:.0f}/{self.epochs}  {described(row)}  {row['seconds']:.1f} s"
        tell(told)

    def warn(self, message: str) -> None:
        """A line."""
        tell(f"warning: {message}")


class Bar(Observer):
    """A bar over all steps, with the running loss and accuracy, the entry, the time left."""

    def __init__(self, epochs: int, steps_per_epoch: int, epochs_done: int, console: Console):
        self.epochs = epochs
        self.seen = 0.0
        self.validated = ""
        self.progress = Progress(
            TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(compact=True),
            console=console,
        )
        self.task = self.progress.add_task(
            "train",
            total=epochs * steps_per_epoch,
            completed=epochs_done * steps_per_epoch,
            epoch=min(epochs_done + 1, epochs),
            epochs=epochs,
            figures="",
        )

    def start(self, message: str) -> None:
        """Says it above the bar."""
        self.progress.console.print(message, highlight=False, markup=False)
        self.progress.start()

    def step(self, figures: Figures) -> None:
        """Moves the bar; looks at the figures now and then."""
        self.progress.advance(self.task)
        if time.monotonic() - self.seen > REFRESH:
            loss, accuracy = figures()
            self.seen = time.monotonic()
            text = f"loss {loss:.3f}  accuracy {accuracy:.1%}{self.validated}"
            self.progress.update(self.task, figures=text)

    def epoch(self, row: Row) -> None:
        """Shows the metrics of the epoch."""
        self.validated = f"  {validated(row)}"
        following = min(int(row["epoch"] or 0) + 1, self.epochs)
        self.progress.update(self.task, figures=described(row), epoch=following)

    def warn(self, message: str) -> None:
        """Says it above the bar."""
        self.progress.console.print(f"warning: {message}", highlight=False, markup=False)

    def close(self) -> None:
        """Leaves the bar as it is."""
        self.progress.stop()


def described(row: Row) -> str:
    """Loss and accuracy in training, accuracy and entry on validation data, drift if there is."""
    drift = "" if row.get("drift") is None else f"  drift {row['drift']:.2g}"
    return f"loss {row['loss']:.3f}  accuracy {row['accuracy']:.1%}  {validated(row)}{drift}"


def validated(row: Row) -> str:
    """Accuracy and entry on validation data."""
    entry = "none yet" if row["entry"] is None else f"{row['entry']:.0f}"
    return f"validation: {row['validation_accuracy']:.1%}, entry {entry}"


def observer(epochs: int, steps_per_epoch: int, epochs_done: int, *, quiet: bool) -> Observer:
    """What fits: silence, a bar where stderr is a terminal, or lines."""
    if quiet:
        return Observer()
    if sys.stderr.isatty():
        return Bar(epochs, steps_per_epoch, epochs_done, Terminal(stderr=True))
    return Lines(epochs)
