"""Piecewise constant functions of depth s ∈ [0, 1]: grids of breakpoints, and their merging."""

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from fractions import Fraction
from itertools import pairwise

from deeplimit.errors import InputError

Breakpoints = tuple[float, ...]
NEAR = 1e-12  # breakpoints closer than this are one; far below the length of any layer


def uniform_grid(depths: Sequence[int]) -> Breakpoints:
    """Stage k of K in [k/K, (k + 1)/K], its layers of equal lengths there; n/N for one stage.

    Stages without layers are not counted. Every breakpoint is the float nearest to its fraction,
    so that those of two grids that are equal are so to the last bit.
    """
    stages = [depth for depth in depths if depth]
    inner = [
        float((k + Fraction(n, depth)) / len(stages))
        for k, depth in enumerate(stages)
        for n in range(depth)
    ]
    return (*inner, 1.0)


def checked_grid(breakpoints: Iterable[float], layers: int) -> Breakpoints:
    """0 = s_0 < s_1 < … < s_N = 1."""
    grid = tuple(map(float, breakpoints))
    if len(grid) != layers + 1:
        raise InputError(
            f"{len(grid)} breakpoints given for {layers} layers; expected {layers + 1}"
        )
    rising = all(b - a > NEAR for a, b in pairwise(grid))  # not for NaN either
    if grid[0] != 0 or grid[-1] != 1 or not rising:
        raise InputError(f"breakpoints {grid} given; expected 0 = s_0 < s_1 < … < s_N = 1")
    return grid


def lengths(grid: Breakpoints) -> tuple[float, ...]:
    """Of the cells."""
    return tuple(b - a for a, b in pairwise(grid))


def merged_grid(*grids: Breakpoints) -> Breakpoints:
    """The breakpoints of all of them: n/64 and n/63 give 126 cells."""
    every = sorted({s for grid in grids for s in grid})
    kept = [every[0]]
    kept += [s for s in every[1:-1] if s - kept[-1] > NEAR and every[-1] - s > NEAR]
    return (*kept, every[-1])


def same_grid(a: Breakpoints, b: Breakpoints) -> bool:
    """True where the cells are the same ones."""
    return len(a) == len(b) and all(
        math.isclose(s, r, rel_tol=0, abs_tol=NEAR) for s, r in zip(a, b, strict=True)
    )


def layers_at(grid: Breakpoints, finer: Breakpoints) -> tuple[int, ...]:
    """For each cell of another grid, the cell of this one in which its middle lies."""
    last = len(grid) - 2
    return tuple(min(bisect_right(grid, (a + b) / 2) - 1, last) for a, b in pairwise(finer))
