"""One run of one step: what is kept of it, and how its input is rebuilt for the backward pass."""

import math
import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deeplimit._anatomy.stand_ins import state_of
from deeplimit.errors import InputError
from deeplimit.gradient.codes import Feedback
from deeplimit.gradient.distances import (
    Sample,
    nearer,
    norm,
    norms,
    relative_drift,
    sample,
    some,
)
from deeplimit.gradient.engine import Engine, Turn
from deeplimit.gradient.learning import Step
from deeplimit.gradient.meter import KEPT, NOT_FINITE, NOT_REPEATED, AdjointError, BackwardPass
from deeplimit.gradient.private_torch import checkpoint, checkpoint_around
from deeplimit.gradient.replay_context import Arguments, ReplayContext

# A step, its own function, and where a fixed point for its input may start (from its output).
Call = tuple[Step, Callable[..., Any], Callable[[Tensor], Tensor] | None]
MANY = 16
LEFT = "_deeplimit_left"  # attribute of a storage: the node whose output it holds, in which form


class _Inside(threading.local):
    """Whether this thread is inside a step: a checkpoint in a checkpoint's replay would not fit."""

    step = False


inside = _Inside()


class Segment:
    """The nodes between two kept states.

    Attributes:
        length: how many there are.
        updates: ‖x̃_{n+1} − x̃_n‖ per sample of the replays so far: of the first node, at which the
            drift is measured, and of at most MANY in all, evenly spread.
    """

    def __init__(self) -> None:
        self.length = 1
        self.updates: list[Tensor] = []


class Coded(NamedTuple):
    """An input by its code: which of the codes of a run it is, and some entries of it."""

    feedback: Feedback
    number: int
    sample: Sample

    def state(self) -> Tensor:
        """x̂_n, in the codes' precision."""
        return self.feedback.state(self.number)


class Node:
    """One run of a step x_{n+1} = x_n + Φ_n(x_n) in a forward pass with gradients.

    It lives as long as the graph of that run does: the checkpoint in the graph holds it, and the
    node before it, which rebuilds its own input from this one's, does. Nothing else.

    Attributes:
        x: the input x_n, while it is kept: at the start of a chain, at anchors, at the end.
        code: what its input is decoded from, if that is coded.
        way: how its input comes back, once another node follows.
        next: the node whose input is this one's output, once that is proven and while it is needed.
        rebuilt: x̃_n in the backward pass, until the node before has used it.
        feedback: the codes of the run of states that the update is coded after.
        chain: names of the steps linked so far, shared by all nodes of the chain.
        segment: shared by the nodes whose states are rebuilt from the same kept one; place: in it.
        around: somebody else's checkpoint, inside which it runs; alone: whether it is the first
            one in there.
        entries: some of the output's, while the input is kept.
    """

    segment: Segment
    chain: list[str]
    way = KEPT
    code: Coded | None = None
    next: "Node | None" = None
    rebuilt: Tensor | None = None
    feedback: Feedback | None = None
    entries: Tensor | None = None
    position = place = 0
    alone = True
    _ran = _edits = False

    def __init__(self, engine: Engine, call: Call, arguments: Arguments, x: Tensor):
        self.engine, (self.step, self.function, self.start) = engine, call
        step = self.step
        step.size = (x.numel(), x.itemsize)
        if step.modules.checkpointing:
            step.modules.refuse_checkpoints(step.name)
        self._turn: Turn | None = engine.turns.take()
        self.around = checkpoint_around()
        self.x: Tensor | None = x
        self._arguments = arguments
        self._requires_grad, self._version, self._dtype = x.requires_grad, x._version, x.dtype
        self._context = ReplayContext(step.name, step.modules, arguments, x.device)

    def link(self) -> None:
        """Links it to the node whose output is its input, before it runs."""
        x = self.state()
        storage = x.untyped_storage()
        left: Any
        left, form = getattr(storage, LEFT, (None, None))
        before = left() if form == _form(x) else None
        if before is not None and before.engine is self.engine:
            delattr(storage, LEFT)  # a second block that takes it starts a new chain
            self._follow(before)
            return
        self.segment, self.chain = Segment(), [self.step.name]
        if self.engine.chains is not None:
            self.engine.chains.append(self.chain)

    def leave(self, y: Tensor) -> None:
        """Notes that y is the state that left it: the next block's input, should it be so."""
        setattr(y.untyped_storage(), LEFT, (weakref.ref(self), _form(y)))

    def run(self) -> Any:
        """Runs the step in the forward pass, under a checkpoint that calls `replay`."""
        return checkpoint(
            self,
            use_reentrant=False,
            preserve_rng_state=False,  # the node does that, for every evaluation
            determinism_check="none",  # the node has its own
            early_stop=False,  # or there were no output to rebuild the input from
        )

    def __call__(self) -> Any:
        """What the checkpoint calls: first the forward pass, later its replay."""
        if self._ran:
            return self.replay()
        x = self.state()
        output = self._apply(x)
        y = state_of(output)
        self.entries = None if y is None else some(y)
        self._ran = True
        self._context.complete()
        # Without its graph, which holds the nodes before, which hold this one.
        self.x, self._version = x.detach(), x._version
        return output

    def replay(self) -> None:
        """Runs the step again in the backward pass, from the kept input or a rebuilt one."""
        turns, found = self.engine.turns, self.engine.meter.this_pass(self.engine.settings)
        before = turns.begin_replay()
        try:
            self._context.check_unchanged()
            if self.x is not None:
                self._replay_kept(found)
            else:
                z = self._iterate(found)
                if self.next is not None:
                    self.rebuilt = z
                    self.next.rebuilt = None  # it has served; another backward pass rebuilds it
        except (LookupError, TypeError, ValueError) as error:
            raise self._error(
                f": cannot be run again ({type(error).__name__}: {error}); a block that takes from "
                "a list or another store of its caller's does something else the second time. "
                "Leave it out of blocks="
            ) from error
        finally:
            turns.replays = before
        self._turn = None  # though a loss that is kept keeps this node

    def replace_input(self, copy: Tensor) -> None:
        """For a block that edits its own input: replays from a copy made before."""
        self.x, self._version, self._edits = copy, copy._version, True

    def state(self) -> Tensor:
        """The input x_n: kept, rebuilt, or rebuilt now: from the nearest later one that is there.

        The last happens when the loss does not depend on later layers, or when they saved nothing.

        Raises:
            AdjointError: the kept one was changed in place, or a block on the way.
        """
        if self.x is not None:
            if self.x._version != self._version:
                raise self._error(
                    ": its input was changed in place after it was used; change a copy of it "
                    "(x = x + …, not x += …)"
                )
            return self.x
        if self.rebuilt is not None:
            return self.rebuilt
        if self.code is not None and self.next is None:
            return self.code.state()
        missing: list[Node] = []
        later: Node = self
        while later.x is None and later.rebuilt is None and later.next is not None:
            missing.append(later)
            later = later.next
        found, x = later, later.state()
        for node in reversed(missing):
            x = node.rebuilt = node.rebuild()
            if later is not found:
                later.rebuilt = None
            later = node
        return x

    def rebuild(self) -> Tensor:
        """x̃_n from x_{n+1}, without a gradient that has come to this node."""
        if self.step.modules.scattered():
            if self.code is not None:
                return self.code.state()
            raise self._error(
                ": its state is needed although the loss does not depend on its output, and its "
                "parameters are sharded now; put the loss on later states too, or name the block "
                "as an anchor"
            )
        self._context.check_unchanged()
        return self._iterate()

    def _follow(self, before: "Node") -> None:
        """Links this node to the one whose output is its input; that one's own input can go."""
        apart = self.around is not before.around
        if apart and self.around and before.around and before.alone:
            raise InputError(
                f"{self.step.name} and the block before it run in a checkpoint each, which keeps "
                "their inputs: nothing would be saved. Take the checkpoints away, or call "
                "use_backprop(model)"
            )
        before.next = self
        before.step.linked = self.step.linked = self.engine.meter.linked = True
        self.position, self.alone = before.position + 1, apart
        self.chain = before.chain
        self.chain.append(self.step.name)
        way = self.engine.way(before.step, before.position) or KEPT
        if way.bits:
            if not before.encode(self, way.bits):
                way = KEPT
            elif way.evaluations == 1:
                before.next = None  # it needs no later state, and this one's may go before it does
        if way.evaluations:
            before.way, before.x, before.entries = way, None, None
            self.segment, self.place = before.segment, before.place + 1
            self.segment.length = self.place + 1
        else:
            self.segment = Segment()

    def encode(self, after: "Node", bits: int) -> bool:
        """Codes x_{n+1} − x_n, if these are tensors like any other."""
        x, y = self.state(), after.state()
        if type(x) is not Tensor or type(y) is not Tensor or x.device != y.device:
            return False  # divided among processes, or wrapped in something
        with torch.no_grad():
            feedback = Feedback(x) if self.feedback is None else self.feedback
            number = len(feedback.codes)
            code = feedback.code(y, bits)
            self.code = Coded(feedback, number, sample(x, y, feedback.dtype))
            if x.device.type == "cpu" and not math.isfinite(code.largest()):
                at = (~(y - x).isfinite()).nonzero()[:1].flatten().tolist()
                raise self._error(NOT_FINITE + (f" at {at}" if at else ""))
        after.feedback = feedback
        return True

    def _replay_kept(self, found: BackwardPass) -> None:
        """The exact input is here: an ordinary checkpoint's replay, and a look at the drift."""
        x = self.state()
        leaf = x.detach().requires_grad_(self._requires_grad)
        y = self._evaluate(leaf.clone() if self._edits else leaf)
        self._check_repeats(x, y)
        if self.entries is not None and y.is_floating_point():
            # From the exact input the forward pass's output must come again: some entries of it.
            entries = some(y)
            allowed = self._allowed(entries, some(x) if x.shape == y.shape else None)
            gap = norm(entries - self.entries)
            found.faults[NOT_REPEATED].append((self.step.name, gap - allowed))
        after = self.next
        if after is None:
            return
        if after.rebuilt is not None and after.segment.updates:
            off = relative_drift(after.rebuilt - y, after.segment.updates)
            found.drifts.append((after.step.name, off))
            after.segment.updates.clear()
        after.rebuilt = None

    def _iterate(self, found: BackwardPass | None = None) -> Tensor:
        """x̃_n by e evaluations, in a replay the last of them with gradients.

        z ↦ x_{n+1} − Φ_n(z), from the scheme's own start. For a coded state from x̂_n, and taken
        back into |z − x̂_n| ≤ s/2, where x_n is; an iterate stands if it has come nearer to the
        entries of x_n that are known: not every block contracts.
        """
        code, segment = self.code, self.segment
        target = (self.next or self).state()
        x = z = target
        if code is not None:
            x = z = code.state()
            target = target.to(z.dtype)
        elif self.start is not None:
            with torch.no_grad(), self._context.again():
                x = z = self.start(target)
        for left in reversed(range(self.way.evaluations)):
            leaf = z if z.dtype == self._dtype else z.to(self._dtype)
            noted = None if left else found
            if noted is None:
                with torch.no_grad():
                    y = self._evaluate(leaf)
            else:
                y = self._evaluate(leaf.detach().requires_grad_(self._requires_grad))
                self._check_repeats(leaf, y)
            if code is not None:
                if noted is not None:
                    self._note(noted, code, leaf, y)
                if self.next is not None:
                    moved = code.feedback.confined(target - y + leaf, x, code.number)
                    z = nearer(code.sample.x, moved, z)
                continue
            increment = y - leaf
            if noted is not None:
                if self.place % -(-segment.length // MANY) == 0:
                    segment.updates.append(norms(increment))
                noted.rebuilt = self.step.name  # the segment's kept state will tell how well
            z = torch.sub(target, increment, out=increment)
        return z

    def _note(self, found: BackwardPass, code: Coded, x: Tensor, y: Tensor) -> None:
        """What a coded state was in the forward pass, and is now."""
        now = sample(x, y, code.feedback.dtype)
        found.coded.append((self.step.name, code.sample, now))
        found.compare(MANY)  # or all samples of a deep chain would be there at the end
        if x.device.type != "cpu":
            largest = code.feedback.codes[code.number].largest()
            found.faults[NOT_FINITE].append((self.step.name, ~largest.isfinite()))

    def _evaluate(self, z: Tensor) -> Tensor:
        """The output at z, among what the forward pass met."""
        with self._context.again():
            y = state_of(self._apply(z))
        # Without a tensor in its output it is no residual block, and nobody asks for it again.
        return z.detach() if y is None else y.detach()

    def _apply(self, x: Tensor) -> Any:
        """The step's own function; blocks met inside it, a head for example, are part of it."""
        args, kwargs = self._arguments.at(x)
        outer, inside.step = inside.step, True
        try:
            return self.function(*args, **kwargs)
        finally:
            inside.step = outer

    def _allowed(self, y: Tensor, x: Tensor | None) -> Tensor:
        """How far two runs at one input may differ; without x where it may not be residual."""
        rounding = 1e3 * torch.finfo(y.dtype).eps * norm(y)
        return 0.1 * self.engine.settings.tolerance * norm(y if x is None else y - x) + rounding

    def _check_repeats(self, x: Tensor, y: Tensor) -> None:
        """Once for each block and mode: another evaluation gives the same output.

        Raises:
            AdjointError: it does not, so that no replay is what the forward pass was.
        """
        proven, modes = self.step.modules.proven, self._context.modes
        if modes in proven or not y.is_floating_point() or y.numel() == 0:
            return
        with torch.no_grad():
            gap = norm(self._evaluate(x.detach().clone()) - y)
        if gap > self._allowed(y, x if x.shape == y.shape else None):
            raise self._error(
                ": gives another output when it is run again at the same input: it has a state "
                "that is no buffer, or random numbers that are not from torch's default "
                "generators. Leave it out of blocks="
            )
        proven.add(modes)

    def _error(self, message: str) -> AdjointError:
        return AdjointError(self.step.name + message)


def _form(x: Tensor) -> tuple[object, ...]:
    """All that must be equal beside the storage: a slice, a view or an edited tensor differs.

    Neither the address (a slice has it too, and memory is used again) nor the Python object (FSDP2
    passes aliases) would prove that it is the same state.
    """
    return (x.storage_offset(), x.shape, x.stride(), x.dtype, x._version)
