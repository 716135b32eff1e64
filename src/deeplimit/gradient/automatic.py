"""bits="auto": a plan for the first batch, which is looked at again while the model trains."""

import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from deeplimit._anatomy.nested import each_leaf
from deeplimit.errors import describe_error
from deeplimit.gradient.accuracy import Measurement, RandomState, each
from deeplimit.gradient.codes import BITS
from deeplimit.gradient.engine import Engine
from deeplimit.gradient.meter import GROWN, DriftWarning
from deeplimit.gradient.planning import EXACTLY, MemoryPlan, Planner
from deeplimit.gradient.private_torch import (
    checkpoint_around,
    checkpoint_repeats,
    graph_task,
    is_batched,
    is_fully_sharded,
    is_stood_in_for,
    transform,
)
from deeplimit.gradient.replay_context import tensors_in, without_graph
from deeplimit.gradient.stand_ins import engines, switches

SOON, EVERY = 8, 256  # steps until the error is measured again, at least and at most
MARGIN = 0.5  # of the tolerance, for which it is planned while a model is trained
CHARGED = (
    "the costs of its layers, a stage cost's, are no part of its outputs; give use_adjoint the "
    "StageCost in place of the model"
)
REENTRANT = (
    "a reentrant checkpoint runs the model in the backward pass only; use_reentrant=False lets it "
    "be planned for"
)

_OPEN = (Tensor, int, float, str, type(None))  # leaves that hide nothing


def followed(
    plan: MemoryPlan | None, measure: Measurement, tolerance: float
) -> tuple[MemoryPlan, str]:
    """The plan, with its error as it is now, or a new one where there is none or it errs too much.

    With words on that, where it does.
    """
    words = ""
    if plan is not None:
        with each(measure.engines, **EXACTLY | {"ways": plan.ways}):
            error = measure.error(measure.gradient())
        if error <= tolerance:
            bound = max(e.meter.bound for e in measure.engines)
            return replace(plan, error=error, bound=bound), words
        words = (
            f"the gradient's relative error was {error:.2g} when it was measured again, beyond the "
            f"tolerance {tolerance:g}; another plan is made"
        )
    return Planner(measure, MARGIN * tolerance).plan(None, peaks=False), words


class Auto:
    """Plans for the first batch whose backward pass is over, before the next forward pass.

    Stands as hooks at the module that `use_adjoint` was given. What its outputs were given as
    gradients makes the loss: L(θ) = Σ ⟨y(θ), ∂L/∂y⟩ has the gradient of whatever came after them.
    The error is measured again after twice as many steps as the last time, EVERY at most, and where
    a bound has grown.
    """

    call: ClassVar[Callable[..., Any]]

    def __init__(self, model: nn.Module, engine: Engine):
        self.engine = engine
        self.plan: MemoryPlan | None = None
        self._seen: _Call | None = None
        self._start: RandomState | None = None  # of a forward pass under way that is to be seen
        self._steps, self._wait = 0, 1
        self._looked = False
        self._handles = [
            model.register_forward_pre_hook(self.before),
            model.register_forward_hook(self.after, with_kwargs=True),
        ]

    def __getstate__(self) -> dict[str, Any]:
        """A copy waits for a batch of its own."""
        return self.__dict__ | {"_seen": None, "_start": None, "_looked": False}

    def before(self, model: nn.Module, _: Any) -> None:
        """Before a forward pass of the whole module."""
        self._uncompiled()(self._begin, model)

    def after(self, _: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """After it."""
        return self._uncompiled()(self._note, args, kwargs, output)

    @staticmethod
    def _uncompiled() -> Callable[..., Any]:
        if not hasattr(Auto, "call"):
            Auto.call = torch.compiler.disable(_call)  # type: ignore[no-untyped-call, unused-ignore]
        return Auto.call

    def leave(self, model: nn.Module) -> None:
        """Where a model is switched back: the plan of one that it is a part of is made anew."""
        if self.before in model._forward_pre_hooks.values():  # noqa: SLF001
            self.remove()
        elif self.plan is not None:
            self.plan, self._seen, self._steps, self._wait = None, None, 0, 1
            self.engine.settings = replace(self.engine.settings, ways={})

    def remove(self) -> None:
        """Takes the hooks away."""
        for handle in self._handles:
            handle.remove()

    def _elsewhere(self, model: nn.Module) -> bool:
        """Tells whether a forward pass is none of a training step's own.

        It may be a head that is read by it, of a stage cost or in a checkpoint's recomputation.
        """
        engine = self.engine
        return (
            not torch.is_grad_enabled()
            or engine.measuring
            or engine.turns.replays is not None
            or graph_task() != -1
            or any(map(is_stood_in_for, model.modules()))
        )

    def _only_in_backward(self, model: nn.Module) -> bool:
        """Tells whether a forward pass runs in a backward pass, and no checkpoint repeats it."""
        return (
            graph_task() != -1
            and torch.is_grad_enabled()
            and not self.engine.measuring
            and self.engine.turns.replays is None
            and not (checkpoint_around() or checkpoint_repeats())
            and not any(map(is_stood_in_for, model.modules()))
        )

    def _begin(self, model: nn.Module) -> None:
        """Looks at the last pass; notes the random numbers of one to plan for, or to measure by."""
        self._start = None
        if self._elsewhere(model):
            if self.plan is None and self._seen is None and self._only_in_backward(model):
                self._give_up(REENTRANT)
            return
        self._look(model)
        grown = self.plan is not None and self.engine.meter.bound > GROWN * self.plan.bound
        if self.plan is None or self._steps >= self._wait or (grown and self._steps >= SOON):
            self._start = RandomState()

    def _note(self, args: Any, kwargs: Any, output: Any) -> Any:
        """Keeps such a pass in mind as soon as its outputs are given gradients.

        The caller gets others with the same numbers: their gradients are those of what the caller
        makes of them, and not of other outputs that the model itself makes of them.
        """
        start, self._start = self._start, None
        if start is None:
            return None
        inputs = [(x, x._version) for x in tensors_in((args, kwargs)) if not x.is_inference()]
        call = _Call(without_graph(args), without_graph(kwargs), inputs, start, {})

        def came(i: int, gradient: Tensor) -> None:
            if transform() is None and not is_batched(gradient):
                call.gradients[i] = gradient.detach()
                self._seen = call
                if not self._looked:  # however many backward passes there are: it will be
                    self.engine.meter.unplanned = 0

        places, seen, closed = count(), [], []

        def apart(y: Any) -> Any:
            i = next(places)
            if not (isinstance(y, Tensor) and y.requires_grad):
                closed.extend([] if isinstance(y, _OPEN) else [type(y).__name__])
                return y
            other: Any = _Apart.apply(y)  # type: ignore[no-untyped-call, unused-ignore]
            seen.append(other.register_hook(partial(came, i)))
            return other

        theirs = each_leaf(apart, output)
        if closed and not seen:
            self._give_up(f"it returns an object of type {closed[0]}, in which no tensor is seen")
        return theirs

    def _look(self, model: nn.Module) -> None:
        """Plans, or measures again, where the backward pass for that is over."""
        if any(switch.charged for switch in switches(model)):
            self._give_up(CHARGED)
            return
        self._steps += 1
        if self._seen is None:
            return
        engine, seen, self._seen, self._looked = self.engine, self._seen, None, True
        if not engines(model) or any(x._version != version for x, version in seen.inputs):
            return  # nothing is left to plan for, or another batch is there by now
        if any(map(_speaks, model.modules())):
            self._give_up("it speaks with other processes, which plan otherwise")
            return
        # What a checkpoint around the model records is the step's own.
        apart = saved_tensors_hooks(_same, _same) if checkpoint_around() else nullcontext()
        try:
            with apart:
                measure = Measurement(model, _of_gradients, seen, seen.start, **EXACTLY)
                if not measure.tells:
                    return  # such as a loss that overflowed, whose step a scaler leaves out
                plan, words = followed(self.plan, measure, engine.settings.tolerance)
        except Exception as error:  # whatever a second forward pass on a batch may lead to
            self._give_up(describe_error(error))
            return
        self._wait = 1 if words or self.plan is None else min(2 * self._wait, EVERY)
        self.plan, self._steps = plan, 0
        # The meter's own bounds warn of nothing here: errors are measured.
        engine.settings = replace(engine.settings, ways=plan.ways, measured=(0.0, math.inf))
        engine.meter.bound, engine.meter.unplanned = 0.0, -math.inf
        if words:
            engine.meter.report(engine.settings, words)

    def _give_up(self, why: str) -> None:
        engine = self.engine
        engine.settings = replace(
            engine.settings, ways={}, measured=None, bits=BITS[-1], evaluations=1
        )
        if engine.settings.on_drift != "ignore":
            what = f"bits='auto': no plan could be made ({why}); states are coded in 8 bits"
            warnings.warn(what, DriftWarning, stacklevel=2)
        self.remove()
        self._seen = None


class _Apart(torch.autograd.Function):
    """The identity. Unlike a view its output keeps its hooks where it is changed in place."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        """The same memory and count of changes, so that autograd sees these."""
        return x.detach()

    @staticmethod
    def backward(_: Any, *gradients: Any) -> Any:
        """As it comes."""
        return gradients


class _Call(NamedTuple):
    """A forward pass of the whole module, and what its outputs were given as gradients.

    Those belong to its outputs, hence to its random numbers.
    """

    args: Any
    kwargs: Any
    inputs: list[tuple[Tensor, int]]
    start: RandomState
    gradients: dict[int, Tensor]


def _of_gradients(model: nn.Module, call: _Call) -> Tensor:
    """Σ ⟨y, ∂L/∂y⟩ over the outputs."""
    outputs: list[Any] = []

    def seen(leaf: Any) -> Any:
        outputs.append(leaf)
        return leaf

    each_leaf(seen, model.forward(*call.args, **call.kwargs))
    return torch.stack([(outputs[i] * g).sum() for i, g in call.gradients.items()]).sum()


def _same(x: Tensor) -> Tensor:
    return x


def _speaks(module: nn.Module) -> bool:
    return is_fully_sharded(module) or isinstance(module, nn.SyncBatchNorm)


def _call(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)
