"""One run of one step: what is kept of it, and how its input is rebuilt for the backward pass."""

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deeplimit.gradient.arguments import Arguments, state_of
from deeplimit.gradient.circumstances import Circumstances
from deeplimit.gradient.errors import AdjointError
from deeplimit.gradient.refusals import check_there, checkpoint_around, refuse_checkpoints
from deeplimit.gradient.turns import Turn

if TYPE_CHECKING:
    from deeplimit.gradient.engine import Engine
    from deeplimit.gradient.step import Step

Start = Callable[[Tensor], Tensor]
MANY = 16


class _Inside(threading.local):
    step = False


_inside = _Inside()


def inside_step() -> bool:
    """Whether this thread is inside a step: a checkpoint in a checkpoint's replay would not fit."""
    return _inside.step


class Segment:
    """The nodes between two kept states.

    Attributes:
        length: how many there are.
        updates: ‖x̃_{n+1} − x̃_n‖ per sample of the replays so far: of the first node, at which the
            drift is measured, and of at most MANY in all, evenly spread.
    """

    __slots__ = ("length", "updates")

    def __init__(self) -> None:
        self.length = 1
        self.updates: list[Tensor] = []


class Node:
    """One run of a step x_{n+1} = x_n + Φ_n(x_n) in a forward pass with gradients.

    It lives as long as the graph of that run does: the checkpoint in the graph holds it, and the
    node before it, which rebuilds its own input from this one's, does. Nothing else.

    Attributes:
        x: the input x_n, while it is kept: at the start of a chain, at anchors, at the end.
        next: the node whose input is this one's output, once that is proven.
        rebuilt: x̃_n in the backward pass, until the node before has used it.
        chain: names of the steps linked so far, shared by all nodes of the chain.
        segment: shared by the nodes whose states are rebuilt from the same kept one.
        around: somebody else's checkpoint, inside which it runs.
        alone: whether it is the first one in there.
    """

    __slots__ = (
        "__weakref__",
        "_arguments",
        "_circumstances",
        "_edits",
        "_entries",
        "_parameters",
        "_place",
        "_ran",
        "_requires_grad",
        "_turn",
        "_versions",
        "_x_version",
        "alone",
        "around",
        "chain",
        "engine",
        "function",
        "next",
        "position",
        "rebuilt",
        "segment",
        "start",
        "step",
        "x",
    )

    def __init__(
        self,
        engine: "Engine",
        step: "Step",
        function: Callable[..., Any],
        start: Start | None,
        arguments: Arguments,
        x: Tensor,
    ):
        refuse_checkpoints(step.name, step.modules.checkpointing)
        self._turn: Turn | None = engine.turns.take()
        self.engine, self.step, self.function, self.start = engine, step, function, start
        self.around, self.alone = checkpoint_around(), True
        self.x: Tensor | None = x
        self.next: Node | None = None
        self.rebuilt: Tensor | None = None
        self.position = 0
        self.chain = [step.name]
        self.segment, self._place = Segment(), 0
        self._arguments = arguments
        self._requires_grad = x.requires_grad
        self._x_version = x._version
        self._parameters = step.modules.parameters()
        check_there(step.name, self._parameters)
        self._versions = [p._version for p in self._parameters]
        self._circumstances = Circumstances(step.modules, x.device)
        self._ran = self._edits = False
        self._entries: Tensor | None = None  # some of the output's

    def __call__(self) -> Any:
        """What the checkpoint calls: first the forward pass, later its replay."""
        if not self._ran:
            assert self.x is not None
            output = self._apply(self.x)
            y = state_of(output)
            self._entries = None if y is None else _some(y)
            self._ran = True
            late = self._circumstances.complete()
            if late is not None:
                raise AdjointError(
                    f"{self.step.name}: its buffer {late} was changed by its forward pass, which "
                    "it had not done before, and what it was is gone; run the step again, from now "
                    "on it is remembered"
                )
            self._arguments.complete()
            # Without its graph, which holds the nodes before, which hold this one.
            self.x, self._x_version = self.x.detach(), self.x._version
            return output
        self.engine.this_pass()
        with self.engine.turns.replaying():
            self._check_unchanged()
            try:
                if self.x is None:
                    self._replay_rebuilt()
                else:
                    self._replay_kept(self.x)
            except (LookupError, TypeError, ValueError) as error:
                raise AdjointError(
                    f"{self.step.name}: cannot be run again ({type(error).__name__}: {error}); a "
                    "block that takes from a list or another store of its caller's does something "
                    "else the second time. Leave it out of blocks="
                ) from error
        self._turn = None  # though a loss that is kept keeps this node
        return None

    def follows(self, before: "Node") -> None:
        """Links this node to the one whose output is its input; that one's own input can go."""
        before.next = self
        before.step.linked = self.step.linked = self.engine.linked = True
        self.position = before.position + 1
        self.alone = self.around is not before.around
        self.chain = before.chain
        self.chain.append(self.step.name)
        if not self.engine.keeps(before.step, before.position):
            before.x = before._entries = None
            self.segment, self._place = before.segment, before._place + 1
            self.segment.length = self._place + 1

    def replace_input(self, copy: Tensor) -> None:
        """For a block that edits its own input: replays from a copy made before."""
        self.x, self._x_version, self._edits = copy, copy._version, True

    def state(self) -> Tensor:
        """The input x_n: kept, rebuilt, or rebuilt now from the nearest later one that is there.

        The last happens when the loss does not depend on later layers, or when they saved nothing.
        """
        missing: list[Node] = []
        node = self
        while node.x is None and node.rebuilt is None:
            missing.append(node)
            assert node.next is not None  # only a link lets an input go
            node = node.next
        node._check_input()
        state = node.rebuilt if node.x is None else node.x
        assert state is not None
        for node in reversed(missing):
            node._check_unchanged(lazily=True)
            state = node._approach(state, self.engine.evaluations)
        if missing:
            self.rebuilt = state
        return state

    def _replay_kept(self, x: Tensor) -> None:
        """The exact input is here: an ordinary checkpoint's replay, and a look at the drift."""
        leaf = x.detach().requires_grad_(self._requires_grad)
        y = self._evaluate(leaf.clone() if self._edits else leaf)
        self._check_repeats(leaf, y)
        self._compare(x, y)
        after = self.next
        if after is not None and after.rebuilt is not None and after.segment.updates:
            with torch.no_grad():
                self.engine.note_drift(after, _drift(after.rebuilt - y, after.segment.updates))
            after.segment.updates.clear()
        if after is not None:
            after.rebuilt = None

    def _replay_rebuilt(self) -> None:
        """x̃_n by the fixed point z ↦ x_{n+1} − Φ_n(z), its last evaluation with gradients."""
        after = self.next
        assert after is not None
        target = after.state()
        z = self._approach(target, self.engine.evaluations - 1)
        leaf = z.detach().requires_grad_(self._requires_grad)
        y = self._evaluate(leaf)
        self._check_repeats(leaf, y)
        with torch.no_grad():
            increment = y - z
            if self._place % -(-self.segment.length // MANY) == 0:
                self.segment.updates.append(_norms(increment))
            self.rebuilt = torch.sub(target, increment, out=increment)
        self.engine.note_rebuilt(self)
        after.rebuilt = None  # it has served; a second backward pass rebuilds it again

    @torch.no_grad()
    def _approach(self, target: Tensor, evaluations: int) -> Tensor:
        """z^j = x_{n+1} − Φ_n(z^{j−1}) after so many evaluations, from the scheme's own start."""
        z = target
        if self.start is not None:
            with self._circumstances.again():
                z = self.start(target)
        for _ in range(evaluations):
            z = target - (self._evaluate(z) - z)
        return z

    def _evaluate(self, z: Tensor) -> Tensor:
        with self._circumstances.again():
            y = state_of(self._apply(z))
        # Without a tensor in its output it is no residual block, and nobody asks for it again.
        return z.detach() if y is None else y.detach()

    def _apply(self, x: Tensor) -> Any:
        """The step's own function; blocks met inside it, a head for example, are part of it."""
        args, kwargs = self._arguments.at(x)
        outer, _inside.step = _inside.step, True
        try:
            return self.function(*args, **kwargs)
        finally:
            _inside.step = outer

    @torch.no_grad()
    def _compare(self, x: Tensor, y: Tensor) -> None:
        """From the exact input the forward pass's output must come again: some entries of it."""
        if self._entries is None or not y.is_floating_point():
            return
        entries = _some(y)
        update = entries - _some(x) if x.shape == y.shape else entries
        rounding = 1e3 * torch.finfo(y.dtype).eps * _norm(entries)
        allowed = 0.1 * self.engine.tolerance * _norm(update) + rounding
        self.engine.note_difference(self, _norm(entries - self._entries) - allowed)

    @torch.no_grad()
    def _check_repeats(self, x: Tensor, y: Tensor) -> None:
        """Once for each block and mode: another evaluation gives the same output.

        Raises:
            AdjointError: it does not, so that no replay is what the forward pass was.
        """
        modules = self.step.modules
        if modules.modes() in modules.proven or not y.is_floating_point() or y.numel() == 0:
            return
        gap = _norm(self._evaluate(x.detach().clone()) - y)
        update = _norm(y - x if y.shape == x.shape else y)  # it may turn out not to be residual
        rounding = 1e3 * torch.finfo(y.dtype).eps * _norm(y)
        if gap > 0.1 * self.engine.tolerance * update + rounding:
            raise AdjointError(
                f"{self.step.name}: gives another output when it is run again at the same input: "
                "it has a state that is no buffer, or random numbers that are not from torch's "
                "default generators. Leave it out of blocks="
            )
        modules.proven.add(modules.modes())

    def _check_unchanged(self, lazily: bool = False) -> None:
        """The replay must see what the forward pass saw.

        Raises:
            AdjointError: it would not.
        """
        parameters = self.step.modules.parameters()
        if lazily and self.step.modules.scattered():
            raise AdjointError(
                f"{self.step.name}: its state is needed although the loss does not depend on its "
                "output, and its parameters are sharded now; put the loss on later states too, or "
                "name the block as an anchor"
            )
        check_there(self.step.name, parameters)
        if len(parameters) != len(self._parameters) or any(
            p is not q or p._version != v
            for p, q, v in zip(parameters, self._parameters, self._versions, strict=False)
        ):
            raise AdjointError(
                f"{self.step.name}: its parameters were changed between forward and backward; "
                "states cannot be rebuilt with others. Run backward before the optimiser's step, "
                "or functional_call around both"
            )
        difference = self._circumstances.difference()
        if difference is not None:
            raise AdjointError(
                f"{self.step.name}: {difference} between forward and backward; states cannot be "
                "rebuilt as they were. Do it after backward, or leave the block out of blocks="
            )
        self._check_input()
        self._arguments.check(self.step.name)

    def _check_input(self) -> None:
        if self.x is not None and self.x._version != self._x_version:
            raise AdjointError(
                f"{self.step.name}: its input was changed in place after it was used; change a "
                "copy of it (x = x + …, not x += …)"
            )


def _some(x: Tensor) -> Tensor:
    """At most 64 entries, from all over it."""
    x = x.detach()
    x = x.view(-1) if x.is_contiguous() else x.flatten()
    return x[:: -(-len(x) // 64) or 1].clone()


def _norms(x: Tensor) -> Tensor:
    """‖x_i‖ per sample."""
    if x.dim() < 2:
        return _norm(x)[None]
    dtype = torch.float32 if x.itemsize < 4 else x.dtype
    if x.is_contiguous():
        x = x.flatten(1)  # twice as fast as over several dimensions
    return torch.linalg.vector_norm(x, dim=tuple(range(1, x.dim())), dtype=dtype)


def _drift(gap: Tensor, updates: list[Tensor]) -> Tensor:
    """Root mean square over samples of ‖x̃_n − x_n‖ / ‖x_{n+1} − x_n‖.

    The update is taken as no larger than the median of those since the last kept state (of some,
    evenly spread over a deep chain): one layer with a huge update, or one sample, would hide an
    error that all others feel. In an empty batch nothing can be off: 0.
    """
    if gap.numel() == 0:
        return torch.zeros((), device=gap.device)
    gaps, own = _norms(gap), updates[-1]
    usual = torch.stack(updates).median(dim=0).values
    ratios = torch.where(gaps == 0, 0.0, gaps / torch.minimum(own, usual))
    return ratios.square().mean().sqrt()


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dtype=torch.float32 if x.itemsize < 4 else x.dtype)
