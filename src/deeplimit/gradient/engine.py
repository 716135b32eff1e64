"""What all switched blocks of a model share: settings, meter, links, and whose turn it is."""

import threading
import weakref
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from torch import Tensor

from deeplimit.gradient.learning import Step
from deeplimit.gradient.meter import AdjointError, DriftMeter, Settings
from deeplimit.gradient.private_torch import graph_task, number_of, reference_to

CROWDED = 64


class _Exit(NamedTuple):
    """A block's output at the moment it left the block. Keeps neither it nor its node alive."""

    node: "weakref.ref[Any]"
    storage: Any  # while it exists no other storage can have this number
    form: tuple[object, ...]


def _form(x: Tensor) -> tuple[object, ...]:
    """All that must be equal beside the storage: a slice, a view or an edited tensor differs.

    Neither the address (a slice has it too, and memory is used again) nor the Python object (FSDP2
    passes aliases) would prove that it is the same state.
    """
    return (x.storage_offset(), x.shape, x.stride(), x.dtype, x._version)


class Links:
    """Which node's output a tensor is: the proof that one block's input is the last one's output.

    Holds the outputs that no block has taken yet.
    """

    def __init__(self) -> None:
        self._exits: dict[int, _Exit] = {}

    def __reduce__(self) -> Any:
        """A copied model starts with none."""
        return Links, ()

    def record(self, node: Any, y: Tensor) -> None:
        """Notes that y is the state that left `node`."""
        if len(self._exits) >= CROWDED:
            self._exits = {k: e for k, e in self._exits.items() if not e.storage.expired()}
        storage = y.untyped_storage()
        exit_ = _Exit(weakref.ref(node), reference_to(storage), _form(y))
        self._exits[number_of(storage)] = exit_

    def match(self, x: Tensor) -> Any:
        """The node whose output x is, once: a second block that takes it starts a new chain."""
        number = number_of(x.untyped_storage())
        found = self._exits.get(number)
        if found is None or found.form != _form(x):
            return None
        del self._exits[number]
        return found.node()


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

    def __reduce__(self) -> Any:
        """A copied model starts with nobody's turn."""
        return Turns, ()

    def take(self) -> Turn:
        """For a run with gradients.

        Raises:
            AdjointError: a forward pass of another thread still has its backward pass to come.
        """
        me = threading.current_thread()
        with self.lock:
            turn = None if self._forward is None else self._forward()
            if turn is not None and turn.thread is me:
                return turn
            if turn is None or not turn.thread.is_alive():
                turn = Turn(me)
                self._forward = weakref.ref(turn)
                return turn
            # What runs inside a backward pass, in autograd's threads, belongs to its forward pass.
            if graph_task() != -1:
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
    links: Links = field(default_factory=Links, repr=False)
    turns: Turns = field(default_factory=Turns, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """Nodes and graphs belong to forward passes of the original."""
        return self.__dict__ | {"chains": None, "paused": False, "measuring": False}

    def way(self, step: Step, position: int) -> Literal["plain", "kept", "coded", "rebuilt"]:
        """How the backward pass comes by the input of a step at this position of its chain.

        It is decided here for every block: in autograd's own graph (plain), kept, or rebuilt from
        the next one's by the code of its update or by a fixed point. The last of a chain, which
        nothing follows, is kept whatever this says.
        """
        if step.plain is not None:
            return "plain"
        every, way = self.settings.anchor_every, self.settings.way(step.name)
        at_anchor = not way.evaluations or (every and position % every == 0)
        if position == 0 or at_anchor or step.data_dependent_shape:
            return "kept"
        if way.bits:
            return "coded"
        return "rebuilt" if step.adds else "kept"
