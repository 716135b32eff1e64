"""The ways to a gradient, one after the other on one model and batch: what a step of each costs.

The memory at its peak and the time are taken in passes of their own.
"""

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from deeplimit.errors import InputError, describe_error
from deeplimit.gradient import drift, layout, plan_memory, use_adjoint, use_backprop
from deeplimit.gradient.accuracy import LossOf, Measurement, peak_memory, wait
from deeplimit.gradient.codes import BITS
from deeplimit.gradient.meter import KEPT, Way
from deeplimit.gradient.stand_ins import AdjointForward, Switch, engines, switches
from deeplimit.network import ResidualChain
from deeplimit.reading import one_line

METHODS = ("forward", "run_step")

Own = list[tuple[nn.Module, str, Any]]


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
        self.blocks = [s for s in switches(self.model) if linked & {t.name for t in s.steps}]
        self.adds = any(t.adds for s in self.blocks for t in s.steps if t.name in linked)
        _put(self.model, self.plain)

    def costs(self, methods: Sequence[MethodCost]) -> tuple[MethodCost, ...]:
        """Measures them, a row for each: the figures, or why there are none.

        Times are taken in turns, a step of each method after the other, so that whatever else the
        machine does meets all of them.
        """
        measured = [self._measured(method) for method in methods]
        self.tell("time")
        runs = [partial(_put, self.model, way) for _, way in measured if way is not None]
        try:
            times = iter(median_times(runs, self._step, self.model, self.device, self.steps))
        finally:
            _put(self.model, self.plain)
        return tuple(
            row if row.failed else replace(row, seconds=next(times)) for row, _ in measured
        )

    def _measured(self, row: MethodCost) -> tuple[MethodCost, Own | None]:
        """All but the time, and how the model is switched to this method again."""
        detail = f", e = {row.evaluations}" if row.evaluations else ""
        self.tell(row.method + (f", {row.bits} bits" if row.bits else detail))
        switched = row.method not in ("plain", "checkpointed")
        try:
            if row.method == "checkpointed":
                _checkpoint(self.blocks)
            elif switched:
                self._adjoint(Way(row.bits or 0, row.evaluations or 1))
            self._pass()  # warm; and blocks are told apart in an adjoint's first pass
            exact = self.reference
            if row.method == "planned":
                row = self._planned(row)
            row = replace(
                row,
                error=row.error if exact is None else exact.error(exact.gradient()),
                drift=self._drifts() if switched else (),
                memory=peak_memory(self._step, self.model, self.device),
                kept=self._kept(switched=switched),
            )
            return row, _own(self.model)
        except RuntimeError as failure:
            if row.method == "plain" and not isinstance(failure, torch.OutOfMemoryError):
                raise
            return replace(
                row, failed=f"{type(failure).__name__}: {one_line(failure).strip()}"
            ), None
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
        settings = {"bits": way.bits, "evaluations": way.evaluations}
        use_adjoint(self.model, **settings, tolerance=self.tolerance, on_drift="ignore")  # type: ignore[arg-type]

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

    def _kept(self, *, switched: bool) -> int:
        """Counts linked blocks whose inputs are kept: all, or first, last and anchors."""
        kept = {*layout(self.model).kept} if switched else set()
        return sum(
            not switched or n in (0, len(chain) - 1) or block in kept
            for chain in self.chains
            for n, block in enumerate(chain)
        )


def _checkpoint(blocks: list[Switch]) -> None:
    """Puts torch's non-reentrant checkpoint around each of the blocks that the adjoint found."""
    for switch in blocks:
        if isinstance(switch, AdjointForward):
            forward = switch.block.forward
            switch.block.forward = partial(checkpoint, forward, use_reentrant=False)
        else:
            step = partial(ResidualChain.run_step, switch.chain)
            run: Any = partial(checkpoint, step, use_reentrant=False)
            switch.chain.run_step = run  # type: ignore[method-assign]


def _own(model: nn.Module) -> Own:
    """Finds what stands in the modules' own attributes in place of their classes' methods."""
    return [
        (m, name, vars(m)[name]) for m in model.modules() for name in METHODS if name in vars(m)
    ]


def _put(model: nn.Module, own: Own) -> None:
    """Puts that back, and takes away what was not there."""
    for module, name, _ in _own(model):
        del vars(module)[name]
    for module, name, method in own:
        vars(module)[name] = method


def median_times(
    preparations: Sequence[Callable[[], None]],
    step: Callable[[], object],
    model: nn.Module,
    device: torch.device,
    repetitions: int,
) -> list[float]:
    """Times a step after each preparation, which is not timed, in turns; medians in seconds."""
    times: list[list[float]] = [[] for _ in preparations]
    for _ in range(repetitions):
        for mine, prepare in zip(times, preparations, strict=True):
            prepare()
            model.zero_grad(set_to_none=True)
            wait(device)
            began = time.perf_counter()
            step()
            wait(device)
            mine.append(time.perf_counter() - began)
    model.zero_grad(set_to_none=True)
    return [statistics.median(mine) for mine in times]
