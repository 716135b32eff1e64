"""Metrics of the epochs: rows of metrics.csv, and what is seen of them while a network trains."""

import csv
import io
import math
import sys
import time
import warnings
from collections.abc import Callable, Sequence

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
    writer = csv.writer(text, lineterminator="\n")
    columns = (*COLUMNS, *(DEPTHS if any("layers" in row for row in rows) else ()))
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
        if len(cells) != len(columns):
            raise ValueError(f"a row has {len(cells)} cells; there are {len(columns)} columns")
        numbers = [float(cell) if cell else None for cell in cells]
        if any(number != number for number in numbers):
            raise ValueError("a cell is no number")
        found.append(dict(zip(columns, numbers, strict=True)))
    return tuple(found)


REFRESH = 0.25  # seconds between two looks at the running loss, each of which waits for the device

Figures = Callable[[], tuple[float, float]]


class Observer:
    """Told of every step and every epoch; this one shows no progress, the others do, on stderr."""

    def __enter__(self) -> "Observer":
        return self

    def __exit__(self, *_: object) -> None:
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

    def __init__(self, epochs: int, *, text: bool = False):
        self.epochs, self.text = epochs, text

    def start(self, message: str) -> None:
        """Says it."""
        tell(message)

    def epoch(self, row: Row) -> None:
        """A line."""
        shown = described(row, text=self.text)
        tell(f"epoch {row['epoch']:.0f}/{self.epochs}  {shown}  {row['seconds']:.1f} s")

    def warn(self, message: str) -> None:
        """A line."""
        tell(f"warning: {message}")


class Bar(Observer):
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
        self.epochs, self.text = epochs, text
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
            figures_now = f"loss {loss:.3f}  {measured(loss, accuracy, text=self.text)}"
            self.progress.update(self.task, figures=figures_now + self.validated)

    def epoch(self, row: Row) -> None:
        """Shows the metrics of the epoch."""
        self.validated = f"  {validated(row, text=self.text)}"
        following = min(int(row["epoch"] or 0) + 1, self.epochs)
        self.progress.update(self.task, figures=described(row, text=self.text), epoch=following)

    def warn(self, message: str) -> None:
        """Says it above the bar."""
        self.progress.console.print(f"warning: {message}", highlight=False, markup=False)

    def close(self) -> None:
        """Leaves the bar as it is."""
        self.progress.stop()


def described(row: Row, *, text: bool = False) -> str:
    """Loss and accuracy, or perplexity, in training and on validation data, entry, drift."""
    drift = "" if row.get("drift") is None else f"  drift {row['drift']:.2g}"
    now = measured(row["loss"], row["accuracy"], text=text)
    layers = "" if row.get("layers") is None else f"  {several(int(row['layers'] or 0), 'layer')}"
    return f"loss {row['loss']:.3f}  {now}  {validated(row, text=text)}{layers}{drift}"


def validated(row: Row, *, text: bool = False) -> str:
    """Accuracy or perplexity, and entry, on validation data."""
    entry = "none yet" if row["entry"] is None else f"{row['entry']:.0f}"
    now = measured(row["validation_loss"], row["validation_accuracy"], text=text)
    return f"validation: {now.removeprefix('accuracy ')}, entry {entry}"


def measured(loss: float | None, accuracy: float | None, *, text: bool) -> str:
    """The accuracy; of next tokens, which are judged by their loss, the perplexity."""
    return (
        f"perplexity {math.exp(min(loss or 0.0, 99.0)):.4g}" if text else f"accuracy {accuracy:.1%}"
    )


def observer(
    epochs: int, steps_per_epoch: int, epochs_done: int, *, quiet: bool, text: bool = False
) -> Observer:
    """Chooses silence, a bar where stderr is a terminal, or lines."""
    if quiet:
        return Observer()
    if sys.stderr.isatty():
        return Bar(epochs, steps_per_epoch, epochs_done, Terminal(stderr=True), text=text)
    return Lines(epochs, text=text)
