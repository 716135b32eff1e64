"""One switched model serves one thread at a time; two are told so before anything is wrong."""

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from deeplimit.gradient.errors import AdjointError

_lock = threading.Lock()  # for a few instructions at a time, whatever the model


class Turn:
    """Held by the nodes of a thread's forward passes until they are replayed, or gone."""

    __slots__ = ("__weakref__", "thread")

    def __init__(self) -> None:
        self.thread = threading.current_thread()


class Turns:
    """Whose turn it is. A replay sets random numbers and statistics back, for all threads."""

    def __init__(self) -> None:
        self._forward: weakref.ref[Turn] | None = None
        self._replays: int | None = None  # the thread that is in a replay

    def __reduce__(self) -> Any:
        """A copied model starts with nobody's turn."""
        return Turns, ()

    def take(self) -> Turn:
        """For a run with gradients.

        Raises:
            AdjointError: a forward pass of another thread still has its backward pass to come.
        """
        with _lock:
            turn = None if self._forward is None else self._forward()
            if turn is None or not turn.thread.is_alive():
                turn = Turn()
                self._forward = weakref.ref(turn)
            # What runs inside a backward pass, in autograd's threads, belongs to its forward pass.
            inside = torch._C._current_graph_task_id() != -1
            if inside or turn.thread is threading.current_thread():
                return turn
            del turn  # or the error would hold it
        raise _two()

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Around a replay.

        Raises:
            AdjointError: another thread is in one.
        """
        me = threading.get_ident()
        with _lock:
            before = self._replays
            if before not in (None, me):
                raise _two()
            self._replays = me
        try:
            yield
        finally:
            self._replays = before


def _two() -> AdjointError:
    return AdjointError(
        "one switched model is used in two threads at once, whose random numbers and statistics "
        "would mix; give each thread a copy of the model (copy.deepcopy), or call use_backprop"
    )
