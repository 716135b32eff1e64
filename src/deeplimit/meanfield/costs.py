"""Squared Euclidean distances between particles: fast, and relatively accurate when they are small.

|x − y|² = |x|² + |y|² − 2 x·y is one matrix product, but loses what x and y have in common: its
error is about 1e-15 (|x|² + |y|²). Where the distance is a small part of that it is computed again
from the difference.
"""

from typing import Any

import numpy as np
from scipy.spatial.distance import cdist

Array = np.ndarray[Any, np.dtype[Any]]

SMALL = 1e-4  # of |x|² + |y|²; above it the product's relative error is below 1e-10
FEW = 0.05  # of all pairs, below which single pairs are faster than all of them


def squared_distances(x: Array, y: Array) -> Array:
    """[M, M'] of x [M, p] and y [M', p], in float64, with relative error 1e-10 at most."""
    # A translation changes nothing but the rounding; a mean would be where the far particles are.
    centre = np.median(np.concatenate([x, y]), axis=0)
    near, other = x - centre, y - centre
    sizes = (near * near).sum(1)[:, None] + (other * other).sum(1)[None, :]
    costs = near @ (-2 * other.T)
    costs += sizes
    sizes *= SMALL
    i, j = np.nonzero(costs <= sizes)
    if len(i) > FEW * costs.size:
        exact: Array = cdist(x, y, "sqeuclidean")
        return exact
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
