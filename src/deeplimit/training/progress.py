"""What is seen of a run while it trains: a bar in a terminal, otherwise a line per epoch."""

import sys
import time
import warnings
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from deeplimit.gradient import DriftWarning
from deeplimit.terminal import Terminal, tell
from deeplimit.training.metrics import Row

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


def observer(epochs: int, steps_per_epoch: int, epochs_done: int, quiet: bool) -> Observer:
    """What fits: silence, a bar where stderr is a terminal, or lines."""
    if quiet:
        return Observer()
    if sys.stderr.isatty():
        return Bar(epochs, steps_per_epoch, epochs_done, Terminal(stderr=True))
    return Lines(epochs)
