"""Optimal couplings of two layers, proven by the potentials of the dual problem."""

import math
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from deeplimit.errors import RunError

Array = np.ndarray[Any, np.dtype[Any]]
Support = tuple[Array, Array, Array]

PIVOTS = 10_000_000  # of the network simplex, at most; POT's own limit is for hundreds of atoms
PROVEN = 1e-10  # of the cost: the accuracy of the costs themselves
TRIES = 4  # to solve; one is enough unless single particles are very far
SWEEPS = 1000  # over the potentials, at most; tens for layers of hundreds of particles
ROWS = 256  # of the costs at a time
EPS = float(np.finfo(float).eps)


def exact_plan(costs: Array, p: Array, q: Array, equal: bool) -> tuple[Support, float]:
    """The support of an optimal coupling, and by how much it may cost more than another.

    A solver is exact up to rounding of the largest cost, which says nothing of the others where one
    particle is very far. So its coupling γ is proven: of potentials with f_i + g_j ≤ c_ij

        Σ_i p_i f_i + Σ_j q_j g_j ≤ min_γ Σ_ij γ_ij c_ij,

    with equality for those that are tight where an optimal γ has mass. Where a gap is left the
    reduced costs c_ij − f_i − g_j are solved, of which a better coupling uses none above min(M, M')
    times the largest that γ uses: cut off there, they are of one scale.

    Args:
        costs: [M, M'], not negative.
        p: weights [M], positive, of sum 1.
        q: weights [M'], likewise.
        equal: whether all weights are, and M = M': an assignment problem.

    Returns:
        Rows, columns and masses of the coupling; the gap to what is proven: 0 where that is within
        1e-10 of the cost, otherwise what the rounding of the weights leaves of it.

    Raises:
        RunError: the solver did not finish, or its answer could not be proven.
    """
    now = costs
    for attempt in range(TRIES):
        i, j, mass = _assignment(now) if equal else _transport(now, p, q)
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
                return (i, j, mass), 0.0
        # After a second try the masses' own rounding is all that is left, of a cost that is near 0.
        largest = float(np.ptp(f) + np.ptp(g) + costs[i, j].max()) if attempt else 0.0
        if abs(cost - bound) <= PROVEN * cost + rounding + 64 * EPS * largest:
            return (i, j, mass), abs(cost - bound) + rounding
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


def _assignment(costs: Array) -> Support:
    """The optimal permutation.

    What a column, then a row, costs at least is taken off first: the optimum stays where it is, and
    scipy's solver finds it two to four times as fast (1024 particles, Gaussian or of mixed sizes).
    """
    costs = costs - costs.min(axis=0, keepdims=True)
    costs -= costs.min(axis=1, keepdims=True)
    rows, columns = linear_sum_assignment(costs)
    return rows, columns, np.full(len(rows), 1 / len(rows))


def _transport(costs: Array, p: Array, q: Array) -> Support:
    """The support of an optimal coupling, by POT's network simplex."""
    import ot  # a second or two, which only this and Sinkhorn need

    # The solver's tolerance is absolute.
    scale = costs.max() or 1.0
    plan, log = ot.emd(p, q, costs / scale, numItermax=PIVOTS, log=True, check_marginals=False)
    if log["warning"] is not None:
        raise RunError(f"optimal transport of {costs.shape} atoms: {log['warning']}")
    # Weights that differ by rounding alone would send that much mass a long way: 1e-8 instead of 0.
    rounding = 16 * EPS * math.sqrt(len(p) + len(q))
    i, j = np.nonzero(plan > rounding * np.minimum(p[:, None], q[None, :]))
    return i, j, plan[i, j]
