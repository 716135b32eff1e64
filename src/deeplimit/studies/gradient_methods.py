"""The ways to a gradient, one after the other on one model and batch: what a step of each costs.

The memory at its peak and the time are taken in passes of their own.
"""

import gc
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from deeplimit.errors import InputError, describe_error
from deeplimit.gradient import drift, layout, plan_anchors, use_adjoint, use_backprop
from deeplimit.gradient.accuracy import LossOf, Measurement
from deeplimit.gradient.stand_ins import AdjointForward, Switch, engines, switches
from deeplimit.network import ResidualChain
from deeplimit.reading import one_line

METHODS = ("forward", "run_step")

Own = list[tuple[nn.Module, str, Any]]


@dataclass(frozen=True)
class MethodCost:
    """One way to the gradient.

    Attributes:
        method: plain; checkpointed: torch's non-reentrant checkpoint per block; adjoint; planned:
            the adjoint with the anchors of `plan_anchors`.
        evaluations: e, of the adjoint.
        anchors: the blocks whose input is kept beside the first and last of every chain.
        memory: bytes at the peak of a step beyond parameters and gradients.
        seconds: of a forward and backward pass, the median.
        error: ‖g − g*‖ / ‖g*‖ over all parameters, g* that of plain backpropagation.
        drift: the largest of each chain.
        kept: how many of the blocks' inputs are kept.
        failed: why there are no figures; empty if there are.
    """

    method: str
    evaluations: int | None
    anchors: tuple[str, ...]
    memory: int | None = None
    seconds: float | None = None
    error: float | None = None
    drift: tuple[float, ...] = ()
    kept: int | None = None
    failed: str = ""


@dataclass
class Methods:
    """One model and batch, and what the first passes find out about them.

    Attributes:
        reference: the exact gradient; None where plain backpropagation runs out of memory.
        loss: of the batch; NaN then.
        chains: names of the blocks linked to each other.
        left_plain: candidates that are not rebuilt, and why.
        blocks: where the adjoint stands in; none if no state can be rebuilt.
    """

    model: nn.Module
    loss_of: LossOf
    batch: Any
    evaluations: int
    tolerance: float
    steps: int
    tell: Callable[[str], object]

    def __post_init__(self) -> None:
        self.device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        use_backprop(self.model)
        self.plain = _own(self.model)
        self._adjoint(self.evaluations)
        self.tell("the exact gradient")
        self.reference = self._reference()
        self.loss = math.nan if self.reference is None else self.reference.loss
        (engine,) = engines(self.model)
        engine.chains = []
        self._pass()
        found = layout(self.model)
        self.chains = tuple(map(tuple, engine.chains))
        self.left_plain, rebuilt = found.plain, set(found.rebuilt)
        self.blocks = [s for s in switches(self.model) if rebuilt & {t.name for t in s.steps}]
        _put(self.model, self.plain)

    def costs(self, methods: Sequence[tuple[str, int | None]]) -> tuple[MethodCost, ...]:
        """Measures (method, evaluations), a row for each: the figures, or why there are none.

        Times are taken in turns, a step of each method after the other, so that whatever else the
        machine does meets all of them.
        """
        measured = [self._measured(*method) for method in methods]
        self.tell("time")
        runs = [partial(_put, self.model, way) for _, way in measured if way is not None]
        try:
            times = iter(median_times(runs, self._step, self.model, self.device, self.steps))
        finally:
            _put(self.model, self.plain)
        return tuple(
            row if row.failed else replace(row, seconds=next(times)) for row, _ in measured
        )

    def _measured(self, method: str, evaluations: int | None) -> tuple[MethodCost, Own | None]:
        """All but the time, and how the model is switched to this method again."""
        self.tell(method if evaluations is None else f"{method}, e = {evaluations}")
        row = MethodCost(method, evaluations, ())
        try:
            if method == "checkpointed":
                _checkpoint(self.blocks)
            elif evaluations is not None:
                self._adjoint(evaluations)
            self._pass()  # warm; and blocks are told apart in an adjoint's first pass
            exact = self.reference
            if method == "planned":
                if exact is None:
                    raise torch.OutOfMemoryError("planning needs plain backpropagation once")
                plan = plan_anchors(self.model, self.loss_of, self.batch, self.tolerance)
                self._keep(plan.anchors)
                row = replace(row, anchors=plan.anchors)
            row = replace(
                row,
                error=None if exact is None else exact.error(exact.gradient()),
                drift=() if evaluations is None else self._drifts(row.anchors),
                memory=peak_memory(self._step, self.model, self.device),
                kept=self._kept(None if evaluations is None else row.anchors),
            )
            return row, _own(self.model)
        except RuntimeError as failure:
            if method == "plain" and not isinstance(failure, torch.OutOfMemoryError):
                raise
            failed = f"{type(failure).__name__}: {one_line(failure).strip()}"
            return MethodCost(method, evaluations, row.anchors, failed=failed), None
        finally:
            _put(self.model, self.plain)

    def _adjoint(self, evaluations: int) -> None:
        use_adjoint(
            self.model, evaluations=evaluations, tolerance=self.tolerance, on_drift="ignore"
        )

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

    def _keep(self, anchors: Iterable[str]) -> None:
        (engine,) = engines(self.model)
        engine.settings = replace(engine.settings, anchors=frozenset(anchors))

    def _drifts(self, anchors: tuple[str, ...]) -> tuple[float, ...]:
        """Of each chain by itself: in a pass in which all states of the others are kept."""
        names, drifts = {name for chain in self.chains for name in chain}, []
        for chain in self.chains:
            if len(chain) > 2:  # of fewer, all states are kept
                self._keep({*anchors} | names - {*chain})
                self._pass()
            drifts.append(drift(self.model) if len(chain) > 2 else 0.0)
        self._keep(anchors)
        return tuple(drifts)

    def _kept(self, anchors: tuple[str, ...] | None) -> int:
        """Counts linked blocks whose inputs are kept: all (None), or first, last and anchors."""
        return sum(
            anchors is None or n in (0, len(chain) - 1) or block in anchors
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


def peak_memory(step: Callable[[], object], model: nn.Module, device: torch.device) -> int:
    """Counts the bytes at a step's peak beyond what was there before, by the allocator's account.

    Parameters and their gradients are there before: what is measured is states, what the layers
    save, and working space, one parameter's new gradient at a time included.
    """
    before = [(p, p.grad) for p in model.parameters()]
    collects = gc.isenabled()
    gc.disable()  # or what was left lying about before might be released in the step
    try:
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        if device.type != "cuda":
            return _cpu_peak(step)
        _wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        there = torch.cuda.memory_allocated(device)
        step()
        _wait(device)
        return torch.cuda.max_memory_allocated(device) - there
    finally:
        for p, gradient in before:
            p.grad = gradient
        if collects:
            gc.enable()


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
            _wait(device)
            began = time.perf_counter()
            step()
            _wait(device)
            mine.append(time.perf_counter() - began)
    model.zero_grad(set_to_none=True)
    return [statistics.median(mine) for mine in times]


def _cpu_peak(step: Callable[[], object]) -> int:
    """From the profiler's record of every allocation and release.

    glibc's own figures say little: freed blocks below its mmap threshold stay with the process.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it tells of its start and stop on stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    held = peak = 0
    profiler: Any = recorded.profiler
    for event in profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
