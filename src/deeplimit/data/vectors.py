"""Tables of numbers: kept in 32 bits where that loses nothing, else in 64."""

from __future__ import annotations

import numpy as np

from deeplimit.data.dataset import RARE
from deeplimit.errors import InputError

_NARROW = 16  # standard deviations; so far from 0 a feature can lie and lose nothing in 32 bits
_ROWS = 10_000  # looked at, evenly spread; of more, neighbouring values meet in 32 bits by chance
_BLOCK = 64  # features at once
_NOISE = 2.0**-42  # of a large value: what arithmetic in 64 bits leaves between equal values
_SHARE = 0.01  # of a feature's values that may meet others: those of a smooth distribution


def checked_vectors(x: np.ndarray, source: str) -> np.ndarray:
    """Samples [n, d] as float32, or as float64 where float32 is too coarse; every number finite.

    A network standardises its inputs, z = (x − mean) / std, and goes on in 32 bits. That is fine
    for x near 0; where it lies further out than its spread, such as a year or x + 10⁹, the rounding
    of x itself would be seen, so x stays in 64 bits until it is standardised.

    Args:
        x: integers or floats.
        source: what errors name.

    Raises:
        InputError: numbers that are not finite, or a feature whose different values become one: two
            integers, or more than 1 % of its floats. So it is with a rare value far from all
            others, or with identification numbers of more than 16 digits.
    """
    with np.errstate(over="ignore"):  # too large for float32 becomes inf, refused below
        narrow = x.astype(np.float32)
    finite = np.isfinite(narrow)
    if not finite.all():
        sample, feature = np.argwhere(~finite)[0]
        raise InputError(
            f"{source}[{sample}, {feature}] is {narrow[sample, feature]}, expected finite numbers: "
            f"replace it, and {(~finite).sum() - 1} others"
        )
    if x.dtype.itemsize < 4:
        return narrow
    coarse = False
    for first in range(0, x.shape[1], _BLOCK):
        block = x[:, first : first + _BLOCK]
        wide = block.astype(np.float64)
        mean, std = wide.mean(axis=0), wide.std(axis=0)
        spread = np.maximum(std, np.abs(wide - mean).max(axis=0) / RARE)
        spread[spread == 0] = 1
        some, names = block[:: -(-len(block) // _ROWS)], range(first, first + len(mean))
        _require_distinct(some, mean, spread, [f"{source}[:, {j}]" for j in names])
        far = np.abs(wide).max(axis=0) > _NARROW * spread
        coarse |= bool((narrow[:, first : first + _BLOCK] != wide)[:, far].any())
    return x.astype(np.float64) if coarse else narrow


def _require_distinct(
    x: np.ndarray, mean: np.ndarray, std: np.ndarray, features: list[str]
) -> None:
    """Refuses features whose different values are one number once standardised in 32 bits."""
    x = np.sort(x, axis=0)
    z = ((x.astype(np.float64) - mean) / std).astype(np.float32)
    whole = x.dtype.kind in "iu"
    size = np.abs(x[[len(x) // 20, -1 - len(x) // 20]]).max(axis=0)  # of all but rare values
    noise = 0 if whole else _NOISE * np.where(size > 0, size, np.abs(x).max(axis=0))
    differ = (x[1:] != x[:-1]) if whole else (x[1:] - x[:-1] > noise)
    met = differ & (z[1:] == z[:-1])
    allowed = 0 if whole else _SHARE * (1 + differ.sum(axis=0))
    wrong = np.flatnonzero(met.sum(axis=0) > allowed)
    if len(wrong):
        j = wrong[0]
        i = np.flatnonzero(met[:, j])[0]
        raise InputError(
            f"{features[j]} has the values {x[i, j]} and {x[i + 1, j]}, which are one "
            f"in 32 bits after (x − mean) / std, with std = {std[j]:.3g}, as are "
            f"{met[:, j].sum() - 1} other pairs: take away what they have in common, take the "
            "logarithm, or remove rare values"
        )
