"""Words on a terminal: what names and files bring along never moves its cursor or its colours."""

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    Terminal = Console

# Control characters but tab and line feed, marks that turn the direction of writing round, line
# separators, halves of characters.
HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


ProgressCallback = Callable[[str, float], None]  # what is done now; the fraction done
RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID")  # as launchers say which of several processes it is


def is_first_process() -> bool:
    """This process speaks and writes: with several devices the same command runs often."""
    return next((os.environ[name] for name in RANKS if name in os.environ), "0") == "0"


def silent(message: str, done: float) -> None:
    """Shows no progress."""


@contextmanager
def progress(*, quiet: bool, doing: str = "training") -> Iterator[ProgressCallback]:
    """Shows what is done now: a bar where stderr is a terminal, otherwise a line each."""
    if quiet:
        yield silent
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


def _lines(doing: str) -> ProgressCallback:
    """A line where the message is a new one."""
    said = ""

    def line(message: str, _done: float) -> None:
        nonlocal said
        if message != said:
            said = message
            tell(" ".join(f"{doing}: {message}".split()))

    return line


def visible(text: str) -> str:
    r"""The text with a control character as Python writes it: \x1b, \u202e."""
    return HIDDEN.sub(lambda found: repr(found[0])[1:-1], text)


def visible_json(text: str) -> str:
    r"""JSON that says the same, with no control character as it is: \u009b."""
    return HIDDEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def tell(message: str) -> None:
    """A line on stderr."""
    print(visible(message), file=sys.stderr, flush=True)


def stop_writing() -> None:
    """Sends what is still to be written nowhere, so that the interpreter ends without complaint."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(nowhere, stream.fileno())


def __getattr__(name: str) -> Any:
    """Makes `Terminal` on first use: most who say something need no rich."""
    if name != "Terminal":
        raise AttributeError(name)
    from rich.console import Console
    from rich.segment import Segment

    class Terminal(Console):
        """Rich's console, which by itself lets control characters of what it shows through."""

        def _render_buffer(self, buffer: Iterable[Segment]) -> str:
            """Returns what rich sends; by now only its own control codes are marked as such."""
            shown = (Segment(t if control else visible(t), s, control) for t, s, control in buffer)
            return super()._render_buffer(shown)

    globals()[name] = Terminal
    return Terminal
