"""How exact the rebuilt states and the gradient are: measured, not hoped for."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from deeplimit.errors import InputError
from deeplimit.gradient.engine import Engine
from deeplimit.gradient.stand_ins import engines, switches

SMALL = 0.01

LossOf = Callable[[Any, Any], Tensor]
Chain = list[str]
Costs = dict[tuple[int, int], float]


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


class Measurement:
    """One batch, its exact gradient, and as many others as are asked for."""

    def __init__(self, model: nn.Module, loss_of: LossOf, batch: Any):
        self.model, self.engines = model, engines(model)
        self._loss_of, self._batch = loss_of, batch
        self._random = torch.get_rng_state()
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise InputError("no parameter of the model requires a gradient")
        with _each(self.engines, paused=True):
            self.exact = self.gradient()
        self.scale = _norm(self.exact.values())
        if any(not step.known for switch in switches(model) for step in switch.steps):
            self.gradient()  # the first run is where residual blocks are told from others

    def gradient(self) -> dict[str, Tensor]:
        """∇θ as the model is switched now; parameters that the loss does not reach are left out."""
        with self._undisturbed(), _each(self.engines, on_drift="ignore"):
            loss = self._loss_of(self.model, self._batch)
            if loss.dim() != 0 or not loss.requires_grad:
                raise InputError(
                    f"loss_of gave a tensor of shape {tuple(loss.shape)}"
                    f"{'' if loss.requires_grad else ' without a gradient'}; expected a scalar "
                    "that backward() can start from"
                )
            self.loss = float(loss.detach())
            found = torch.autograd.grad(loss, list(self.parameters.values()), allow_unused=True)
        named = zip(self.parameters, found, strict=True)
        return {name: g for name, g in named if g is not None}

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
            (module, name, b, b.clone())
            for module in self.model.modules()
            for name, b in module._buffers.items()
            if b is not None
        ]
        values = (v for module in self.model.modules() for v in vars(module).values())
        generators = [(g, g.get_state()) for g in values if isinstance(g, torch.Generator)]
        with torch.random.fork_rng(), torch.enable_grad():
            torch.set_rng_state(self._random)
            if torch.cuda.is_available():
                torch.cuda.manual_seed_all(0)
            try:
                yield
            finally:
                for generator, state in generators:
                    generator.set_state(state)
                with torch.no_grad():
                    for module, name, buffer, copy in buffers:
                        module._buffers[name] = buffer
                        buffer.copy_(copy)


@dataclass(frozen=True)
class AnchorPlan:
    """Which blocks' inputs to keep: `use_adjoint(model, anchors=plan.anchors, …)`.

    Attributes:
        anchors: names of blocks, in order.
        error: the gradient's relative error with them, measured on the batch.
        error_without: the same without any.
        tolerance: what the error was to stay under.
        candidates: how many inputs could be kept beyond those that are anyway.
    """

    anchors: tuple[str, ...]
    error: float
    error_without: float
    tolerance: float
    candidates: int

    def __str__(self) -> str:
        """One line: how many, at what error, and what it means if it is all of them."""
        text = (
            f"{len(self.anchors)} of {self.candidates} states kept: gradient error {self.error:.2g}"
            f" (without: {self.error_without:.2g}; tolerance {self.tolerance:g})"
        )
        if self.candidates and len(self.anchors) == self.candidates:
            text += "; every state is needed, which is ordinary checkpointing: these blocks cannot"
            text += " be inverted that well"
        return text


def plan_anchors(
    model: nn.Module, loss_of: LossOf, batch: Any, tolerance: float | None = None
) -> AnchorPlan:
    """The fewest anchors with which the gradient's error on a batch is within the tolerance.

    Backward passes that rebuild from each state in turn give the error that every segment between
    two anchors would cost; the plan with the least total for 0, 1, 2, … anchors is found by dynamic
    programming (squared errors of different layers add up), and the first whose *measured* error is
    within the tolerance is taken. As many backward passes as there are states, and a few more.
    The model is left as it was; switch it with `use_adjoint(model, anchors=plan.anchors, …)`.

    Args:
        model: a model switched by `use_adjoint`; its evaluations are those of the plan.
        loss_of: loss_of(model, batch) → a scalar.
        batch: whatever it takes.
        tolerance: of the gradient's relative error; the model's own by default.

    Raises:
        InputError: the model is not switched, or the tolerance is not a number > 0.
    """
    measure = Measurement(model, loss_of, batch)
    limit = min(e.settings.tolerance for e in measure.engines) if tolerance is None else tolerance
    if not limit > 0:
        raise InputError(f"the tolerance is {limit}; it must be a number > 0")
    return _Planner(measure, limit).plan()


class _Planner:
    def __init__(self, measure: Measurement, tolerance: float):
        self.measure, self.tolerance = measure, tolerance
        recorded: list[Chain] = []
        with _each(measure.engines, chains=recorded):
            self.error_without = self._measured(())
        self.chains = [chain for chain in recorded if len(chain) > 2]
        owners = dict(measure.model.named_parameters())
        self.own = {
            name: [p for p in owners if p == name or p.startswith(name + ".")]
            for chain in self.chains
            for name in chain
        }

    def plan(self) -> AnchorPlan:
        candidates = sum(len(chain) - 2 for chain in self.chains)
        anchors: tuple[str, ...] = ()
        error = self.error_without
        if not error <= self.tolerance:
            options = self._options()
            for count in range(self._first_guess(options), candidates + 1):
                anchors = options[count][1]
                error = self._measured(anchors)
                if error <= self.tolerance:
                    break
            anchors, error = self._fewer(anchors, error)
        return AnchorPlan(anchors, error, self.error_without, self.tolerance, candidates)

    def _measured(self, anchors: tuple[str, ...]) -> float:
        with _each(self.measure.engines, anchors=frozenset(anchors), anchor_every=None):
            error = self.measure.error(self.measure.gradient())
        return math.inf if math.isnan(error) else error

    def _first_guess(self, options: list[tuple[float, tuple[str, ...]]]) -> int:
        """The smallest number of anchors that the segments' costs do not rule out by far."""
        limit = (2 * self.tolerance) ** 2
        return next((k for k, (cost, _) in enumerate(options) if cost <= limit), len(options) - 1)

    def _fewer(self, anchors: tuple[str, ...], error: float) -> tuple[tuple[str, ...], float]:
        """Drops anchors that turn out not to be needed, one by one."""
        for name in anchors:
            rest = tuple(other for other in anchors if other != name)
            without = self._measured(rest)
            if without <= self.tolerance:
                anchors, error = rest, without
        return anchors, error

    def _options(self) -> list[tuple[float, tuple[str, ...]]]:
        """For each number of anchors the least cost and the anchors, over all chains."""
        total: list[tuple[float, tuple[str, ...]]] = [(0.0, ())]
        for chain in self.chains:
            mine = _cheapest(chain, self._costs(chain))
            total = [
                min(
                    (total[k - j][0] + mine[j][0], total[k - j][1] + mine[j][1])
                    for j in range(len(mine))
                    if 0 <= k - j < len(total)
                )
                for k in range(len(total) + len(mine) - 1)
            ]
        return total

    def _costs(self, chain: Chain) -> Costs:
        """Squared relative error of the segment between kept states a < b, for all a and b.

        One backward pass for each b, in which the states from b on are kept, the others rebuilt.
        """
        costs: Costs = {}
        others = [name for c in self.chains if c is not chain for name in c]
        for b in range(1, len(chain)):
            anchors = frozenset(chain[b:] + others)
            with _each(self.measure.engines, anchors=anchors, anchor_every=None):
                gradient = self.measure.gradient()
            total = 0.0
            for a in range(b - 1, -1, -1):
                costs[a, b] = total
                total += self._layer_error(chain[a], gradient)
        return costs

    def _layer_error(self, name: str, gradient: dict[str, Any]) -> float:
        gaps = [
            (gradient[p] - self.measure.exact[p]).double().square().sum()
            for p in self.own[name]
            if p in self.measure.exact
        ]
        square = float(sum(gaps)) / self.measure.scale**2
        return math.inf if math.isnan(square) else square


def _cheapest(chain: Chain, costs: Costs) -> list[tuple[float, tuple[str, ...]]]:
    """For 0, 1, … anchors inside a chain the least sum of its segments' costs, and the anchors."""
    end = len(chain) - 1
    best: list[list[tuple[float, tuple[int, ...]]]] = [
        [(costs[0, b] if b else 0.0, ()) for b in range(end + 1)]
    ]
    for _ in range(1, end):
        last = best[-1]
        best.append(
            [
                min(
                    ((last[a][0] + costs[a, b], (*last[a][1], a)) for a in range(1, b)),
                    default=(math.inf, ()),
                )
                for b in range(end + 1)
            ]
        )
    return [(row[end][0], tuple(chain[a] for a in row[end][1])) for row in best]


@contextmanager
def _each(
    engines: list[Engine],
    *,
    paused: bool = False,
    chains: list[Chain] | None = None,
    **settings: Any,
) -> Iterator[None]:
    """All engines with other settings for a while."""
    before = [(e, e.paused, e.chains, e.settings) for e in engines]
    for e in engines:
        e.paused = paused or e.paused
        e.chains = e.chains if chains is None else chains
        e.settings = replace(e.settings, **settings)
    try:
        yield
    finally:
        for e, e.paused, e.chains, e.settings in before:  # noqa: B007
            pass


def _norm(tensors: Any) -> float:
    squares = [t.detach().double().square().sum() for t in tensors]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0
