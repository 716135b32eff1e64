"""The cost of every way to a gradient on one batch: memory, time, error and drift.

The memory at its peak and the time are taken in passes of their own.
"""

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deeplimit._anatomy.chain import with_steps
from deeplimit._anatomy.checks import check_count
from deeplimit.errors import InputError, describe_error
from deeplimit.gradient import drift, layout, plan_memory, use_adjoint, use_backprop
from deeplimit.gradient.accuracy import LossOf, Measurement, peak_memory, wait
from deeplimit.gradient.codes import BITS
from deeplimit.gradient.meter import KEPT, Way
from deeplimit.gradient.stand_ins import engines, switches
from deeplimit.reading import one_line

EVALUATIONS = (1, 2, 3)
SAME = 1.02  # memories this near count as equal: then the faster method is the better one
Own = dict[nn.Module, Any]


@dataclass(frozen=True)
class MethodCost:
    """One way to the gradient.

    Attributes:
        method: plain; checkpointed: torch's non-reentrant checkpoint per block; adjoint: rebuilt by
            a fixed point; coded; planned: what `plan_memory` makes of all these.
        evaluations: e, of the adjoint.
        anchors: the blocks whose input is kept beside the first and last of every chain.
        memory: bytes at the peak of a step beyond parameters and gradients.
        seconds: of a forward and backward pass, the median.
        error: ‖g − g*‖ / ‖g*‖ over all parameters, g* that of plain backpropagation.
        drift: the largest of each chain.
        kept: how many of the blocks' inputs are kept.
        failed: why there are no figures; empty if there are.
        bits: b, of coded states.
        plan: in words, how many states come back in which way.
    """

    method: str
    evaluations: int | None = None
    anchors: tuple[str, ...] = ()
    memory: int | None = None
    seconds: float | None = None
    error: float | None = None
    drift: tuple[float, ...] = ()
    kept: int | None = None
    failed: str = ""
    bits: int | None = None
    plan: str | None = None


@dataclass(frozen=True)
class LeftPlain:
    """A candidate that is not rebuilt, and why."""

    block: str
    why: str


@dataclass(frozen=True)
class GradientCost:
    """All methods on one model and batch.

    Attributes:
        model: as the user gave it.
        weights: where its parameters come from, in words.
        device, dtype: where and in what numbers.
        batch: what is in it, in words.
        loss: of the batch.
        parameters: how many.
        parameter_bytes: theirs; their gradients take as many again.
        tolerance: of the gradient's error, what was planned for.
        steps: timed per method.
        seed: of random numbers.
        chains: the blocks linked to each other, in order; their states can be coded or rebuilt.
        left_plain: candidates whose states cannot.
        methods: plain first; only that one where there are no chains.
    """

    model: str
    weights: str
    device: str
    dtype: str
    batch: str
    loss: float
    parameters: int
    parameter_bytes: int
    tolerance: float
    steps: int
    seed: int
    chains: tuple[tuple[str, ...], ...]
    left_plain: tuple[LeftPlain, ...]
    methods: tuple[MethodCost, ...]

    @property
    def plain(self) -> MethodCost:
        """Ordinary backpropagation, what the others are compared with."""
        return self.methods[0]

    @property
    def best(self) -> MethodCost | None:
        """The least memory at an error within the tolerance; of about equal ones the fastest.

        None where none needs less than plain backpropagation.
        """
        limit = math.inf if self.plain.memory is None else self.plain.memory / SAME
        linked = sum(map(len, self.chains))
        fit = {
            method: method.memory
            for method in self.methods[1:]
            if method.memory is not None
            and method.memory < limit
            and (method.error is not None and method.error <= self.tolerance)
            # A plan that keeps all states is a checkpoint again.
            and not (method.method == "planned" and method.kept == linked)
        }
        least = SAME * min(fit.values(), default=0)
        near = (method for method, memory in fit.items() if memory <= least)
        return min(near, key=lambda method: method.seconds or 0.0, default=None)


def measure_gradient_cost(
    model: nn.Module,
    loss_of: LossOf,
    batch: Any,
    *,
    name: str = "",
    weights: str = "",
    tolerance: float = 1e-2,
    steps: int = 5,
    seed: int = 0,
    tell: Callable[[str], object] = lambda _: None,
) -> GradientCost:
    """Measures memory, time, gradient error and drift of every method on one batch.

    Plain backpropagation, torch's checkpoint per block, states rebuilt with e = 1, 2, 3 where
    blocks add their input, coded in 2, 4 and 8 bits, and what `plan_memory` makes of these.
    Parameters, buffers, gradients and torch's random state are left as they were; a model that was
    switched is plain afterwards.

    >>> model = ResidualChain([TwoLayerResidual(4, 8) for _ in range(6)], step=0.1)
    >>> loss_of = lambda model, x: model(x).square().mean()
    >>> measure_gradient_cost(model, loss_of, torch.rand(2, 4), steps=1).plain.error
    0.0

    Args:
        model: any model, in the mode to be measured.
        loss_of: loss_of(model, batch) → a scalar.
        batch: whatever it takes, on the model's device.
        name: of the model, for the result.
        weights: where its parameters come from, for the result.
        tolerance: of the gradient's relative error, for the plan.
        steps: how many are timed for each method.
        seed: of dropout and the like.
        tell: is told before each method what comes.

    Raises:
        InputError: a number out of range, a model without candidates for blocks, or one that does
            not run on the batch.
    """
    check_count("steps", steps)
    buffers = [(b, b.clone()) for b in model.buffers()]
    gradients = [(p, p.grad) for p in model.parameters()]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            study = Methods(model, loss_of, batch, tolerance, steps, tell)
            rows = [MethodCost("plain")]
            if study.blocks:
                rows.append(MethodCost("checkpointed"))
                rows += [MethodCost("adjoint", e) for e in EVALUATIONS if study.adds]
                rows += [MethodCost("coded", 1, bits=b) for b in BITS]
                rows.append(MethodCost("planned"))
            methods = study.costs(rows)
        finally:
            use_backprop(model)
            with torch.no_grad():
                for buffer, copy in buffers:
                    buffer.copy_(copy)
            for p, gradient in gradients:
                p.grad = gradient
    parameters = list(model.parameters())
    return GradientCost(
        model=name,
        weights=weights,
        device=str(study.device),
        dtype=str(parameters[0].dtype).removeprefix("torch."),
        batch=_described(batch),
        loss=study.loss,
        parameters=sum(p.numel() for p in parameters),
        parameter_bytes=sum(p.numel() * p.itemsize for p in parameters),
        tolerance=tolerance,
        steps=steps,
        seed=seed,
        chains=study.chains,
        left_plain=tuple(LeftPlain(*entry) for entry in study.left_plain.items()),
        methods=methods,
    )


@dataclass
class Methods:
    """One model and batch, and what the first passes find out about them.

    Attributes:
        reference: the exact gradient; None where plain backpropagation runs out of memory.
        loss: of the batch; NaN then.
        chains: names of the blocks linked to each other.
        left_plain: candidates that are not rebuilt, and why.
        blocks: where the adjoint stands in; none if no state can be coded or rebuilt.
        adds: whether some block adds its input, so that states can be rebuilt.
    """

    model: nn.Module
    loss_of: LossOf
    batch: Any
    tolerance: float
    steps: int
    tell: Callable[[str], object]

    def __post_init__(self) -> None:
        self.device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        use_backprop(self.model)
        self.plain = _own(self.model)
        self._adjoint(Way(BITS[-1], 1))
        self.tell("the exact gradient")
        self.reference = self._reference()
        self.loss = math.nan if self.reference is None else self.reference.loss
        (engine,) = engines(self.model)
        engine.chains = []
        self._pass()
        found = layout(self.model)
        self.chains = tuple(map(tuple, engine.chains))
        self.left_plain = found.plain
        linked = {name for chain in self.chains for name in chain if len(chain) > 1}
        self.blocks = [s for s in switches(self.model) if s.step.name in linked]
        self.adds = any(s.step.adds for s in self.blocks)
        _put(self.model, self.plain)

    def costs(self, methods: Sequence[MethodCost]) -> tuple[MethodCost, ...]:
        """Measures them, a row for each: the figures, or why there are none.

        Times are taken in turns, a step of each method after the other, so that whatever else the
        machine does meets all of them.
        """
        measured = [self._measured(method) for method in methods]
        self.tell("time")
        ways = [way for _, way in measured if way is not None]
        times: list[list[float]] = [[] for _ in ways]
        try:
            for _ in range(self.steps):
                for mine, way in zip(times, ways, strict=True):
                    _put(self.model, way)
                    self.model.zero_grad(set_to_none=True)
                    wait(self.device)
                    began = time.perf_counter()
                    self._step()
                    wait(self.device)
                    mine.append(time.perf_counter() - began)
        finally:
            self.model.zero_grad(set_to_none=True)
            _put(self.model, self.plain)
        medians = map(statistics.median, times)
        return tuple(
            row if way is None else replace(row, seconds=next(medians)) for row, way in measured
        )

    def _measured(self, row: MethodCost) -> tuple[MethodCost, Own | None]:
        """All but the time, and how the model is switched to this method again."""
        detail = f", e = {row.evaluations}" if row.evaluations else ""
        self.tell(row.method + (f", {row.bits} bits" if row.bits else detail))
        switched = row.method not in ("plain", "checkpointed")
        try:
            if row.method == "checkpointed":
                for one in self.blocks:  # where the adjoint stood in: torch's, non-reentrant
                    run = partial(checkpoint, one.own, use_reentrant=False)
                    vars(one.block)["forward"] = run
            elif switched:
                self._adjoint(Way(row.bits or 0, row.evaluations or 1))
            self._pass()  # warm; and blocks are told apart in an adjoint's first pass
            if row.method == "planned":
                row = self._planned(row)
            if (exact := self.reference) is not None:
                row = replace(row, error=exact.error(exact.gradient()))
            row = replace(
                row,
                drift=self._drifts() if switched else (),
                memory=peak_memory(self._step, self.model, self.device),
                kept=self._kept() if switched else sum(map(len, self.chains)),
            )
            return row, _own(self.model)
        except RuntimeError as failure:
            if row.method == "plain" and not isinstance(failure, torch.OutOfMemoryError):
                raise
            failed = f"{type(failure).__name__}: {one_line(failure).strip()}"
            return replace(row, failed=failed), None
        finally:
            _put(self.model, self.plain)

    def _planned(self, row: MethodCost) -> MethodCost:
        """Switches the model to a plan within the tolerance."""
        plan = plan_memory(self.model, self.loss_of, self.batch, self.tolerance)
        use_adjoint(self.model, plan=plan, on_drift="ignore")
        self._pass()
        anchors = tuple(name for name, way in plan.ways.items() if way == KEPT)
        counts = Counter(map(str, plan.ways.values())).most_common()
        words = "; ".join(f"{count} {way}" for way, count in counts)
        return replace(row, anchors=anchors, plan=words, error=plan.error)

    def _adjoint(self, way: Way) -> None:
        how = {"bits": way.bits, "evaluations": way.evaluations, "tolerance": self.tolerance}
        use_adjoint(self.model, **how, on_drift="ignore")  # type: ignore[arg-type]

    def _reference(self) -> Measurement | None:
        """The exact gradient; None where plain backpropagation runs out of memory."""
        try:
            return Measurement(self.model, self.loss_of, self.batch)
        except torch.OutOfMemoryError:
            return None
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"the model does not run on its batch: {describe_error(error)}"
            ) from error

    def _step(self) -> None:
        torch.autograd.backward(self.loss_of(self.model, self.batch))

    def _pass(self) -> None:
        """One backward pass that leaves nothing behind."""
        if self.reference is not None:
            self.reference.gradient()
        else:
            self._step()
            self.model.zero_grad(set_to_none=True)

    def _drifts(self) -> tuple[float, ...]:
        """Of each chain by itself: in a pass in which all states of the others are kept."""
        (engine,) = engines(self.model)
        settings, drifts = engine.settings, []
        names = {name for chain in self.chains for name in chain}
        for chain in self.chains:
            if len(chain) > 2:  # of fewer, all states are kept
                others = dict.fromkeys(names - {*chain}, KEPT)
                engine.settings = replace(settings, ways={**settings.ways, **others})
                self._pass()
            drifts.append(drift(self.model) if len(chain) > 2 else 0.0)
        engine.settings = settings
        return tuple(drifts)

    def _kept(self) -> int:
        """Counts linked blocks whose inputs are kept: first, last and anchors."""
        kept = {*layout(self.model).kept}
        return sum(
            n in (0, len(chain) - 1) or block in kept
            for chain in self.chains
            for n, block in enumerate(chain)
        )


def _own(model: nn.Module) -> Own:
    """Finds what stands in the modules' own attributes in place of their classes' forward."""
    return {m: vars(m)["forward"] for m in with_steps(model) if "forward" in vars(m)}


def _put(model: nn.Module, own: Own) -> None:
    """Puts that back, and takes away what was not there."""
    for module in _own(model):
        del vars(module)["forward"]
    for module, forward in own.items():
        vars(module)["forward"] = forward


def _described(batch: Any) -> str:
    """Names and shapes of what is in a batch."""
    parts = batch if isinstance(batch, tuple | list) else (batch,)
    named = batch.items() if isinstance(batch, Mapping) else [("", part) for part in parts]
    return ", ".join(
        f"{name} {'×'.join(map(str, part.shape)) or 'scalar'}".strip()
        for name, part in named
        if isinstance(part, Tensor)
    )
