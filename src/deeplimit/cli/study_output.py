"""What the studies of rates in depth share: progress while they run, and their figure's page."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from deeplimit.cli.output import say

if TYPE_CHECKING:
    from deeplimit.studies import Family

FIGURE = "study.html"
READ = (
    "Dotted before training, solid after it; markers are means over the seeds, bars reach from the "
    "smallest to the largest; the thin grey line falls as 1/N. "
)


@contextmanager
def progress(*, quiet: bool, doing: str = "training") -> Iterator[Callable[[str, float], None]]:
    """What is done now: a bar where stderr is a terminal, otherwise a line each."""
    if quiet:
        yield lambda message, done: None
        return
    if not sys.stderr.isatty():
        yield _lines(doing)
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from deeplimit.terminal import Terminal

    columns = (
        BarColumn(bar_width=24),
        TextColumn("{task.description}"),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=Terminal(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=1.0)
        yield lambda message, done: bar.update(task, description=message, completed=done)


def write_rates(
    folder: str, title: str, depths: Sequence[int], families: "Sequence[Family]", note: str
) -> str:
    """Writes study.html, which opens offline; what to say of it."""
    from deeplimit.cli.figure_page import write_figures
    from deeplimit.report import rates_figure

    figure = rates_figure("", depths, families)
    return write_figures(Path(folder) / FIGURE, title, [("rates", figure, f"{READ}{note}.")])


def _lines(doing: str) -> Callable[[str, float], None]:
    """A line where the message is a new one."""
    said = ""

    def tell(message: str, done: float) -> None:
        nonlocal said
        if message != said:
            said = message
            say(f"{doing}: {message}")

    return tell
