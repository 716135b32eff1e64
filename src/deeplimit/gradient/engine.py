"""What all switched blocks of a model share: settings, exits, and the drift of a backward pass."""

import math
import threading
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from deeplimit.errors import InputError
from deeplimit.gradient.arguments import Arguments, state_of
from deeplimit.gradient.backward_pass import BackwardPass
from deeplimit.gradient.errors import AdjointError, DriftWarning
from deeplimit.gradient.linking import Exits
from deeplimit.gradient.node import Node, Start, inside_step
from deeplimit.gradient.refusals import checkpoint_each
from deeplimit.gradient.residual import Operations, adds_input, has_kinks, is_compiled
from deeplimit.gradient.step import Step
from deeplimit.gradient.turns import Turns

OnDrift = Literal["warn", "raise", "ignore"]

# Gradient error ≤ SAFETY·drift, or KINKED·√drift where there are kinks, on every network tried:
# benchmarks/results/adjoint_accuracy.json.
SAFETY = 2.0
KINKED = 2.5


@dataclass
class Engine:
    """The settings of `use_adjoint`, and what is going on. A copy starts with nothing going on.

    Attributes:
        evaluations: e ≥ 1, evaluations of a step per rebuilt state.
        anchor_every: every so manyth state of a chain is kept; None: only a chain's first and last.
        anchors: names of blocks whose input is kept.
        tolerance: of the gradient's relative error.
        on_drift: what to do when it may be exceeded.
        paused: every block runs as if it were not switched.
        drift: the largest of the last backward pass; NaN if it ended before a kept state.
        drift_at: the block before which it was found.
        residual: how many blocks were found to be residual so far.
        linked: whether one was linked to another.
        kinked: whether one of them is not differentiable everywhere (ReLU, max-pooling).
        chains: where a list is put here, the names of the blocks of every new chain.
    """

    evaluations: int
    anchor_every: int | None
    tolerance: float
    on_drift: OnDrift
    anchors: frozenset[str] = frozenset()
    paused: bool = False
    warned: bool = False
    drift: float = 0.0
    drift_at: str = ""
    chains: list[list[str]] | None = None
    residual: int = 0
    linked: bool = False
    kinked: bool = False
    _learnt: bool = field(default=False, repr=False)  # whether a step had its first run lately
    _refused: list[str] = field(default_factory=list, repr=False)
    _exits: Exits = field(default_factory=Exits, repr=False)
    _passes: dict[int, BackwardPass] = field(default_factory=dict, repr=False)  # by thread
    turns: Turns = field(default_factory=Turns, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """Settings only: nodes and graphs belong to forward passes of the original."""
        idle: dict[str, Any] = {"chains": None, "paused": False, "drift": 0.0, "drift_at": ""}
        return self.__dict__ | idle | {"_exits": Exits(), "_passes": {}, "turns": Turns()}

    def keeps(self, step: Step, position: int) -> bool:
        """Whether the input of the step at this position of a chain is an anchor."""
        every = self.anchor_every
        named = step.name in self.anchors
        return position == 0 or named or step.sorts or bool(every and position % every == 0)

    # A compiled graph of what is done here would keep what it must not: it stays outside of graphs.
    @torch.compiler.disable(
        reason="blocks under deeplimit's adjoint run outside of a compiled graph; to have them "
        "compiled: block.forward = torch.compile(block.forward), then use_adjoint(model)"
    )
    def run(
        self,
        step: Step,
        function: Callable[..., Any],
        start: Start | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Calls the step's own function, so that its input need not be kept."""
        if self.paused or step.plain is not None or not torch.is_grad_enabled() or inside_step():
            return function(*args, **kwargs)
        if torch._C._functorch.peek_interpreter_stack() is not None:
            raise AdjointError(
                f"{step.name}: torch.func transforms do not go with the adjoint; call "
                "use_backprop(model) first"
            )
        arguments = Arguments(args, kwargs)
        x = arguments.state
        if x is None or not x.is_floating_point():
            return self._run_stateless(step, function, args, kwargs)
        if not self._goes(step, arguments, x):
            return function(*args, **kwargs)
        if not step.known:
            return self._first_run(step, function, start, arguments, x)
        return self._later_run(Node(self, step, function, start, arguments, x), arguments, x)

    def _run_stateless(
        self,
        step: Step,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Runs a step that cannot be rebuilt; the end of the backward pass tells, if all are so."""
        step.known, step.plain = True, "is given no state, floating-point numbers in a tensor"
        output = function(*args, **kwargs)
        y = state_of(output)
        if not step.inner and y is not None and y.requires_grad:
            self._refused.append(f"{step.name} {step.plain}")
            y.register_hook(self._look_back)
        return output

    def _look_back(self, _: Tensor) -> None:
        self.this_pass()

    def _goes(self, step: Step, arguments: Arguments, x: Tensor) -> bool:
        """Whether this call has a gradient that can be had by a replay."""
        if x.is_inference() or _forward_mode():
            return False
        if not (
            x.requires_grad
            or any(t.requires_grad for t in arguments.tensors())
            or step.modules.trained()
        ):
            return False
        return not arguments.filled_cache(step.layer)

    def _first_run(
        self,
        step: Step,
        function: Callable[..., Any],
        start: Start | None,
        arguments: Arguments,
        x: Tensor,
    ) -> Any:
        """Runs a step of which nothing is known yet, and learns whether it is residual."""
        self._learnt = True
        asks = not step.named
        given = x
        if asks and not x.requires_grad:
            # Or the graph would not show the way through. A leaf could not be edited in place.
            given = x.detach().requires_grad_().clone()
        version = given._version
        node, seen = None, Operations()
        # A compiled function would be given up for good where a mode looks at what it does.
        watched = not (is_compiled(function) or step.modules.compiled())
        with seen if watched else nullcontext():
            if step.inner:
                args, kwargs = arguments.at(given)
                output = function(*args, **kwargs)
            else:
                copy = given.detach().clone()  # in case the step edits its input
                node = Node(self, step, function, start, arguments, given)
                output = self._run(node, arguments, given)
                if given._version != version:
                    node.replace_input(copy)
        if given is not x and given._version != version:
            with torch.no_grad():
                x.copy_(given)  # as the step would have done to its own input
        y = state_of(output)
        step.known = True
        inner = [s.name for s in step.inner if s.known and s.plain is None]
        if inner:
            step.plain = f"holds residual blocks of its own ({inner[0]}, …)"
        elif y is None or y.shape != x.shape or y.dtype != x.dtype:
            was = "no tensor" if y is None else f"{tuple(y.shape)}, {y.dtype}"
            step.plain = f"turns a state {tuple(x.shape)}, {x.dtype} into {was}"
        elif given._version != version:
            step.plain = "changes its own input in place"
        elif asks and not adds_input(y, given):
            step.plain = "does not add its input to its output: not a residual block"
        elif node is not None:
            self._exits.leave(node, y)
        if step.plain is None:
            self.residual += 1
            step.sorts = seen.sorted
            kinks = node is None or seen.compared or (y is not None and has_kinks(y, given))
            self.kinked = self.kinked or kinks
        elif not step.inner:
            self._refused.append(f"{step.name} {step.plain}")
        return output

    def _later_run(self, node: Node, arguments: Arguments, x: Tensor) -> Any:
        """Runs a step that is known to be residual."""
        version = x._version
        output = self._run(node, arguments, x)
        if x._version != version:
            raise AdjointError(
                f"{node.step.name}: changed its own input in place, which it had not done before; "
                "leave it out of blocks="
            )
        y = state_of(output)
        if y is not None and y.grad_fn is not None and y.shape == x.shape and y.dtype == x.dtype:
            self._exits.leave(node, y)
        return output

    def _run(self, node: Node, arguments: Arguments, x: Tensor) -> Any:
        """Runs a step under the checkpoint whose input is rebuilt."""
        before = self._exits.enter(x)
        if before is not None:
            if before.alone and node.around not in (None, before.around) and before.around:
                raise checkpoint_each(node.step.name)
            node.follows(before)
        elif self.chains is not None:
            self.chains.append(node.chain)
        return checkpoint(
            node,
            use_reentrant=False,
            preserve_rng_state=False,  # the node does that, for every evaluation
            determinism_check="none",  # the node has its own
            early_stop=False,  # or there were no output to rebuild the input from
        )

    def this_pass(self) -> BackwardPass:
        """The backward pass that a replay belongs to; at its end it is looked at."""
        task, thread = torch._C._current_graph_task_id(), threading.get_ident()
        found = self._passes.get(thread)
        if found is None or task not in (-1, found.task):
            found = self._passes[thread] = BackwardPass(task)
            if task != -1:
                finish = partial(self._finish, found)
                torch.autograd.Variable._execution_engine.queue_callback(finish)
        return found

    def note_rebuilt(self, node: Node) -> None:
        """A state was rebuilt; the kept state that its segment ends at will tell how well."""
        self.this_pass().unmeasured[id(node.segment)] = node.step.name

    def note_drift(self, node: Node, drift: Tensor) -> None:
        """At a kept state: the drift of the node behind it."""
        found = self.this_pass()
        found.unmeasured.pop(id(node.segment), None)
        found.drifts.append((node.step.name, drift))

    def note_difference(self, node: Node, beyond: Tensor) -> None:
        """A replay from an exact input gave another output, if this is above 0."""
        self.this_pass().differences.append((node.step.name, beyond))

    def _finish(self, done: BackwardPass) -> None:
        """At the end of a backward pass: the largest drift, and what it means."""
        self._passes = {key: other for key, other in self._passes.items() if other is not done}
        self.drift, self.drift_at = 0.0, ""
        done.check_differences()
        self._report_useless()
        if done.unmeasured and not done.drifts:
            self._report_unmeasured(next(reversed(done.unmeasured.values())))
            return
        self.drift, self.drift_at = done.worst()
        if self.tolerance < self.error_bound(self.drift):
            self._report(self.drift, self.drift_at)

    def error_bound(self, drift: float) -> float:
        """What the gradient's relative error stayed below on all networks tried, at this drift.

        2·drift for blocks twice differentiable. Where a kink is met, units flip, as many as the
        drift says, and the gradient is off by their share's root: 2.5·√drift.
        """
        return max(SAFETY * drift, KINKED * math.sqrt(drift) if self.kinked else 0.0)

    def _report_useless(self) -> None:
        """Says once that nothing is saved, and why."""
        why = self._refused[0] if self._refused and not self.residual else None
        if self.residual > 1 and not self.linked and not self._learnt:
            why = "no block's input is the output of the block before it as it is"
        if why is not None:
            self._warn(f"no state will be rebuilt: {why}. layout(model) tells more")
        self._refused.clear()
        self._learnt = False

    def _report_unmeasured(self, name: str) -> None:
        self.drift = math.nan
        self._warn(
            f"the backward pass ended at {name}, before a kept state: how far the rebuilt states "
            "were off is not known. gradient_error measures it; anchors=[…] puts a kept state "
            "where the backward pass ends"
        )

    def _warn(self, message: str) -> None:
        """Once for each switch, unless the user wants to hear nothing."""
        if self.on_drift != "ignore" and not self.warned:
            self.warned = True
            warnings.warn(message, DriftWarning, stacklevel=2)

    def _report(self, drift: float, name: str) -> None:
        message = (
            f"drift {drift:.2g} at {name}: rebuilt states are off by that part of a layer's "
            f"update, so the gradient's relative error may be up to {self.error_bound(drift):.2g}, "
            f"beyond the tolerance {self.tolerance:g}. More evaluations "
            f"({self.evaluations + 1} instead of {self.evaluations}), anchor_every, or "
            "plan_anchors(model, loss_of, batch, tolerance) bring it down; gradient_error measures "
            "it"
        )
        if self.on_drift == "raise":
            raise AdjointError(message)
        self._warn(message)


def checked(evaluations: int, anchor_every: int | None, tolerance: float, on_drift: str) -> Engine:
    """An engine with these settings.

    Raises:
        InputError: one of them cannot be.
    """
    if isinstance(evaluations, bool) or not isinstance(evaluations, int) or evaluations < 1:
        raise InputError(f"evaluations is {evaluations}; expected a whole number ≥ 1")
    if anchor_every is not None and (not isinstance(anchor_every, int) or anchor_every < 1):
        raise InputError(f"anchor_every is {anchor_every}; expected a whole number ≥ 1, or None")
    if not (isinstance(tolerance, int | float) and tolerance > 0):
        raise InputError(f"the tolerance is {tolerance}; it must be a number > 0")
    if on_drift not in ("warn", "raise", "ignore"):
        raise InputError(f"on_drift is {on_drift!r}; expected 'warn', 'raise' or 'ignore'")
    return Engine(evaluations, anchor_every, tolerance, on_drift)  # type: ignore[arg-type]


def _forward_mode() -> bool:
    return torch.autograd.forward_ad._current_level >= 0
