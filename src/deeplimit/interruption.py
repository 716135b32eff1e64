"""Ctrl-C, SIGTERM and SIGHUP: heard where nothing is half done, and never lost."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(KeyboardInterrupt):
    """The process is to end: what Ctrl-C raises, for another signal.

    Attributes:
        number: the signal's.
    """

    def __init__(self, number: int):
        super().__init__()
        self.number = number


def _stop(number: int, _frame: FrameType | None) -> None:
    raise Stopped(number)


# The signals that ask a process to end, and who answers them by an exception.
HANDLERS = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: _stop}
if hasattr(signal, "SIGHUP"):  # a terminal was closed
    HANDLERS[signal.SIGHUP] = _stop


@contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM and SIGHUP raise `Stopped`, where they would have ended the process on the spot.

    In another thread than the main one, and where they are handled or ignored (nohup), nothing
    changes.
    """
    ours = [n for n in HANDLERS if _main() and signal.getsignal(n) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, HANDLERS[number])
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def interruptible() -> Iterator[Callable[[], None]]:
    """Yields a function that raises KeyboardInterrupt once Ctrl-C has been pressed; call it often.

    Raised in the midst of a step the exception may be lost: inside a destructor or the callback of
    a weak reference, of which autograd has many, Python prints and drops it. A second Ctrl-C is
    raised at once, wherever the program is. So are SIGTERM and SIGHUP within `stoppable`. Where a
    signal is handled otherwise already, or in another thread than the main one, nothing changes.
    """
    heard = 0

    def remember(number: int, frame: FrameType | None) -> None:
        nonlocal heard
        if heard:
            HANDLERS[signal.Signals(number)](number, frame)
        heard = number

    def check() -> None:
        if heard:
            HANDLERS[signal.Signals(heard)](heard, None)

    ours = [n for n, handler in HANDLERS.items() if _main() and signal.getsignal(n) is handler]
    for number in ours:
        signal.signal(number, remember)
    try:
        yield check
    finally:
        for number in ours:
            signal.signal(number, HANDLERS[number])


def _main() -> bool:
    return threading.current_thread() is threading.main_thread()
