"""Ctrl-C is never lost, and is raised where nothing is half done."""

import os
import signal
import threading
from collections.abc import Callable

import pytest

from deeplimit.interruption import interruptible


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


class PressedWhileItDies:
    def __del__(self) -> None:
        press()


def test_pressed_inside_a_destructor_it_is_raised_at_the_next_look() -> None:
    with interruptible() as check:
        check()
        PressedWhileItDies()
        with pytest.raises(KeyboardInterrupt):
            check()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_pressed_twice_it_is_raised_at_once() -> None:
    with interruptible():
        press()
        with pytest.raises(KeyboardInterrupt):
            press()


def test_a_handler_of_the_user_s_own_stays() -> None:
    heard: list[int] = []
    own = signal.signal(signal.SIGINT, lambda number, _: heard.append(number))
    try:
        with interruptible() as check:
            press()
            check()
    finally:
        signal.signal(signal.SIGINT, own)
    assert heard == [signal.SIGINT]


def test_in_another_thread_nothing_is_handled() -> None:
    looks: list[Callable[[], None]] = []

    def work() -> None:
        with interruptible() as check:
            check()
            looks.append(check)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(looks) == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
