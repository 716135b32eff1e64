"""Ctrl-C between two steps, where it cannot be lost."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

HANDLER = signal.default_int_handler


@contextmanager
def interruptible() -> Iterator[Callable[[], None]]:
    """Yields a function that raises KeyboardInterrupt once Ctrl-C has been pressed; call it often.

    Raised in the midst of a step the exception may be lost: inside a destructor or the callback of
    a weak reference, of which autograd has many, Python prints and drops it. A second Ctrl-C is
    raised at once, wherever the program is. Where Ctrl-C is handled otherwise already, or in
    another thread than the main one, nothing changes.
    """
    pressed = False

    def remember(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            HANDLER(number, frame)
        pressed = True

    def check() -> None:
        if pressed:
            raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not HANDLER:
        yield check
        return
    signal.signal(signal.SIGINT, remember)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, HANDLER)
