"""Networks between two, at every t of a geodesic, and between several: barycentres of d.

Source: [BPV24] arXiv 2403.12887.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Literal, get_args

import torch
from torch import Tensor

from deeplimit._anatomy.checks import check_count, check_number
from deeplimit._anatomy.evaluation import Inputs
from deeplimit.errors import InputError, several
from deeplimit.meanfield.couplings import Plan
from deeplimit.meanfield.forms import align_streams
from deeplimit.meanfield.frame import Frame, layers_at, listed, merged_grid
from deeplimit.meanfield.measure import Cell, LayerwiseMeasure, Network, as_measure, remade
from deeplimit.meanfield.transport import CotDistance, cot_distance
from deeplimit.tables import Shown, number, table

FramePolicy = Literal["equal", "interpolate"]


def cot_geodesic(
    a: Network,
    b: Network,
    t: float,
    *,
    frame: FramePolicy = "equal",
    align: bool = False,
    batch: Inputs | None = None,
    transport: CotDistance | None = None,
) -> LayerwiseMeasure:
    """Makes the point μ_t of a geodesic of d from a (t = 0) to b (t = 1); `.network()` for both.

    With γ_s an optimal coupling of the layers at depth s,

        μ_t(·|s) = ((1 − t) ω + t ω')_# γ_s,      d(μ_s, μ_t) = |s − t| d(a, b).

    Equal numbers of equal atoms move along straight lines to their matches, in the order of a.
    Otherwise the atoms are those of the coupling's support, with its weights: at most M + M' − 1 of
    them per layer, exact at every t. A network of fewer neurons is what `narrow` makes of it; that
    is no longer the geodesic. The batch norms' channels of coupled neurons are averaged likewise
    (|γ|, β and the running variance), whatever `frame` is; this acts in training mode alone.

    For unequal depths the layers are the cells of the merged grid, at every t. The measures and
    distances are exact there too; the output of `.network()` at t = 0 and 1 is not that of a and b:
    a layer that the grid divides in parts of θh and (1 − θ)h takes two steps where the network made
    one, which adds θ(1 − θ)h² φ′(x)φ(x) + O(h³) to the state, O(1/N) in all. Where a's depth is a
    multiple of b's no layer of a is divided. Source: [BPV24] arXiv 2403.12887.

        >>> halfway = cot_geodesic(model, other, 0.5, frame="interpolate")
        >>> ratio = cot_distance(model, halfway).distance / cot_distance(model, other).distance
        >>> round(ratio, 9), halfway.network()(x).shape == model(x).shape
        (0.5, True)

    Args:
        a: a network, or its measure.
        b: another, of any width and depth, with particles of the same kind and size.
        t: in [0, 1].
        frame: what becomes of stem, heads, norms, attention and output biases. With "equal" they
            must be so; with "interpolate" they move linearly, (1 − t) of a's and t of b's, which
            is not part of the geodesic. Without frames (measures of particles alone) there is none.
        align: takes b in the basis of its residual stream that is nearest to a's, as
            `align_streams` does, which says where that is legitimate; d is the distance to that b.
        batch: the inputs on which both are run to align them.
        transport: `cot_distance(a, b, plans=True)`, where several t are wanted; by Sinkhorn the
            path is no geodesic.

    Raises:
        InputError: t outside [0, 1], different state dimensions or activations, frames that differ,
            blocks that cannot be divided in depth, a basis that is fixed, plans that do not fit.
    """
    expected = "t in [0, 1], from the first network to the other"
    t = check_number("t", t, expected, lambda v: 0 <= v <= 1)
    _check_policy(frame)
    start, end = as_measure(a), as_measure(b)
    if align:
        if batch is None:
            raise InputError("align=True needs batch=inputs, on which both networks are run")
        if transport is not None:
            raise InputError("align=True changes b: give transport of align_streams(a, b, batch)")
        end = align_streams(start, end, batch)
    mixed = _mixed_frame([start, end], [1 - t, t], frame)
    found = transport or cot_distance(start, end, plans=True)
    plans = found.plans
    if plans is None or found.measures is None:
        raise InputError("transport has no plans: give cot_distance(a, b, plans=True)")
    if not all(map(LayerwiseMeasure.same_as, found.measures, (start, end))):
        raise InputError(
            "transport: these are couplings of other networks; leave transport out or give "
            "cot_distance(a, b, plans=True)"
        )
    cells: list[Cell] = [
        ([(start, n), (end, m)], [1 - t, t], partial(_between, plan, t))
        for (n, m), plan in zip(found.layers, plans, strict=True)
    ]
    masses = [torch.from_numpy(plan.masses) for plan in plans]
    return remade(cells, masses, found.breakpoints, mixed)


def _check_policy(frame: str) -> None:
    if frame not in get_args(FramePolicy):
        raise InputError(f"frame is {frame!r}; expected one of {', '.join(get_args(FramePolicy))}")


def _between(plan: Plan, t: float, ends: Sequence[Tensor]) -> Tensor:
    """(1 − t) x + t y of the atoms that a plan couples."""
    x, y = ends
    rows, columns = (torch.from_numpy(k).to(x.device) for k in (plan.rows, plan.columns))
    return (1 - t) * x[rows] + t * y[columns].to(x)


def _mixed_frame(
    measures: list[LayerwiseMeasure], weights: list[float], policy: str
) -> Frame | None:
    """Σ_k λ_k of the frames, on the merged grid; None where none of the measures has one."""
    frames = [measure.frame for measure in measures]
    there = [frame for frame in frames if frame is not None]
    if not there:
        return None
    if len(there) < len(frames):
        raise InputError("one of the measures has no frame; make it with frame=model")
    grid = merged_grid(*(measure.breakpoints for measure in measures))
    first, *others = (frame.on(grid) for frame in there)
    for other in others:
        different = first.difference(other)
        if different:
            raise InputError(
                f"the networks differ in {different}; expected networks that differ in width, "
                "depth and values only"
            )
        unequal = first.unequal(other)
        if unequal and policy == "equal":
            raise InputError(
                f"the networks differ in {listed(unequal)}, which no particles are: train them "
                "with these shared (deeplimit train DATA --frame RUN), align them first where the "
                "basis of their streams is free (align_streams, --align), or give the frame "
                '"interpolate", which moves them linearly'
            )
    return first.mixed(others, weights) if policy == "interpolate" else first


@dataclass(frozen=True, eq=False)
class Merged(Shown):
    """Networks joined in one.

    Attributes:
        measure: the barycentre found; `measure.network()` is the network.
        distances: d from it to each of the networks.
        objectives: Σ_k λ_k d²(ν, μ_k) at the start and after each iteration; it never rises.
        lower: proven bounds of the distances, as `CotDistance.lower`.
    """

    measure: LayerwiseMeasure
    distances: tuple[float, ...]
    objectives: tuple[float, ...]
    lower: tuple[float, ...]

    def __str__(self) -> str:
        """The fall of the objective, and a row for each network."""
        pairs = enumerate(zip(self.distances, self.lower, strict=True))
        rows = [(str(k), number(d), number(bound)) for k, (d, bound) in pairs]
        return (
            f"Σ λ d² from {self.objectives[0]:.4g} to {self.objectives[-1]:.4g} in "
            f"{several(len(self.objectives) - 1, 'iteration')}\n"
            f"{table(('network', 'd', 'at least'), rows)}"
        )


def merge(
    networks: Sequence[Network],
    weights: Sequence[float] | None = None,
    *,
    frame: FramePolicy = "equal",
    start: int = 0,
    iterations: int = 20,
    tolerance: float = 1e-6,
) -> Merged:
    """Finds a barycentre ν of networks: Σ_k λ_k d²(ν, μ_k) made small over those of one width.

    From the atoms of one of them, ν ← Σ_k λ_k T_k(ν), with T_k(ω) the mean of where the optimal
    coupling with μ_k sends the atom ω; its weight stays (Cuturi, Doucet 2014, arXiv 1310.4375;
    Álvarez-Esteban et al. 2016, arXiv 1511.05355). It decreases the objective and ends in a local
    minimum. For two networks of equal widths the first step already is the geodesic's point at
    t = λ_2. Networks of other widths give the widths of the one started from; of other depths, the
    merged grid, as in `cot_geodesic`; of batch norms the channels are averaged as there.

    Source: [BPV24] arXiv 2403.12887 for d; the iteration layer by layer.

        >>> joined = merge([model, other], frame="interpolate")
        >>> sum(joined.distances) <= cot_distance(model, other).distance * (1 + 1e-9)
        True
        >>> joined.measure.network()(x).shape == model(x).shape
        True

    Args:
        networks: two or more, or measures; align their streams first (`align_streams`).
        weights: λ_k ≥ 0 of sum 1; equal by default.
        frame: as in `cot_geodesic`: "equal", or "interpolate" for the weighted mean.
        start: the number of the network to start from.
        iterations: at most.
        tolerance: stop where the objective falls by less than this part of it.

    Raises:
        InputError: fewer than two networks, wrong weights, and as `cot_geodesic`.
    """
    if len(networks) < 2:
        raise InputError(f"merge joins two networks or more, got {len(networks)}")
    shares = _shares(weights, len(networks))
    check_count("start", start, 0, len(networks) - 1)
    check_count("iterations", iterations)
    check_number("tolerance", tolerance, "a number ≥ 0", lambda v: v >= 0)
    _check_policy(frame)
    measures = [as_measure(network) for network in networks]
    grid = merged_grid(*(measure.breakpoints for measure in measures))
    order = [start, *(k for k in range(len(measures)) if k != start)]
    shell = _mixed_frame([measures[k] for k in order], [shares[k] for k in order], frame)
    first = measures[start]
    places = layers_at(first.breakpoints, grid)
    same: list[Cell] = [([(first, n)], [1.0], itemgetter(0)) for n in places]
    now = remade(same, [first.masses[n] for n in places], grid, shell)

    def looked_at(nu: LayerwiseMeasure) -> tuple[list[CotDistance], float]:
        found = [cot_distance(nu, measure, plans=True) for measure in measures]
        squares = (w * d.distance**2 for w, d in zip(shares, found, strict=True))
        return found, math.fsum(squares)

    found, objective = looked_at(now)
    objectives = [objective]
    for _ in range(iterations):
        moved = _moved(now, measures, found, shares)
        after, objective = looked_at(moved)
        fell = objectives[-1] - objective
        if fell < 0:  # by rounding
            break
        now, found = moved, after
        objectives.append(objective)
        if fell <= tolerance * objective:
            break
    distances, lower = zip(*((d.distance, d.lower) for d in found), strict=True)
    return Merged(now, distances, tuple(objectives), lower)


def _shares(weights: Sequence[float] | None, count: int) -> list[float]:
    if weights is None:
        return [1 / count] * count
    expected = "as many weights as networks, ≥ 0 of sum 1"
    shares = [check_number("a weight", w, expected, lambda v: v >= 0) for w in weights]
    if len(shares) != count or not math.isclose(sum(shares), 1, abs_tol=1e-9):
        raise InputError(f"weights {shares} given for {count} networks; expected {expected}")
    return shares


def _moved(
    now: LayerwiseMeasure,
    measures: Sequence[LayerwiseMeasure],
    found: Sequence[CotDistance],
    shares: Sequence[float],
) -> LayerwiseMeasure:
    """Σ_k λ_k T_k of every atom; the grid is fine enough for one cell to be one layer of each."""
    cells: list[Cell] = []
    for cell, mass in enumerate(now.masses):
        plans = [(distance.plans or ())[cell] for distance in found]
        goals = [(measure, d.layers[cell][1]) for measure, d in zip(measures, found, strict=True)]
        cells.append(([(now, cell), *goals], [0.0, *shares], partial(_sent, mass, plans, shares)))
    return remade(cells, now.masses, now.breakpoints, now.frame)


def _sent(
    mass: Tensor, plans: Sequence[Plan], shares: Sequence[float], values: Sequence[Tensor]
) -> Tensor:
    """Σ_k λ_k of the mean of values where plan k sends an atom; those of one without mass stay."""
    own, *goals = values
    target = torch.zeros_like(own)
    for plan, share, goal in zip(plans, shares, goals, strict=True):
        rows, columns = (torch.from_numpy(k).to(own.device) for k in (plan.rows, plan.columns))
        sent = torch.from_numpy(plan.masses)
        received = torch.zeros_like(mass).index_add_(0, rows.cpu(), sent)
        part = (sent / received[rows.cpu()]).to(own)
        target.index_add_(0, rows, share * part[:, None] * goal.to(own)[columns])
    return torch.where((mass > 0).to(own.device)[:, None], target, own)
