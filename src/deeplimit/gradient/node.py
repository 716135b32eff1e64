"""One run of one step: what is kept of it, and how its input is rebuilt for the backward pass."""

import math
import operator
import threading
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from deeplimit.errors import InputError
from deeplimit.gradient.codes import Feedback
from deeplimit.gradient.engine import Engine, Turn
from deeplimit.gradient.learning import Step
from deeplimit.gradient.meter import (
    NOT_FINITE,
    AdjointError,
    BackwardPass,
    Sample,
    norm,
    norms,
    relative_drift,
)
from deeplimit.gradient.private_torch import checkpoint, checkpoint_around, version_of
from deeplimit.gradient.replay_context import Arguments, ReplayContext, state_of

# A step, its own function, and where a fixed point for its input may start (from its output).
Call = tuple[Step, Callable[..., Any], Callable[[Tensor], Tensor] | None]
MANY = 16
SAMPLED = 256


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


class Node:
    """One run of a step x_{n+1} = x_n + Φ_n(x_n) in a forward pass with gradients.

    It lives as long as the graph of that run does: the checkpoint in the graph holds it, and the
    node before it, which rebuilds its own input from this one's, does. Nothing else.

    Attributes:
        way: how its input is to come back, if it is not the first or last of its chain.
        x: the input x_n, while it is kept: at the start of a chain, at anchors, at the end.
        next: the node whose input is this one's output, once that is proven.
        rebuilt: x̃_n in the backward pass, until the node before has used it; of a coded state that
            which the block was evaluated for.
        feedback: the codes of this run of states, and coded: which of them its input is, if it is.
        sample: some entries of a coded input and of the update.
        chain: names of the steps linked so far, shared by all nodes of the chain.
        segment: shared by the nodes whose states are rebuilt from the same kept one; place: in it.
        around: somebody else's checkpoint, inside which it runs; alone: whether it is the first
            one in there.
        kept_entries: some of the output's, while the input is kept.
    """

    def __init__(self, engine: Engine, call: Call, arguments: Arguments, x: Tensor):
        self.engine, (self.step, self.function, self.start) = engine, call
        step = self.step
        modules = step.modules
        self.way, step.size = engine.settings.way(step.name), (x.numel(), x.itemsize)
        if modules.checkpointing:
            modules.refuse_checkpoints(step.name)
        self._turn: Turn | None = engine.turns.take()
        self.around, self.alone = checkpoint_around(), True
        self.x: Tensor | None = x
        self.next: Node | None = None
        self.rebuilt: Tensor | None = None
        self.feedback: Feedback | None = None
        self.coded: int | None = None
        self.sample: Sample | None = None
        self.position = self.place = 0
        self.chain = [step.name]
        self.segment: Segment | None = None
        self._arguments = arguments
        self._requires_grad, self._x_version = x.requires_grad, x._version
        self._dtype = x.dtype
        self._parameters = modules.parameters(step.name)
        self._versions = list(map(version_of, self._parameters))
        self._context = ReplayContext(modules, x.device)
        self._ran = self._edits = False
        self.kept_entries: Tensor | None = None

    def link(self) -> None:
        """Links it to the node whose output is its input, before it runs."""
        assert self.x is not None
        before: Node | None = self.engine.links.match(self.x)
        if before is not None:
            self._follow(before)
        elif self.engine.chains is not None:
            self.engine.chains.append(self.chain)

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
        assert self.x is not None
        output = self._apply(self.x)
        y = state_of(output)
        self.kept_entries = None if y is None else _some(y)
        self._ran = True
        late = self._context.complete()
        if late is not None:
            raise self._error(
                f": its buffer {late} was changed by its forward pass, which it had not done "
                "before, and what it was is gone; run the step again, from now on it is remembered"
            )
        self._arguments.complete()
        # Without its graph, which holds the nodes before, which hold this one.
        self.x, self._x_version = self.x.detach(), self.x._version
        return output

    def replay(self) -> None:
        """Runs the step again in the backward pass, from the kept input or a rebuilt one."""
        turns, found = self.engine.turns, self.engine.meter.this_pass(self.engine.settings)
        before = turns.begin_replay()
        try:
            self._check_unchanged()
            if self.x is not None:
                self._replay_kept(found)
            elif self.coded is not None:
                self._replay_coded(found)
            else:
                self._replay_rebuilt(found)
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
        self.x, self._x_version, self._edits = copy, copy._version, True

    def state(self) -> Tensor:
        """The input x_n: kept, rebuilt, or rebuilt now: from the nearest later one that is there.

        The last happens when the loss does not depend on later layers, or when they saved nothing.

        Raises:
            AdjointError: the kept one was changed in place, or a block on the way.
        """
        if self.x is not None:
            if self.x._version != self._x_version:
                raise self._error(
                    ": its input was changed in place after it was used; change a copy of it "
                    "(x = x + …, not x += …)"
                )
            return self.x
        if self.next is None:  # codes are all that is needed; only they and links let an input go
            return self._decoded()
        if self.rebuilt is None:
            missing: list[Node] = []
            node: Node = self
            while node.x is None and node.rebuilt is None and node.next is not None:
                missing.append(node)
                node = node.next
            found = node
            for node in reversed(missing):
                node.rebuilt = node.rebuild()
                if node.next is not None and node.next is not found:
                    node.next.rebuilt = None
        assert self.rebuilt is not None
        return self.rebuilt

    def rebuild(self) -> Tensor:
        """x̃_n from x_{n+1}, without a gradient that has come to this node."""
        after = self.next
        assert after is not None
        if self.coded is not None:
            x = self._decoded()
            if self.step.modules.scattered():
                return x
            self._check_unchanged()
            return self._refined(x, self.way.evaluations)
        if self.step.modules.scattered():
            raise self._error(
                ": its state is needed although the loss does not depend on its output, and its "
                "parameters are sharded now; put the loss on later states too, or name the block "
                "as an anchor"
            )
        self._check_unchanged()
        target = after.state().to(self._dtype)
        return self._approach(target, self.way.evaluations)

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
        how = self.engine.way(before.step, before.position)
        if how == "coded" and before.segment is not None:
            how = before.encode(self)
            if how == "coded" and before.way.evaluations == 1:
                before.next = None  # it needs no later state, and this one's may go before it does
        if before.segment is not None and how in ("coded", "rebuilt"):
            before.x = before.kept_entries = None
            self.segment, self.place = before.segment, before.place + 1
            self.segment.length = self.place + 1
        else:
            self.segment = Segment()

    def encode(self, after: "Node") -> Literal["coded", "kept"]:
        """Codes x_{n+1} − x_n, if these are tensors like any other."""
        x, y = self.x, after.x
        assert x is not None
        assert y is not None
        if type(x) is not Tensor or type(y) is not Tensor or x.device != y.device:
            return "kept"  # divided among processes, or wrapped in something
        with torch.no_grad():
            if self.feedback is None:
                self.feedback = Feedback(x)
            self.coded = len(self.feedback.codes)
            code = self.feedback.code(y, self.way.bits)
            self.sample = _sample(x, y, self.feedback.dtype)
            if x.device.type == "cpu" and not math.isfinite(code.largest()):
                at = (~(y - x).isfinite()).nonzero()[:1].flatten().tolist()
                raise self._error(NOT_FINITE + (f" at {at}" if at else ""))
        after.feedback = self.feedback
        return "coded"

    def _decoded(self) -> Tensor:
        """x̂_n by the codes, in their precision."""
        assert self.feedback is not None
        assert self.coded is not None
        return self.feedback.state(self.coded)

    def _replay_kept(self, found: BackwardPass) -> None:
        """The exact input is here: an ordinary checkpoint's replay, and a look at the drift."""
        x = self.state()
        leaf = x.detach().requires_grad_(self._requires_grad)
        y = self._evaluate(leaf.clone() if self._edits else leaf)
        self._check_repeats(x, y)
        if self.kept_entries is not None and y.is_floating_point():
            # From the exact input the forward pass's output must come again: some entries of it.
            entries = _some(y)
            allowed = self._allowed(entries, _some(x) if x.shape == y.shape else None)
            found.differences.append((self.step.name, norm(entries - self.kept_entries) - allowed))
        after = self.next
        if after is None:
            return
        rebuilt = after.rebuilt
        if rebuilt is not None and after.segment is not None and after.segment.updates:
            found.unmeasured.pop(id(after.segment), None)
            off = relative_drift(rebuilt - y, after.segment.updates)
            found.drifts.append((after.step.name, off))
            after.segment.updates.clear()
        after.rebuilt = None

    def _replay_rebuilt(self, found: BackwardPass) -> None:
        """x̃_n by the fixed point z ↦ x_{n+1} − Φ_n(z), its last evaluation with gradients."""
        after, segment = self.next, self.segment
        assert after is not None
        assert segment is not None
        target = after.state().to(self._dtype)
        z = self._approach(target, self.way.evaluations - 1)
        y = self._evaluate(z.detach().requires_grad_(self._requires_grad))
        self._check_repeats(z, y)
        increment = y - z
        if self.place % -(-segment.length // MANY) == 0:
            segment.updates.append(norms(increment))
        self.rebuilt = torch.sub(target, increment, out=increment)
        # The kept state that the segment ends at will tell how well.
        found.unmeasured[id(segment)] = self.step.name
        after.rebuilt = None  # it has served; another backward pass rebuilds it

    def _replay_coded(self, found: BackwardPass) -> None:
        """x̂_n by its code, as it is or as the start of the fixed point among what it can have been.

        A block that does not add its input is not evaluated more than once: there is no fixed point
        worth the name.
        """
        sample, evaluations = self.sample, self.way.evaluations
        assert sample is not None
        x = self._decoded()
        z = self._refined(x, evaluations - 1)
        leaf = z.to(self._dtype)
        y = self._evaluate(leaf.detach().requires_grad_(self._requires_grad))
        self._check_repeats(leaf, y)
        now = _sample(leaf, y, x.dtype)
        found.coded.append((self.step.name, sample, now))
        found.compare(MANY)  # or all samples of a deep chain would be there at the end
        if x.device.type != "cpu":
            assert self.feedback is not None
            assert self.coded is not None
            largest = self.feedback.codes[self.coded].largest()
            found.infinite.append((self.step.name, ~largest.isfinite()))
        if self.next is not None:
            self.rebuilt = self._moved(z, leaf, y, x)
            self.next.rebuilt = None

    def _refined(self, x: Tensor, evaluations: int) -> Tensor:
        """Nearer to x_n than x̂_n by so many evaluations, without gradients."""
        z = x
        for _ in range(evaluations if self.step.adds else 0):
            leaf = z.to(self._dtype)
            with torch.no_grad():
                z = self._moved(z, leaf, self._evaluate(leaf), x)
        return z

    def _moved(self, z: Tensor, leaf: Tensor, y: Tensor, x: Tensor) -> Tensor:
        """The next iterate x_{n+1} − Φ_n(z), where y = z + Φ_n(z), if that is nearer.

        It is taken back into |z − x̂_n| ≤ s/2, where x_n is, and stands if it has come nearer to the
        entries of x_n that are known: not every block contracts.
        """
        after, feedback, sample = self.next, self.feedback, self.sample
        if after is None or not self.step.adds:
            return z
        assert feedback is not None
        assert sample is not None
        assert self.coded is not None
        moved = after.state().to(x.dtype) - y + leaf
        return _nearer(sample.x, feedback.confined(moved, x, self.coded), z)

    def _approach(self, target: Tensor, evaluations: int) -> Tensor:
        """z^j = x_{n+1} − Φ_n(z^{j−1}) after so many evaluations, from the scheme's own start."""
        z = target
        if self.start is None and not evaluations:
            return z
        with torch.no_grad():
            if self.start is not None:
                with self._context.again():
                    z = self.start(target)
            for _ in range(evaluations):
                z = target - (self._evaluate(z) - z)
        return z

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

    def _check_unchanged(self) -> None:
        """The replay must see what the forward pass saw.

        Raises:
            AdjointError: it would not.
        """
        parameters = self.step.modules.parameters(self.step.name)
        same = len(parameters) == len(self._parameters)
        same = same and all(map(operator.is_, parameters, self._parameters))
        if not same or list(map(version_of, parameters)) != self._versions:
            raise self._error(
                ": its parameters were changed between forward and backward; states cannot be "
                "rebuilt with others. Run backward before the optimiser's step, or functional_call "
                "around both"
            )
        difference = self._context.difference()
        if difference is not None:
            raise self._error(
                f": {difference} between forward and backward; states cannot be rebuilt as they "
                "were. Do it after backward, or leave the block out of blocks="
            )
        if self._arguments.more and self._arguments.changed():
            raise self._error(
                ": one of its other arguments (a mask, an embedding) was changed in place between "
                "forward and backward; change a copy of it"
            )

    def _error(self, message: str) -> AdjointError:
        return AdjointError(self.step.name + message)


def _sample(x: Tensor, y: Tensor, dtype: torch.dtype) -> Sample:
    """Some entries of x and of y − x."""
    state = _some(x, SAMPLED).to(dtype)
    return Sample(state, _view(y, SAMPLED) - state)


def _nearer(known: Tensor, z: Tensor, x: Tensor) -> Tensor:
    """The one of two states that is nearer to what is known of it; nothing waits for the answer."""
    gaps = (norm(_some(state, SAMPLED) - known) for state in (z, x))
    return torch.where(torch.lt(*gaps), z, x)


def _some(x: Tensor, count: int = 64) -> Tensor:
    """At most so many entries, from all over it."""
    return _view(x, count).clone()


def _view(x: Tensor, count: int) -> Tensor:
    x, size = x.detach() if x.requires_grad else x, x.numel()
    every = -(-size // count) | 1  # odd, or it could be one channel alone
    if type(x) is Tensor and x.is_contiguous():
        return x.as_strided((-(-size // every),), (every,))  # half of a slice's time
    return x.flatten()[::every]
