"""How exact the rebuilt states and the gradient are: measured, not hoped for."""

import gc
import math
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from deeplimit.errors import InputError
from deeplimit.gradient.engine import Engine
from deeplimit.gradient.stand_ins import engines, switches

SMALL = 0.01

LossOf = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class GradientAccuracy:
    """The gradient of one batch by the adjoint, against exact backpropagation.

    Attributes:
        error: ‖g − g*‖ / ‖g*‖ over all parameters that have a gradient.
        worst: the parameter with the largest relative error of its own; one whose gradient is below
            1 % of the whole is measured against that (the bias of an attention's keys has none).
        worst_error: that error.
        drift: the largest drift of the backward pass, as `drift` gives it.
        drift_at: the block before which it was found; empty if none was.
        loss: the loss of the batch.
    """

    error: float
    worst: str
    worst_error: float
    drift: float
    drift_at: str
    loss: float


def drift(model: nn.Module) -> float:
    """The largest drift ‖x̃_n − x_n‖ / ‖x_{n+1} − x_n‖ in the last backward pass.

    It is measured wherever a kept state can be compared with a rebuilt one: at each anchor and at
    the start of each chain. 0 if nothing was rebuilt, or of an empty batch;
    NaN if the pass ended before a kept state.

    Raises:
        InputError: the model is not switched by `use_adjoint`.
    """
    found = [e.meter.drift for e in engines(model)]
    return math.nan if any(math.isnan(d) for d in found) else max(found)


def gradient_error(model: nn.Module, loss_of: LossOf, batch: Any) -> GradientAccuracy:
    """The gradient's relative error on one batch, against backpropagation through the same model.

    Both passes see the same random numbers; parameters, gradients (`.grad`), buffers and random
    states are left as they were. Costs the memory of ordinary backpropagation.

    Args:
        model: a model switched by `use_adjoint`.
        loss_of: loss_of(model, batch) → a scalar.
        batch: whatever it takes.

    Raises:
        InputError: the model is not switched, or no parameter has a gradient.
    """
    measure = Measurement(model, loss_of, batch)
    return measure.accuracy(measure.gradient())


class RandomState:
    """Of the generators that a forward pass may draw from unasked: torch's, Python's, numpy's."""

    def __init__(self) -> None:
        self._torch = torch.get_rng_state()
        cuda: Any = torch.cuda
        self._cuda = cuda.get_rng_state_all() if cuda.is_initialized() else []
        self._python, self._numpy = random.getstate(), np.random.get_state()

    def put(self) -> None:
        """Puts it back."""
        torch.set_rng_state(self._torch)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)
        random.setstate(self._python)
        np.random.set_state(self._numpy)


class Measurement:
    """One batch, its exact gradient, and as many others as are asked for.

    The exact one is by plain backpropagation, or with other settings that keep every state. All
    draw the same random numbers: those of `start`, if it is given.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_of: LossOf,
        batch: Any,
        start: RandomState | None = None,
        **exactly: Any,
    ):
        self.model, self.engines = model, engines(model)
        self._loss_of, self._batch, self._start = loss_of, batch, start
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise InputError("no parameter of the model requires a gradient")
        with each(self.engines, **(exactly or {"paused": True})):
            self.exact = self.gradient()
        self.scale = _norm(self.exact.values())
        if any(not switch.step.known for switch in switches(model)):
            self.gradient()  # the first run is where residual blocks are told from others

    @property
    def tells(self) -> bool:
        """Whether errors relative to the exact gradient mean anything: it is finite and not 0."""
        return 0 < self.scale < math.inf

    def gradient(self) -> dict[str, Tensor]:
        """∇θ as the model is switched now; parameters that the loss does not reach are left out."""
        with self._undisturbed():
            loss = self._loss_of(self.model, self._batch)
            tensor = isinstance(loss, Tensor)
            if not tensor or loss.dim() != 0 or not loss.requires_grad:
                gave = f"a tensor of shape {tuple(loss.shape)}" if tensor else type(loss).__name__
                raise InputError(
                    f"loss_of gave {gave}"
                    f"{' without a gradient' if tensor and not loss.requires_grad else ''}; "
                    "expected a scalar that backward() can start from"
                )
            self.loss = float(loss.detach())
            found = torch.autograd.grad(loss, list(self.parameters.values()), allow_unused=True)
        named = zip(self.parameters, found, strict=True)
        return {name: g for name, g in named if g is not None}

    def peak(self) -> int:
        """Bytes at the peak of a step as the model is switched now, as `peak_memory` has them."""
        device = next(iter(self.parameters.values())).device
        with self._undisturbed():
            return peak_memory(self._step, self.model, device)

    def _step(self) -> None:
        torch.autograd.backward(self._loss_of(self.model, self._batch))

    def error(self, gradient: dict[str, Tensor]) -> float:
        """‖g − g*‖ / ‖g*‖ over all parameters."""
        gap = _norm(self._gaps(gradient).values())
        return gap / self.scale if self.scale else (0.0 if gap == 0 else math.inf)

    def accuracy(self, gradient: dict[str, Tensor]) -> GradientAccuracy:
        """All that is said about one gradient."""
        own = {
            name: float(gap.norm() / self.exact[name].norm().clamp(min=SMALL * self.scale or 1e-30))
            for name, gap in self._gaps(gradient).items()
        }
        worst = max(own, key=lambda name: own[name])
        at = max((e.meter for e in self.engines), key=lambda meter: meter.drift)
        return GradientAccuracy(
            self.error(gradient), worst, own[worst], drift(self.model), at.drift_at, self.loss
        )

    def _gaps(self, gradient: dict[str, Tensor]) -> dict[str, Tensor]:
        if gradient.keys() != self.exact.keys():
            odd = next(iter(gradient.keys() ^ self.exact.keys()))
            raise InputError(
                f"{odd} has a gradient in one of two passes only; is the model random?"
            )
        return {name: gradient[name] - self.exact[name] for name in self.exact}

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """The same random numbers each time; buffers and generators as before at the end."""
        buffers = [  # a block may put another tensor in the place of one
            (module, name, b, b.clone(), b._version)
            for module in self.model.modules()
            for name, b in module._buffers.items()
            if b is not None
        ]
        values = (v for module in self.model.modules() for v in vars(module).values())
        generators = [(g, g.get_state()) for g in values if isinstance(g, torch.Generator)]
        before = RandomState()
        with each(self.engines, on_drift="ignore"), torch.enable_grad():
            try:
                self._start_anew()
                yield
            finally:
                before.put()
                for generator, state in generators:
                    generator.set_state(state)
                with torch.no_grad():
                    for module, name, buffer, copy, version in buffers:
                        module._buffers[name] = buffer
                        # Else graphs of others still read it; batch norms move without a version.
                        if buffer._version != version or not torch.equal(buffer, copy):
                            buffer.copy_(copy)

    def _start_anew(self) -> None:
        """Sets all random numbers to what they are in each pass."""
        if self._start is not None:
            self._start.put()
            return
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)


@contextmanager
def each(
    engines: list[Engine],
    *,
    paused: bool = False,
    chains: list[list[str]] | None = None,
    **settings: Any,
) -> Iterator[None]:
    """All engines with other settings for a while."""
    before = [(e, e.measuring, e.paused, e.chains, e.settings) for e in engines]
    for e in engines:
        e.measuring = True
        e.paused = paused or e.paused
        e.chains = e.chains if chains is None else chains
        e.settings = replace(e.settings, **settings)
    try:
        yield
    finally:
        for e, e.measuring, e.paused, e.chains, e.settings in before:  # noqa: B007
            pass


def _norm(tensors: Any) -> float:
    squares = [t.detach().double().square().sum() for t in tensors]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0


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
        wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        there = torch.cuda.memory_allocated(device)
        step()
        wait(device)
        return torch.cuda.max_memory_allocated(device) - there
    finally:
        for p, gradient in before:
            p.grad = gradient
        if collects:
            gc.enable()


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


def wait(device: torch.device) -> None:
    """For what was asked of it to be done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
