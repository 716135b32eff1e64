"""Metrics of the epochs: rows of metrics.csv, and what is seen of them while a network trains."""

import csv
import io
import math
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from deeplimit.errors import several
from deeplimit.terminal import Terminal, tell

COLUMNS = (
    *("epoch", "loss", "accuracy", "validation_loss", "validation_accuracy", "entry"),
    *("learning_rate", "seconds", "drift"),
)
DEPTHS = ("layers", "enough")  # of a network that is cut while it trains: what it has, and needs
WHOLE = ("epoch", "entry", *DEPTHS)

Row = dict[str, float | None]


def to_csv(rows: Sequence[Row]) -> str:
    """Returns the text of metrics.csv; None is an empty cell, numbers keep every digit."""
    text = io.StringIO()
    columns = (*COLUMNS, *(DEPTHS if any("layers" in row for row in rows) else ()))
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        given = ((int if name in WHOLE else float, row.get(name)) for name in columns)
        writer.writerow("" if value is None else kind(value) for kind, value in given)
    return text.getvalue()


def from_csv(text: str) -> tuple[Row, ...]:
    """Returns the rows in the text of metrics.csv; ValueError where it is not one."""
    columns, *rows = csv.reader(io.StringIO(text), strict=True)
    if tuple(columns) not in (COLUMNS, (*COLUMNS, *DEPTHS)):
        raise ValueError(f"the columns are not {', '.join(COLUMNS)}")
    found = []
    for cells in rows:
        numbers = [float(cell) if cell else None for cell in cells]
        if any(number != number for number in numbers):
            raise ValueError("a cell is no number")
        found.append(dict(zip(columns, numbers, strict=True)))
    return tuple(found)


REFRESH = 0.25  # seconds between two looks at the running loss, each of which waits for the device

Figures = Callable[[], tuple[float, float]]


class Observer(AbstractContextManager["Observer"]):
    """Told of every step and every epoch; this one shows no progress, the others do, on stderr.

    Attributes:
        epochs: that are to be done in all.
        text: whether next tokens are predicted, which are judged by their loss.
    """

    def __init__(self, epochs: int = 0, *, text: bool = False):
        self.epochs, self.text = epochs, text

    def __exit__(self, *_: object) -> None:
        """At the end, however it came."""

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

    def described(self, row: Row) -> str:
        """Loss and accuracy, or perplexity, in training and on validation data, entry, drift."""
        drift = "" if row.get("drift") is None else f"  drift {row['drift']:.2g}"
        now, layers = self.measured(row["loss"], row["accuracy"]), row.get("layers")
        depth = "" if layers is None else f"  {several(int(layers), 'layer')}"
        return f"loss {row['loss']:.3f}  {now}  {self.validated(row)}{depth}{drift}"

    def validated(self, row: Row) -> str:
        """Accuracy or perplexity, and entry, on validation data."""
        entry = "none yet" if row["entry"] is None else f"{row['entry']:.0f}"
        now = self.measured(row["validation_loss"], row["validation_accuracy"])
        return f"validation: {now.removeprefix('accuracy ')}, entry {entry}"

    def measured(self, loss: float | None, accuracy: float | None) -> str:
        """The accuracy; of next tokens the perplexity."""
        perplexity = math.exp(min(loss or 0.0, 99.0))
        return f"perplexity {perplexity:.4g}" if self.text else f"accuracy {accuracy:.1%}"


class Lines(Observer):
    """One plain line per epoch, for logs."""

    def start(self, message: str) -> None:
        """Says it."""
        tell(message)

    def epoch(self, row: Row) -> None:
        """A line."""
        seconds = f"{row['seconds']:.1f} s"
        self.start(f"epoch {row['epoch']:.0f}/{self.epochs}  {self.described(row)}  {seconds}")

    def warn(self, message: str) -> None:
        """A line, above the bar where there is one."""
        self.start(f"warning: {message}")


class Bar(Lines):
    """A bar over all steps, with the running loss and accuracy, the entry, the time left."""

    def __init__(
        self,
        epochs: int,
        steps_per_epoch: int,
        epochs_done: int,
        console: Console,
        *,
        text: bool = False,
    ):
        super().__init__(epochs, text=text)
        self.seen = 0.0
        self.last = ""
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
            now = f"loss {loss:.3f}  {self.measured(loss, accuracy)}"
            self.progress.update(self.task, figures=now + self.last)

    def epoch(self, row: Row) -> None:
        """Shows the metrics of the epoch."""
        self.last = f"  {self.validated(row)}"
        following = min(int(row["epoch"] or 0) + 1, self.epochs)
        self.progress.update(self.task, figures=self.described(row), epoch=following)

    def __exit__(self, *_: object) -> None:
        """Leaves the bar as it is."""
        self.progress.stop()


def observer(
    epochs: int, steps_per_epoch: int, epochs_done: int, *, quiet: bool, text: bool = False
) -> Observer:
    """Chooses silence, a bar where stderr is a terminal, or lines."""
    if quiet:
        return Observer()
    if sys.stderr.isatty():
        return Bar(epochs, steps_per_epoch, epochs_done, Terminal(stderr=True), text=text)
    return Lines(epochs, text=text)
