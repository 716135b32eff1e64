"""Mean and standard deviation of samples, applied outside the model that sees them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from deeplimit.errors import InputError


@dataclass(frozen=True)
class Standardisation:
    """x ↦ (x − mean) / std, per channel of images in [0, 1] or per feature of vectors.

    For models that do not standardise by themselves: a split that carries it hands out batches that
    are standardised, after any augmentation.

    Raises:
        InputError: not as many means as deviations, or a deviation that is not above 0.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not self.mean:
            raise InputError(
                f"{len(self.mean)} means and {len(self.std)} standard deviations given; expected "
                "one of each for every channel"
            )
        for mean, std in zip(self.mean, self.std, strict=True):
            if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
                raise InputError(
                    f"mean {mean:g} and standard deviation {std:g} given; expected finite numbers, "
                    "the deviation above 0"
                )

    def check(self, shape: tuple[int, ...]) -> None:
        """Refuse samples of another number of channels or features."""
        if shape[0] != len(self.mean):
            what = "channels" if len(shape) == 3 else "features"
            raise InputError(
                f"{len(self.mean)} means for samples of {shape[0]} {what}: give one for each"
            )

    def apply(
        self, x: Float[Tensor, "batch channels ..."]
    ) -> Float32[Tensor, "batch channels ..."]:
        """A batch, standardised in its own precision, then in 32 bits."""
        shape = (-1,) + (1,) * (x.dim() - 2)
        mean, std = (torch.tensor(f, dtype=x.dtype).reshape(shape) for f in (self.mean, self.std))
        return ((x - mean) / std).float()
