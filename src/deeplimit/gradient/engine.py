"""What all switched blocks of a model share: settings, meter, and whose turn it is."""

import threading
import weakref
from dataclasses import dataclass, field
from typing import Any

from deeplimit.gradient.learning import Step
from deeplimit.gradient.meter import KEPT, AdjointError, DriftMeter, Settings, Way
from deeplimit.gradient.private_torch import graph_task


class Turn:
    """Held by the nodes of a thread's forward passes until they are replayed, or gone."""

    def __init__(self, thread: threading.Thread):
        self.thread = thread


class Turns:
    """Whose turn it is: one switched model serves one thread at a time.

    A replay sets random numbers and statistics back, for all threads; two are told so before
    anything is wrong.

    Attributes:
        replays: the thread that is in a replay.
    """

    lock = threading.Lock()  # for a few instructions at a time, whatever the model

    def __init__(self) -> None:
        self._forward: weakref.ref[Turn] | None = None
        self.replays: int | None = None

    def take(self) -> Turn:
        """For a run with gradients.

        Raises:
            AdjointError: a forward pass of another thread still has its backward pass to come.
        """
        me = threading.current_thread()
        with self.lock:
            turn = None if self._forward is None else self._forward()
            if turn is None or not (turn.thread is me or turn.thread.is_alive()):
                turn = Turn(me)
                self._forward = weakref.ref(turn)
            # What runs inside a backward pass, in autograd's threads, belongs to its forward pass.
            if turn.thread is me or graph_task() != -1:
                return turn
            del turn  # or the error would hold it
        raise AdjointError(_TWO)

    def begin_replay(self) -> int | None:
        """Before a replay; returns what `replays` is to be afterwards.

        Raises:
            AdjointError: another thread is in one.
        """
        me = threading.get_ident()
        with self.lock:
            before = self.replays
            if before not in (None, me):
                raise AdjointError(_TWO)
            self.replays = me
        return before


_TWO = (
    "one switched model is used in two threads at once, whose random numbers and statistics "
    "would mix; give each thread a copy of the model (copy.deepcopy), or call use_backprop"
)


@dataclass(eq=False)
class Engine:
    """What is going on in a switched model. A copy starts with nothing going on.

    Attributes:
        settings: of `use_adjoint`; others are put in their place while something is measured.
        measuring: somebody compares gradients, with other settings.
        paused: every block runs as if it were not switched.
        chains: where a list is put here, the names of the blocks of every new chain.
        auto: what plans while the model is trained, where bits are "auto".
    """

    settings: Settings
    measuring: bool = False
    paused: bool = False
    chains: list[list[str]] | None = None
    auto: Any = None
    meter: DriftMeter = field(default_factory=DriftMeter)
    turns: Turns = field(default_factory=Turns, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """Nodes and graphs belong to forward passes of the original."""
        return self.__dict__ | {
            "chains": None,
            "paused": False,
            "measuring": False,
            "turns": Turns(),
        }

    def way(self, step: Step, position: int) -> Way | None:
        """How the backward pass comes by the input of a step at this position of its chain.

        It is decided here for every block: kept, or rebuilt from the next one's by the code of its
        update or by a fixed point; None: in autograd's own graph. The last of a chain, which
        nothing follows, is kept whatever this says.
        """
        if step.plain is not None:
            return None
        every, way = self.settings.anchor_every, self.settings.way(step.name)
        at_anchor = position == 0 or (every and position % every == 0)
        if at_anchor or step.data_dependent_shape:
            return KEPT
        return way.fitting(adds=step.adds)
