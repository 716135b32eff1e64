"""Which states to keep, to code and to rebuild: planned by the gradient's measured error."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deeplimit._anatomy.checks import check_count
from deeplimit.errors import InputError
from deeplimit.gradient.accuracy import LossOf, Measurement, each
from deeplimit.gradient.codes import BITS, GROUP
from deeplimit.gradient.distances import SAMPLED
from deeplimit.gradient.learning import Step
from deeplimit.gradient.meter import KEPT, Way
from deeplimit.gradient.stand_ins import engines, switches
from deeplimit.tables import Shown, number, percent, table

UNIFORM = (*(Way(0, e) for e in (1, 2, 3)), *(Way(b, e) for e in (1, 2) for b in BITS), KEPT)
SEGMENT = Way(0, 2)  # between kept states
ENDS = 8  # at which kept states a segment may end, at most
CELLS = 32  # of memory that make a state, in the dynamic programme
AROUND = (2.0, 1.4, 1.0, 0.7, 0.5, 0.25)  # of the tolerance: what is tried of the plans computed
GRID = 10  # plans that are tried where memory is given
EXACTLY: dict[str, Any] = {"ways": {}, "bits": "auto", "anchor_every": None}


@dataclass(frozen=True)
class MemoryPlan(Shown):
    """How each block's input comes back: `use_adjoint(model, plan=plan)`.

    Attributes:
        ways: of the blocks that are linked to others, but for the first and last of each chain,
            which are kept.
        error: ‖g − g*‖ / ‖g*‖ over all parameters, measured on the batch; g* with every state kept.
        bound: what the meter told of that error.
        states: bytes that are kept of states between forward and backward.
        memory: bytes at the peak of a step beyond parameters and gradients, as measured; None where
            that was not.
        tolerance: that the error was to stay within.
        budget: that the memory was to stay within, if that was asked for.
    """

    ways: dict[str, Way]
    error: float
    bound: float
    states: int
    memory: int | None
    tolerance: float
    budget: int | None = None

    def __str__(self) -> str:
        """A line on the whole, and one for each run of blocks whose states come back alike."""
        head = f"gradient error {percent(self.error)}, tolerance {percent(self.tolerance)}; "
        head += f"{number(self.states / 2**20)} MiB of states"
        if self.memory is not None:
            head += f", {number(self.memory / 2**20)} MiB at the peak"
        if self.budget is not None:
            head += f" of {number(self.budget / 2**20)} MiB"
        runs = [(way, list(run)) for way, run in groupby(self.ways, self.ways.__getitem__)]
        rows = [
            (names[0] + (f" … {names[-1]}" if names[1:] else ""), str(len(names)), str(way))
            for way, names in runs
        ]
        return f"{head}\n{table(('blocks', 'how many', 'their states'), rows)}" if rows else head


def plan_memory(
    model: nn.Module,
    loss_of: LossOf,
    batch: Any,
    tolerance: float | None = None,
    *,
    memory: int | None = None,
) -> MemoryPlan:
    """The fewest bytes of states with which the gradient's error on a batch is within tolerance.

    For each state it is decided whether it is kept, coded in b = 2, 4 or 8 bits, or rebuilt. First
    every state comes back alike, in each of the ways (b, e); from the errors that this makes in the
    gradients of single blocks, and from those of segments rebuilt between kept states, the cheapest
    mixture for each memory is found by dynamic programming (squared errors of blocks add up). What
    was *measured* is then chosen from: the least bytes of states within the tolerance.

    What a block needs while it is rebuilt is not among these bytes: another plan may have a lower
    peak. With `memory` it is the least error whose measured peak is within it, of the same plans
    for every budget, so that more is never less accurate, nor less ever more memory.

    The gradient that errors are measured against has every state kept: it takes a checkpoint's
    memory, and no more than about 40 steps, or 60 with `memory`, are made. Random numbers are the
    same in all. The model is left as it was.

        >>> model = use_adjoint(nn.Sequential(*blocks), bits=4)
        >>> plan = plan_memory(model, lambda m, x: m(x).square().mean(), x, 1e-2)
        >>> model = use_adjoint(model, plan=plan)

    Args:
        model: a model switched by `use_adjoint`; whichever its bits and evaluations.
        loss_of: loss_of(model, batch) → a scalar.
        batch: whatever it takes; as large as those that are to be trained on.
        tolerance: of the gradient's relative error; the model's own by default.
        memory: bytes at the peak of forward and backward, beyond parameters and their gradients, as
            `deeplimit gradient` has them. Not for a model inside DistributedDataParallel.

    Raises:
        InputError: the model is not switched, the tolerance is not a number > 0, or no plan takes
            as little memory as that.
    """
    limit = min(e.settings.tolerance for e in engines(model)) if tolerance is None else tolerance
    if not limit > 0:
        raise InputError(f"the tolerance is {limit}; it must be a number > 0")
    if memory is not None:
        check_count("memory", memory)
    with _learnt_for_codes(model):
        measure = Measurement(model, loss_of, batch, **EXACTLY)
        if not measure.tells:
            raise InputError(
                f"the gradient on this batch has the norm {measure.scale:g}, by which no error can "
                "be told; give a batch, or a loss_of, whose gradient is finite and not 0"
            )
        return Planner(measure, limit).plan(memory)


@contextmanager
def _learnt_for_codes(model: nn.Module) -> Iterator[None]:
    """Blocks that do not add their input may be coded, though not if the model has no bits."""
    unlike = [s for s in switches(model) if not s.engine.settings.bits]
    learnt = [(switch.step, dict(vars(switch.step))) for switch in unlike]
    for step, _ in learnt:
        step.plain, step.known, step.adds, step.linked = None, False, True, False
    try:
        yield
    finally:
        for step, was in learnt:
            vars(step).update(was)


class _Place(NamedTuple):
    """A state in a chain of blocks, as far as the dynamic programme looks at it.

    Attributes:
        n, chain: the n-th of the chain's.
        free: whether it need not be kept.
    """

    n: int
    chain: list[Step]
    step: Step
    free: bool

    def bytes(self, bits: int) -> float:
        """Of the state itself (0), or its code."""
        numbers, size = self.step.size
        if not bits:
            return float(numbers * size)
        return numbers * (bits + 16 / GROUP) / 8 + 2 * min(numbers, SAMPLED) * max(size, 4)

    @property
    def feedback(self) -> float:
        """Bytes of what the codes of one run share."""
        return float(self.step.size[0] * max(self.step.size[1], 4))


class Planner:
    """Plans for one batch: those with one way for all states, and mixtures of them."""

    def __init__(self, measure: Measurement, tolerance: float):
        self.measure, self.tolerance = measure, tolerance
        recorded: list[list[str]] = []
        with each(measure.engines, chains=recorded, **EXACTLY):
            measure.gradient()
        steps = {s.step.name: s.step for s in switches(measure.model)}
        chains = [[steps[name] for name in chain] for chain in recorded if len(chain) > 2]
        self.places = [
            _Place(n, chain, step, 0 < n < len(chain) - 1 and not step.data_dependent_shape)
            for chain in chains
            for n, step in enumerate(chain)
        ]
        names = {id(measure.parameters[name]): name for name in measure.exact}
        self._parameters = {
            step.name: [names[id(p)] for p in step.modules.parameters() if id(p) in names]
            for step in steps.values()
        }
        self._found: dict[frozenset[tuple[str, Way]], MemoryPlan] = {}
        self._own: dict[Way, list[float]] = {}

    def plan(self, budget: int | None, *, peaks: bool = True) -> MemoryPlan:
        """The best of those measured."""
        for way in UNIFORM:
            _, gradient = self._tried(self._everywhere(way))
            if way.bits and gradient is not None:
                self._own[way] = [self._own_error(place, gradient) for place in self.places]
        least = min(self._found.values(), key=lambda p: (p.states, p.error))
        if self.places and (budget is not None or least.error > self.tolerance):
            self._mix(budget)
        options = list(self._found.values())
        if budget is not None:
            return replace(self._within(budget, options), budget=budget)
        fit = [p for p in options if p.error <= self.tolerance]
        best = min(fit, key=lambda p: (p.states, sum(w.evaluations for w in p.ways.values())))
        return replace(best, memory=self._peak(best)) if peaks else best

    def _within(self, budget: int, plans: list[MemoryPlan]) -> MemoryPlan:
        """The most exact whose peak is within the budget."""
        least = math.inf
        for plan in sorted(plans, key=lambda p: (p.error, p.states)):
            peak = self._peak(plan)
            if peak <= budget:
                return replace(plan, memory=peak)
            least = min(least, peak)
        raise InputError(
            f"memory is {budget} bytes; expected at least {least:.0f}, the least that a step was "
            "seen to take: give that, or a smaller batch"
        )

    def _everywhere(self, way: Way) -> dict[str, Way]:
        """The same for all, as far as blocks go with it."""
        return {p.step.name: way.fitting(adds=p.step.adds) for p in self.places if p.free}

    def _gradient(self, ways: Mapping[str, Way]) -> dict[str, Tensor]:
        with each(self.measure.engines, **EXACTLY | {"ways": ways}):
            return self.measure.gradient()

    def _tried(self, ways: dict[str, Way]) -> tuple[MemoryPlan, dict[str, Tensor] | None]:
        """Measured; with the gradient, the first time."""
        key = frozenset(ways.items())
        if key in self._found:
            return self._found[key], None
        gradient = self._gradient(ways)
        error = self.measure.error(gradient)
        self._found[key] = MemoryPlan(
            ways,
            math.inf if math.isnan(error) else error,
            max(e.meter.bound for e in self.measure.engines),
            round(self._bytes(ways)),
            None,
            self.tolerance,
        )
        return self._found[key], gradient

    def _peak(self, plan: MemoryPlan) -> int:
        key = frozenset(plan.ways.items())
        peak = self._found[key].memory
        if peak is None:
            with each(self.measure.engines, **EXACTLY | {"ways": plan.ways}):
                peak = self.measure.peak()
            self._found[key] = replace(plan, memory=peak)
        return peak

    def _bytes(self, ways: Mapping[str, Way]) -> float:
        total, coded = 0.0, False
        for place in self.places:
            way = ways.get(place.step.name, KEPT) if place.free else KEPT
            if way.bits and not coded:
                total += place.feedback
            coded = way.bits > 0
            total += place.bytes(way.bits) if coded or way == KEPT else 0
        return total

    def _own_error(self, place: _Place, gradient: dict[str, Tensor]) -> float:
        """Squared error of the gradient of a place's block, relative to the whole gradient."""
        gaps = [
            (gradient[p] - self.measure.exact[p]).double().square().sum()
            for p in self._parameters[place.step.name]
        ]
        square = float(sum(gaps)) / (self.measure.scale**2 or 1.0)
        return math.inf if math.isnan(square) else square

    def _mix(self, budget: int | None) -> None:
        """Measures some of the mixtures that the dynamic programme finds."""
        segments = self._segments()
        for e in (1, 2) if any(p.step.adds for p in self.places if p.free) else (1,):
            programme = _Programme(
                self.places, {b: self._own[Way(b, e)] for b in BITS}, segments, e
            )
            found = programme.plans()
            if budget is not None:
                last = len(found) - 1
                for i in sorted({round(k * last / (GRID - 1)) for k in range(GRID)}):
                    self._tried(programme.ways(found[i][0]))
                continue
            for part in AROUND:
                cell = next(c for c, error in found if error <= (part * self.tolerance) ** 2)
                if self._tried(programme.ways(cell))[0].error <= self.tolerance:
                    break

    def _segments(self) -> dict[tuple[int, int], float]:
        """Squared errors by rebuilding all states between two kept ones, places a < b.

        One backward pass for each b, in which the states from b on are kept, those before rebuilt.
        """
        costs: dict[tuple[int, int], float] = {}
        start = 0
        while start < len(self.places):
            chain = self.places[start].chain
            last = len(chain) - 1
            for b in sorted({2 + round(k * (last - 2) / (ENDS - 1)) for k in range(ENDS)}):
                inside = []
                for a in range(b - 1, 0, -1):
                    place = self.places[start + a]
                    if not (place.free and place.step.adds):
                        break
                    inside.append(place)
                if not inside:
                    continue
                gradient = self._gradient({place.step.name: SEGMENT for place in inside})
                total = 0.0
                for place in inside:
                    total += self._own_error(place, gradient)
                    costs[start + place.n - 1, start + b] = total
            start += len(chain)
        return costs


class _Programme:
    """Dynamic programming over the places, for every memory: the least sum of squared errors.

    A state is kept, or coded in b bits after a kept or coded one, or rebuilt with all others
    between two kept ones. The error of x̂_n is that of the code by which x_n was reached, so that it
    goes by the bits of block n − 1; after a kept state there is none.
    """

    def __init__(
        self,
        places: list[_Place],
        errors: Mapping[int, list[float]],
        segments: Mapping[tuple[int, int], float],
        evaluations: int,
    ):
        self.places, self._evaluations = places, evaluations
        total = sum(p.bytes(0) for p in places)
        self._cell = max(min(p.bytes(0) for p in places) / CELLS, total / 8192)
        self._cells = sum(self._in_cells(p.bytes(0)) for p in places) + 1
        nothing = torch.full((self._cells,), math.inf, dtype=torch.float64)
        start = nothing.clone()
        start[0] = 0.0
        # Of each place and kind (0: kept; b) the least errors, and where they come from: a choice
        # among (place, kind, cells that it costs) for each memory.
        self._least: list[dict[int, Tensor]] = []
        self._from: list[dict[int, tuple[Tensor, list[tuple[int, int, int]]]]] = []
        for i, place in enumerate(places):
            before = self._least[-1] if place.n else {0: self._least[-1][0] if i else start}
            kept = self._in_cells(place.bytes(0))
            ways = {0: [(before[k], i - 1, k, kept) for k in before]}
            for (a, b), cost in segments.items():
                if b == i:
                    ways[0].append((self._least[a][0] + cost, a, 0, kept))
            for bits in BITS if place.free else ():
                code = place.bytes(bits)
                first = self._in_cells(code + place.feedback)
                ways[bits] = [(before[0], i - 1, 0, first)]
                ways[bits] += [
                    (before[k] + errors[k][i], i - 1, k, self._in_cells(code)) for k in before if k
                ]
            least, origin = {}, {}
            for kind, entries in ways.items():
                shifted = (F.pad(v, (more, 0), value=math.inf) for v, _, _, more in entries)
                values = torch.stack([v[: self._cells] for v in shifted])
                least[kind], choice = values.min(0)
                origin[kind] = choice, [(a, k, cells) for _, a, k, cells in entries]
            self._least.append(least)
            self._from.append(origin)

    def plans(self) -> list[tuple[int, float]]:
        """(cells of memory, squared error), from the least memory; each better than the last."""
        found, best = [], math.inf
        for cell, error in enumerate(self._least[-1][0].tolist()):
            if error < best:
                found.append((cell, error))
                best = error
        return found

    def ways(self, cell: int) -> dict[str, Way]:
        """The plan of so much memory."""
        at, kind = len(self.places) - 1, 0
        found: dict[str, Way] = {}
        while at >= 0:
            place = self.places[at]
            if place.free:
                way = Way(kind, self._evaluations) if kind else KEPT
                found[place.step.name] = way.fitting(adds=place.step.adds)
            choice, entries = self._from[at][kind]
            before, kind, cells = entries[int(choice[cell])]
            for rebuilt in self.places[before + 1 : at]:
                found[rebuilt.step.name] = SEGMENT
            at, cell = before, cell - cells
        return {p.step.name: found[p.step.name] for p in self.places if p.free}

    def _in_cells(self, size: float) -> int:
        return math.ceil(size / self._cell)
