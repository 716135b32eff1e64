"""Couplings of two layers: costs of single particles, optimal plans proven by duals, entropic ones.

|x − y|² = |x|² + |y|² − 2 x·y is one matrix product, but loses what x and y have in common: its
error is about 1e-15 (|x|² + |y|²). Where the distance is a small part of that it is computed again
from the difference.
"""

import math
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from deeplimit.errors import RunError
from deeplimit.extras import need

Array = np.ndarray[Any, np.dtype[Any]]

SMALL = 1e-4  # of |x|² + |y|²; above it the product's relative error is below 1e-10
FEW = 0.05  # of all pairs, below which single pairs are faster than all of them
PIVOTS = 10_000_000  # of the network simplex, at most; POT's own limit is for hundreds of atoms
PROVEN = 1e-10  # of the cost: the accuracy of the costs themselves
TRIES = 4  # to solve; one is enough unless single particles are very far
SWEEPS = 1000  # over the potentials, at most; tens for layers of hundreds of particles
ROWS = 256  # of the costs at a time
MIXED = 30.0  # the ratio of large and small particles' distances that makes sizes mixed
EPS = float(np.finfo(float).eps)
ITERATIONS, TOLERANCE = 2000, 1e-6  # of Sinkhorn


class Plan(NamedTuple):
    """A coupling of two layers: atom rows[k] sends masses[k] to the other's atom columns[k].

    Attributes:
        rows, columns: indices [K].
        masses: [K], positive, of sum 1.
    """

    rows: Array
    columns: Array
    masses: Array


def squared_distances(x: Array, y: Array) -> Array:
    """[M, M'] of x [M, p] and y [M', p], in float64, with relative error 1e-10 at most."""
    # A translation changes nothing but the rounding; a mean would be where the far particles are.
    centre = np.median(np.concatenate([x, y]), axis=0)
    near, other = x - centre, y - centre
    sizes = (near * near).sum(1)[:, None] + (other * other).sum(1)[None, :]
    costs: Array = near @ (-2 * other.T)
    costs += sizes
    sizes *= SMALL
    i, j = np.nonzero(costs <= sizes)
    if len(i) > FEW * costs.size:
        costs = need("scipy.spatial.distance", "measures").cdist(x, y, "sqeuclidean")
        return costs
    few = max(1, len(costs) * len(costs[0]) // x.shape[1])  # at a time: no more than the costs
    for k in range(0, len(i), few):
        some = i[k : k + few], j[k : k + few]
        costs[some] = squared_distances_of(x[some[0]], y[some[1]])
    return costs


def squared_distances_of(x: Array, y: Array) -> Array:
    """[K] of the pairs x [K, p], y [K, p]."""
    differences = x - y
    found: Array = np.einsum("kp,kp->k", differences, differences)
    return found


def exact_plan(
    costs: Array, p: Array, q: Array, *, equal: bool, threads: int = 1
) -> tuple[Plan, float]:
    """An optimal coupling of weights p [M] and q [M'], and by how much it may cost more than one.

    A solver is exact up to rounding of the largest cost, which says nothing of the others where one
    particle is very far. So its coupling γ is proven: of potentials with f_i + g_j ≤ c_ij

        Σ_i p_i f_i + Σ_j q_j g_j ≤ min_γ Σ_ij γ_ij c_ij,

    with equality for those that are tight where an optimal γ has mass. Where a gap is left the
    reduced costs c_ij − f_i − g_j are solved, of which a better coupling uses none above min(M, M')
    times the largest that γ uses: cut off there, they are of one scale. The gap to what is proven
    is 0 where it is within 1e-10 of the cost, otherwise what the rounding of the weights leaves.
    With weights that are `equal`, and M = M', it is an assignment; `threads` solve such at a time.
    """
    now = costs
    for attempt in range(TRIES):
        i, j, mass = _assignment(now, threads) if equal else _transport(now, p, q)
        cost, bound = math.fsum(mass * costs[i, j]), -math.inf
        f, sure = np.zeros(len(costs)), mass > 64 * EPS
        # Again around the median, where they are large; and without what may be a rounding error.
        for k, used in enumerate((mass > 0, mass > 0, sure)):
            start = f - np.median(f) if k == 1 else np.zeros(len(costs))
            found = potentials(costs, i[used], j[used], start)
            value, error = dual_value(p, q, *found)
            if value > bound:
                (f, g), bound, rounding = found, value, error
            if abs(cost - bound) <= PROVEN * cost:
                return Plan(i, j, mass), 0.0
        # After a second try the masses' own rounding is all that is left, of a cost that is near 0.
        largest = float(np.ptp(f) + np.ptp(g) + costs[i, j].max()) if attempt else 0.0
        if abs(cost - bound) <= PROVEN * cost + rounding + 64 * EPS * largest:
            return Plan(i, j, mass), abs(cost - bound) + rounding
        rest = costs - f[:, None]
        rest -= g[None, :]
        now = rest.clip(0, min(costs.shape) * max(float(rest[i, j].max()), 0.0))
    raise RunError(
        f"optimal transport of {costs.shape} atoms: the coupling found costs {cost:.6g}, proven is "
        f"{bound:.6g} only; their sizes differ too much for float64 (costs up to "
        f"{costs.max():.2g}): look for particles that are far from all others, or give sinkhorn"
    )


def potentials(costs: Array, rows: Array, columns: Array, start: Array) -> tuple[Array, Array]:
    """Potentials f and g with f_i + g_j ≤ c_ij, equal on the support of an optimal coupling.

    By the shortest paths of Bellman and Ford: g_j = min_i c_ij − f_i, and f_i is raised from where
    it starts to c_ij − g_j where the coupling has mass. From 0 they stay about as small as can be.
    For a coupling that is not optimal none are tight; these are feasible all the same.
    """
    f, used = start.copy(), costs[rows, columns]
    g = _least(costs, f, np.arange(len(f)))
    for _ in range(SWEEPS):
        height = used - g[columns]
        height -= 8 * EPS * (used + np.abs(g[columns]))  # rounding raises nothing
        raised = f.copy()
        np.maximum.at(raised, rows, height)
        moved = np.flatnonzero(raised > f)
        if not len(moved):
            break
        f = raised
        g = np.minimum(g, _least(costs, f, moved))
    return f, g


def _least(costs: Array, f: Array, rows: Array) -> Array:
    """min_i c_ij − f_i over these rows."""
    parts = np.split(rows, range(ROWS, len(rows), ROWS))
    found: Array = np.min([(costs[i] - f[i, None]).min(0) for i in parts], axis=0)
    return found


def dual_value(p: Array, q: Array, f: Array, g: Array) -> tuple[float, float]:
    """Σ_i p_i f_i + Σ_j q_j g_j, and how much of it is rounding."""
    parts = np.concatenate([p * f, q * g])
    return math.fsum(parts), 4 * EPS * math.fsum(np.abs(parts))


def _assignment(costs: Array, threads: int) -> Plan:
    """The optimal permutation, by `lap` where that is installed and faster, else by scipy.

    Where the particles' sizes are mixed `lap` is 3 to 5 times as fast, elsewhere it is slower; and
    it lets no other thread run meanwhile (benchmarks/results/transport_speed.json).
    """
    few, many = np.quantile(costs.min(axis=1), (0.1, 0.9))
    lap = threads <= 2 and many > MIXED * few and find_spec("lap") is not None
    columns = (by_lap if lap else by_scipy)(_reduced(costs))
    return Plan(np.arange(len(costs)), columns, np.full(len(costs), 1 / len(costs)))


def _reduced(costs: Array) -> Array:
    """The costs less what a column, then a row, costs at least: the same optimum, sooner found."""
    costs = costs - costs.min(axis=0, keepdims=True)
    costs -= costs.min(axis=1, keepdims=True)
    return costs


def by_lap(costs: Array) -> Array:
    """The columns of the rows; costs of at most 1, since some above 10⁶ count as infinite there."""
    scale = costs.max() or 1.0
    columns: Array = need("lap", "measures").lapjv(costs / scale, extend_cost=False)[1]
    return columns


def by_scipy(costs: Array) -> Array:
    """The columns of the rows."""
    columns: Array = need("scipy.optimize", "measures").linear_sum_assignment(costs)[1]
    return columns


def _transport(costs: Array, p: Array, q: Array) -> Plan:
    """An optimal coupling, by POT's network simplex."""
    scale = costs.max() or 1.0  # the solver's tolerance is absolute
    plan, log = need("ot", "measures").emd(
        p, q, costs / scale, numItermax=PIVOTS, log=True, check_marginals=False
    )
    if log["warning"] is not None:
        raise RunError(f"optimal transport of {costs.shape} atoms: {log['warning']}")
    # Weights that differ by rounding alone would send that much mass a long way: 1e-8 instead of 0.
    rounding = 16 * EPS * math.sqrt(len(p) + len(q))
    i, j = np.nonzero(plan > rounding * np.minimum(p[:, None], q[None, :]))
    return Plan(i, j, plan[i, j])


def sinkhorn_plan(
    costs: Array, p: Array, q: Array, epsilon: float, *, keep: bool
) -> tuple[Plan | None, float, float]:
    """A coupling near the optimal one, its cost, and a lower bound of the optimal cost.

    POT's Sinkhorn in the logarithmic domain with regularisation ε · mean cost, in float64, on the
    GPU where there is one. Its plan is rounded onto the marginals (Altschuler, Weed, Rigollet 2017,
    arXiv 1705.09634, algorithm 2); its potentials (f, g), made feasible by two c-transforms, give
    Σ_i p_i f_i + Σ_j q_j g_j ≤ the optimal cost, less its rounding. The coupling is dense, M M'
    numbers: None unless it is to be kept.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cost, ps, qs = (torch.as_tensor(v, device=device) for v in (costs, p, q))
    plan, f = ps[:, None] * qs[None, :], torch.zeros_like(ps)
    strength = epsilon * float(cost.mean())
    if strength > 0:  # otherwise all atoms are in one place
        how = {"method": "sinkhorn_log", "numItermax": ITERATIONS, "stopThr": TOLERANCE}
        sinkhorn = need("ot", "measures").sinkhorn
        plan, log = sinkhorn(ps, qs, cost, strength, warn=False, log=True, **how)
        plan, f = _rounded(plan, ps, qs), strength * log["log_u"]
    g = (cost - f[:, None]).amin(dim=0)
    f = (cost - g[None, :]).amin(dim=1)
    value, rounding = dual_value(p, q, f.cpu().numpy(), g.cpu().numpy())
    lower = max(value - rounding, 0.0)
    total = float((plan * cost).sum())
    if not keep:
        return None, total, lower
    i, j = torch.nonzero(plan, as_tuple=True)
    return Plan(*(v.cpu().numpy() for v in (i, j, plan[i, j]))), total, lower


def _rounded(plan: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """The nearest coupling with marginals p and q, up to a constant."""
    plan = plan * (p / plan.sum(1)).clamp(max=1)[:, None]
    plan = plan * (q / plan.sum(0)).clamp(max=1)[None, :]
    missing, lacking = p - plan.sum(1), q - plan.sum(0)
    missing, lacking = missing.clamp(min=0), lacking.clamp(min=0)
    total = missing.sum()
    return plan + missing[:, None] * lacking[None, :] / total if total > 0 else plan
