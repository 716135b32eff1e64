"""Networks joined in one: a barycentre of d, by fixed-point iteration."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from deeplimit._anatomy.checks import check_count, check_number, shown
from deeplimit.errors import InputError
from deeplimit.meanfield.frame import Frame
from deeplimit.meanfield.geodesic import FRAMES, mixed_frame
from deeplimit.meanfield.grid import Breakpoints, layers_at, merged_grid
from deeplimit.meanfield.measure import LayerwiseMeasure, Network, as_measure
from deeplimit.meanfield.norms import moved_norms
from deeplimit.meanfield.transport import CotDistance, Plan, cot_distance


@dataclass(frozen=True, eq=False)
class Merged:
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


def merge(
    networks: Sequence[Network],
    weights: Sequence[float] | None = None,
    *,
    frame: str = "equal",
    start: int = 0,
    iterations: int = 20,
    tolerance: float = 1e-6,
) -> Merged:
    """A barycentre ν of networks: Σ_k λ_k d²(ν, μ_k) made small over networks of one width.

    From the atoms of one of them, ν ← Σ_k λ_k T_k(ν), with T_k(ω) the mean of where the optimal
    coupling with μ_k sends the atom ω; its weight stays (Cuturi, Doucet 2014, arXiv 1310.4375;
    Álvarez-Esteban et al. 2016, arXiv 1511.05355). It decreases the objective and ends in a local
    minimum. For two networks of equal widths the first step already is the geodesic's point at
    t = λ_2. Networks of other widths give the widths of the one started from; of other depths, the
    merged grid, as in `cot_geodesic`; of batch norms the channels are averaged as there.

    Source: [BPV24] arXiv 2403.12887 for d; the iteration layer by layer.

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
    if not isinstance(networks, Sequence) or isinstance(networks, str):
        raise InputError(f"{shown(networks)} given as networks; expected a list of two or more")
    if len(networks) < 2:
        raise InputError(f"merge joins two networks or more, got {len(networks)}")
    shares = _shares(weights, len(networks))
    check_count("start", start, 0, len(networks) - 1)
    check_count("iterations", iterations)
    check_number("tolerance", tolerance, "a number ≥ 0", lambda v: v >= 0)
    if frame not in FRAMES:
        raise InputError(f"frame is {frame!r}; expected one of {', '.join(FRAMES)}")
    measures = [as_measure(network) for network in networks]
    grid = merged_grid(*(measure.breakpoints for measure in measures))
    order = [start, *(k for k in range(len(measures)) if k != start)]
    shell = mixed_frame([measures[k] for k in order], [shares[k] for k in order], frame)
    now = _on(measures[start], grid, shell)
    found = [cot_distance(now, measure, plans=True) for measure in measures]
    objectives = [_objective(found, shares)]
    for _ in range(iterations):
        moved = _moved(now, measures, found, shares)
        after = [cot_distance(moved, measure, plans=True) for measure in measures]
        objective = _objective(after, shares)
        if objective > objectives[-1]:  # by rounding
            break
        fell = objectives[-1] - objective
        now, found = moved, after
        objectives.append(objective)
        if fell <= tolerance * objective:
            break
    return Merged(
        now,
        tuple(d.distance for d in found),
        tuple(objectives),
        tuple(d.lower for d in found),
    )


def _shares(weights: Sequence[float] | None, count: int) -> list[float]:
    if weights is None:
        return [1 / count] * count
    expected = "as many weights as networks, ≥ 0 of sum 1"
    if not isinstance(weights, Iterable) or isinstance(weights, str):
        raise InputError(f"weights is {shown(weights)}; expected {expected}")
    shares = [check_number("a weight", w, expected, lambda v: v >= 0) for w in weights]
    if len(shares) != count or not math.isclose(sum(shares), 1, abs_tol=1e-9):
        raise InputError(f"weights {shares} given for {count} networks; expected {expected}")
    return shares


def _on(measure: LayerwiseMeasure, grid: Breakpoints, frame: Frame | None) -> LayerwiseMeasure:
    """The same measure, its layers divided at these breakpoints."""
    places = layers_at(measure.breakpoints, grid)
    return LayerwiseMeasure(
        [measure.layers[n] for n in places],
        [measure.masses[n] for n in places],
        grid,
        frame=None if frame is None else frame.on(grid),
        norms=[measure.norms[n] for n in places],
    )


def _objective(found: Sequence[CotDistance], shares: Sequence[float]) -> float:
    return math.fsum(w * d.distance**2 for w, d in zip(shares, found, strict=True))


def _moved(
    now: LayerwiseMeasure,
    measures: Sequence[LayerwiseMeasure],
    found: Sequence[CotDistance],
    shares: Sequence[float],
) -> LayerwiseMeasure:
    """Σ_k λ_k T_k of every atom; the grid is fine enough for one cell to be one layer of each."""
    layers, norms = [], []
    for cell, atoms in enumerate(now.layers):
        plans = [(distance.plans or ())[cell] for distance in found]
        move = partial(_sent, now.masses[cell], plans, shares)
        meeting = [d.layers[cell][1] for d in found]
        goals = list(zip(measures, meeting, strict=True))
        layers.append(move([atoms, *(measure.layers[m] for measure, m in goals)]))
        channels = [now.norms[cell], *(measure.norms[m] for measure, m in goals)]
        norms.append(moved_norms(channels, [0.0, *shares], move))
    return LayerwiseMeasure(layers, now.masses, now.breakpoints, frame=now.frame, norms=norms)


def _sent(
    mass: Tensor, plans: Sequence[Plan], shares: Sequence[float], values: Sequence[Tensor]
) -> Tensor:
    """Σ_k λ_k of the mean of the values where plan k sends an atom.

    Args:
        mass: of the atoms.
        plans: from them to the atoms of each network.
        shares: λ_k.
        values: [M, q] of the atoms, which those without mass keep, then [M_k, q] of each network.
    """
    own, *goals = values
    target = torch.zeros_like(own)
    for plan, share, goal in zip(plans, shares, goals, strict=True):
        rows, columns = (torch.from_numpy(k).to(own.device) for k in (plan.rows, plan.columns))
        sent = torch.from_numpy(plan.masses)
        received = torch.zeros_like(mass).index_add_(0, rows.cpu(), sent)
        part = (sent / received[rows.cpu()]).to(own)
        target.index_add_(0, rows, share * part[:, None] * goal.to(own)[columns])
    return torch.where((mass > 0).to(own.device)[:, None], target, own)
