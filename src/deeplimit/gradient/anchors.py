"""Which states to keep, from a tolerance of the gradient's error."""

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from deeplimit.errors import InputError
from deeplimit.gradient.accuracy import LossOf, Measurement, _each

Chain = list[str]
Costs = dict[tuple[int, int], float]


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
    limit = min(e.tolerance for e in measure.engines) if tolerance is None else tolerance
    if not limit > 0:
        raise InputError(f"the tolerance is {limit}; it must be a number > 0")
    return _Planner(measure, limit).plan()


class _Planner:
    def __init__(self, measure: Measurement, tolerance: float):
        self.measure, self.tolerance = measure, tolerance
        with _each(measure.engines, chains=[], anchors=frozenset(), anchor_every=None):
            self.error_without = self._measured(())
            recorded = [chain for e in measure.engines for chain in e.chains or []]
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
