"""Where a verb's words go: results to stdout, everything else to stderr, and from one process."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def say(message: str) -> None:
    """One line on stderr."""
    from deeplimit.terminal import tell

    tell(" ".join(message.split()))


def emit(result: Any, *shown: Any, json: bool) -> None:
    """The result on stdout: as JSON, or as what `shown` renders (rich's renderables or text).

    JSON is that of the run folder's files: tuples are lists, NaN is null.
    """
    from deeplimit.records import to_json
    from deeplimit.terminal import Terminal, visible_json

    try:
        if json:
            print(visible_json(to_json(result)))
        else:
            console = Terminal(soft_wrap=True, highlight=False, markup=False)
            for part in shown:
                console.print(part)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough; the work itself is done
        stop_writing()


def stop_writing() -> None:
    """Sends what is still to be written nowhere, so that the interpreter ends without complaint."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(nowhere, stream.fileno())


@contextmanager
def progress(*, quiet: bool, doing: str = "training") -> Iterator[Callable[[str, float], None]]:
    """Shows what is done now: a bar where stderr is a terminal, otherwise a line each."""
    if quiet:
        yield lambda _message, _done: None
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


def _lines(doing: str) -> Callable[[str, float], None]:
    """A line where the message is a new one."""
    said = ""

    def tell(message: str, _done: float) -> None:
        nonlocal said
        if message != said:
            said = message
            say(f"{doing}: {message}")

    return tell
