"""Standardised samples: their figures, and how precise x has to be before it is standardised."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from deeplimit.errors import InputError, refuse

RARE = 10.0  # standard deviations; what lies further out is a rare value, not a scale
_CHUNK = 4096  # images converted at once, so that a memory-mapped set is never copied whole
_NARROW = 16  # standard deviations; so far from 0 a feature can lie and lose nothing in 32 bits
_ROWS = 10_000  # looked at, evenly spread; of more, neighbouring values meet in 32 bits by chance
_BLOCK = 64  # features at once
_NOISE = 2.0**-42  # of a large value: what arithmetic in 64 bits leaves between equal values
_SHARE = 0.01  # of a feature's values that may meet others: those of a smooth distribution


@dataclass(frozen=True)
class Standardisation:
    """x ↦ (x − mean) / std, per channel of images in [0, 1] or per feature of vectors.

    For models that do not standardise by themselves: a split that carries it hands out batches that
    are standardised, after any augmentation.

    >>> Standardisation(mean=(1.0, 0.0), std=(2.0, 1.0)).apply(torch.tensor([[5.0, 3.0]]))
    tensor([[2., 3.]])

    Raises:
        InputError: not as many means as deviations, or a deviation that is not above 0.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        refuse("standardisation", self._faults())

    def _faults(self) -> Iterator[str]:
        if len(self.mean) != len(self.std) or not self.mean:
            yield (
                f"{len(self.mean)} means and {len(self.std)} standard deviations given; expected "
                "one of each for every channel"
            )
        for mean, std in zip(self.mean, self.std, strict=True):
            if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
                yield (
                    f"mean {mean:g} and standard deviation {std:g} given; expected finite numbers, "
                    "the deviation above 0"
                )

    def check(self, shape: tuple[int, ...]) -> None:
        """Refuses samples of another number of channels or features."""
        if shape[0] != len(self.mean):
            what = "channels" if len(shape) == 3 else "features"
            raise InputError(
                f"{len(self.mean)} means for samples of {shape[0]} {what}: give one for each"
            )

    def apply(
        self, x: Float[Tensor, "batch channels ..."]
    ) -> Float32[Tensor, "batch channels ..."]:
        """Standardises a batch in its own precision, then in 32 bits."""
        shape = (-1,) + (1,) * (x.dim() - 2)
        mean, std = (torch.tensor(f, dtype=x.dtype).reshape(shape) for f in (self.mean, self.std))
        return ((x - mean) / std).float()


def figures_of(x: Tensor, *, pixelwise: bool = False) -> tuple[Tensor, Tensor]:
    """Computes the mean and the population's deviation, as `DataSet.standardisation` says."""
    if x.dtype != torch.uint8:
        std, mean = torch.std_mean(x.double(), dim=0, correction=0)
        std = torch.maximum(std, (x - mean).abs().amax(dim=0) / RARE)
        constant = x.amax(dim=0) == x.amin(dim=0)
        return mean.to(x.dtype), torch.where(constant, 1.0, std).float()
    # Sums of integers below 2⁵³ are exact in float64: no cancellation in the variance.
    total, squares = torch.zeros(2, *x.shape[1:], dtype=torch.float64)
    for chunk in torch.split(x, _CHUNK):
        pixels = chunk.double()
        total += pixels.sum(dim=0)
        squares += pixels.square_().sum(dim=0)
    mean = total / len(x)
    channel = mean.mean(dim=(1, 2))
    variance = squares.mean(dim=(1, 2)) / len(x) - channel.square()
    std = torch.where(variance > 0, variance.sqrt() / 255, 1.0)
    return (mean if pixelwise else channel).float() / 255, std.float()


def checked_vectors(x: np.ndarray, source: str) -> np.ndarray:
    """Samples [n, d] as float32, or as float64 where float32 is too coarse; every number finite.

    A network standardises its inputs, z = (x − mean) / std, and goes on in 32 bits. That is fine
    for x near 0; where it lies further out than its spread, such as a year or x + 10⁹, the rounding
    of x itself would be seen, so x stays in 64 bits until it is standardised. Refused is a feature
    whose different values become one: two integers, or more than 1 % of its floats. So it is with a
    rare value far from all others, or with identification numbers of more than 16 digits.
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
    wrong = np.flatnonzero(met.sum(axis=0) > (0 if whole else _SHARE * (1 + differ.sum(axis=0))))
    if len(wrong):
        j = wrong[0]
        i = np.flatnonzero(met[:, j])[0]
        raise InputError(
            f"{features[j]} has the values {x[i, j]} and {x[i + 1, j]}, which are one "
            f"in 32 bits after (x − mean) / std, with std = {std[j]:.3g}, as are "
            f"{met[:, j].sum() - 1} other pairs: take away what they have in common, take the "
            "logarithm, or remove rare values"
        )
