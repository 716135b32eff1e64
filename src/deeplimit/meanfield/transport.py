"""The layer-conditional optimal transport distance of two networks ([BPV24] arXiv 2403.12887)."""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from deeplimit._anatomy.checks import check_number
from deeplimit.errors import InputError
from deeplimit.meanfield.couplings import (
    Array,
    Plan,
    exact_plan,
    sinkhorn_plan,
    squared_distances,
    squared_distances_of,
)
from deeplimit.meanfield.frame import Breakpoints, layers_at, lengths, merged_grid
from deeplimit.meanfield.measure import LayerwiseMeasure, Network, as_measure
from deeplimit.tables import Shown, number, table

# W_2² of two layers by a coupling, a lower bound of it, and the coupling where it is asked for.
Solved = tuple[float, float, Plan | None]


@dataclass(frozen=True, eq=False)
class CotDistance(Shown):
    """The layer-conditional distance d of two networks, and where in depth it lies.

    d² = Σ_c Δ_c W_2²(c) over the cells c of the merged grid.

    Attributes:
        distance: d; by Sinkhorn the cost of a coupling, hence never below d.
        lower: a proven bound d ≥ lower; equal to `distance` where d is proven to 1e-10 of itself.
        per_layer: W_2 of each cell.
        breakpoints: of the cells, in [0, 1].
        layers: for each cell the layers (n, n') of both networks.
        plans: for each cell a coupling of these, on request.
        measures: those of both networks, where there are plans.
    """

    distance: float
    lower: float
    per_layer: tuple[float, ...]
    breakpoints: tuple[float, ...]
    layers: tuple[tuple[int, int], ...]
    plans: tuple[Plan, ...] | None
    measures: tuple[LayerwiseMeasure, LayerwiseMeasure] | None

    def __str__(self) -> str:
        """The distance, how exact it is, where most of it lies, and a row for each cell."""
        squares = [h * w**2 for h, w in zip(self.lengths, self.per_layer, strict=True)]
        shares = [square / sum(squares) if self.distance else 0.0 for square in squares]
        most = max(range(len(squares)), key=squares.__getitem__)
        bounds = "exact" if not self.error else f"{self.lower:.4g} or more"
        columns = zip(self.layers, self.per_layer, shares, strict=True)
        rows = [(f"{n} and {m}", number(w), f"{share:.0%}") for (n, m), w, share in columns]
        return (
            f"d = {self.distance:.4g} ({bounds}) over {len(squares)} cells of depth; most of it, "
            f"{shares[most]:.0%} of d², between layers {self.layers[most][0]} and "
            f"{self.layers[most][1]}\n{table(('layers', 'W_2', 'of d²'), rows)}"
        )

    @property
    def lengths(self) -> tuple[float, ...]:
        """Δ_c of each cell."""
        return lengths(self.breakpoints)

    @property
    def error(self) -> float:
        """By how much `distance` may be too large: distance − lower."""
        return self.distance - self.lower


def cot_distance(
    a: Network,
    b: Network,
    *,
    plans: bool = False,
    sinkhorn: float | None = None,
) -> CotDistance:
    """Measures d(μ, ν)² = ∫_0^1 W_2²(μ(·|s), ν(·|s)) ds, layer-conditional 2-Wasserstein.

    Exact: for equal numbers of equal atoms an assignment problem per layer, otherwise a transport
    problem; for unequal depths on the merged grid of both (64 and 63 layers: 126 cells). Costs are
    squared Euclidean distances of particles, in float64, relatively accurate to 1e-10 also for
    networks that are close and where single particles are very far. That no coupling costs less is
    proven by potentials of the dual problem, whatever the solver did. O(N M³) at worst, O(M²)
    memory in each of torch's threads; layers that meet more than once are solved once.
    W_2 ≤ d for the joint laws of (s, ω), since the coupling does not move mass in depth.

    It is a distance of parameters: networks of one function, such as a ReLU neuron with u/c and cw,
    or a residual stream in another basis, may be far apart. Stems, heads, norms and attention are
    no part of it, nor are output biases. Source: [BPV24] arXiv 2403.12887.

        >>> found = cot_distance(model, other)
        >>> found.lower == found.distance > 0, cot_distance(model, model).distance
        (True, 0.0)

    Args:
        a: a network, its anatomy, or its measure.
        b: another, of any width and depth, with particles of the same kind and size.
        plans: whether to return the couplings.
        sinkhorn: a relative regularisation ε, 0.01 say, for layers too wide for the exact solver:
            entropic couplings with ε times the mean cost, on the GPU where there is one. Rounded
            to true couplings their cost is `distance`; with the dual bound of the same potentials,
            d lies in [lower, distance], whatever ε and however far the iteration got. Such
            couplings have M M' atoms each.

    Raises:
        InputError: particles of different sizes or kinds, ε not positive; as `LayerwiseMeasure.of`.
        RunError: the transport solver did not finish, or its coupling could not be proven optimal.
    """
    if sinkhorn is not None:
        expected = "a regularisation > 0, such as 0.01"
        sinkhorn = check_number("sinkhorn", sinkhorn, expected, lambda v: 0 < v < math.inf)
    a, b = as_measure(a), as_measure(b)
    check_comparable(a, b)
    grid, pairs = _cells(a, b)
    costs, lower, couplings = zip(*_solve_all(a, b, pairs, sinkhorn, keep=plans), strict=True)
    d = _mean_root(grid, costs)
    return CotDistance(
        distance=d,
        lower=min(_mean_root(grid, lower), d),
        per_layer=tuple(map(math.sqrt, costs)),
        breakpoints=grid,
        layers=pairs,
        plans=couplings if plans else None,
        measures=(a, b) if plans else None,
    )


def check_comparable(a: LayerwiseMeasure, b: LayerwiseMeasure) -> None:
    """Raises InputError unless the layers that meet have particles of one kind."""
    for pair in _cells(a, b)[1]:
        frames = (a.frame, b.frame)
        sides = list(zip((a, b), pair, strict=True))
        sizes = [f"particles of {side.layers[n].shape[1]} numbers" for side, n in sides]
        kinds = [str(f.layouts[n]) for f, n in zip(frames, pair, strict=True) if f is not None]
        for mine, theirs in (kinds, sizes) if len(kinds) == 2 else (sizes,):
            if mine != theirs:
                raise InputError(
                    f"layer {pair[0]} of the one has {mine}, layer {pair[1]} of the other "
                    f"{theirs}; expected networks of one state dimension and activation (widths "
                    "and depths may differ)"
                )


def _cells(
    a: LayerwiseMeasure, b: LayerwiseMeasure
) -> tuple[Breakpoints, tuple[tuple[int, int], ...]]:
    """The merged grid, and for each of its cells the layers of both."""
    grid = merged_grid(a.breakpoints, b.breakpoints)
    at_a, at_b = layers_at(a.breakpoints, grid), layers_at(b.breakpoints, grid)
    return grid, tuple(zip(at_a, at_b, strict=True))


def _mean_root(grid: Sequence[float], squares: Sequence[float]) -> float:
    """√ Σ_c Δ_c v_c."""
    return math.sqrt(math.fsum(h * v for h, v in zip(lengths(tuple(grid)), squares, strict=True)))


def _solve_all(
    a: LayerwiseMeasure,
    b: LayerwiseMeasure,
    pairs: Sequence[tuple[int, int]],
    epsilon: float | None,
    *,
    keep: bool,
) -> list[Solved]:
    """Every pair of layers; those that stand at several places once."""
    keys = [(_key(a, n), _key(b, m)) for n, m in pairs]
    different = dict(zip(keys, pairs, strict=True))
    threads = min(torch.get_num_threads(), len(different))
    solve = partial(_solve, a, b, epsilon, keep=keep, threads=threads)
    # scipy's assignment and numpy's products let other threads run.
    with ThreadPoolExecutor(threads) as pool:
        each = (map if threads == 1 else pool.map)(solve, different.values())
        found = dict(zip(different, each, strict=True))
    return [found[key] for key in keys]


def _key(measure: LayerwiseMeasure, n: int) -> tuple[object, ...]:
    """The same for layers that are the same tensors."""
    tensors = [measure.layers[n]] + ([] if measure.is_uniform(n) else [measure.masses[n]])
    return tuple((t.data_ptr(), t.shape, t.stride()) for t in tensors)


def _solve(
    a: LayerwiseMeasure,
    b: LayerwiseMeasure,
    epsilon: float | None,
    pair: tuple[int, int],
    *,
    keep: bool,
    threads: int,
) -> Solved:
    n, m = pair
    equal = len(a.layers[n]) == len(b.layers[m]) and a.is_uniform(n) and b.is_uniform(m)
    (x, p, rows), (y, q, columns) = _atoms(a, n), _atoms(b, m)
    costs, plan = squared_distances(x, y), None
    if epsilon is not None:
        plan, cost, lower = sinkhorn_plan(costs, p, q, epsilon, keep=keep)
    else:
        plan, gap = exact_plan(costs, p, q, equal=equal, threads=threads)
        cost = math.fsum(plan.masses * squared_distances_of(x[plan.rows], y[plan.columns]))
        lower = max(cost - gap, 0.0)
    if plan is None or not keep:
        return cost, lower, None
    return cost, lower, Plan(rows[plan.rows], columns[plan.columns], plan.masses)


def _atoms(measure: LayerwiseMeasure, n: int) -> tuple[Array, Array, Array]:
    """Particles and weights of sum 1 in float64, and the indices of those that have mass."""
    mass = _array(measure.masses[n])
    kept = np.flatnonzero(mass)
    return _array(measure.layers[n])[kept], mass[kept] / mass[kept].sum(), kept


def _array(values: Tensor) -> Array:
    found: Array = values.detach().cpu().double().numpy()
    return found
