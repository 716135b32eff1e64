"""A data set: three splits of labelled samples, and what a model needs to know of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64, UInt8
from torch import Tensor

from deeplimit.errors import InputError, several


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


RARE = 10.0  # standard deviations; what lies further out is a rare value, not a scale
_CHUNK = 4096  # images converted at once, so that a memory-mapped set is never copied whole


@dataclass(frozen=True)
class Split:
    """Labelled samples.

    Attributes:
        x: [n, d] for vectors, float32, or float64 where that is too coarse for them before they
            are standardised; uint8 [n, C, H, W] for images, possibly memory-mapped.
        y: int64 [n], the class of each sample.
        standardisation: what `batches` does to the samples last, for a model that does not
            standardise them itself; None for nothing.

    Raises:
        InputError: without samples, when x and y differ in length, or a standardisation of another
            number of channels.
    """

    x: (
        Float[Tensor, "samples features"]
        | UInt8[Tensor, "samples channels height width"]
        | Int64[Tensor, "samples tokens"]
    )
    y: Int64[Tensor, " labels"] | Int64[Tensor, "samples tokens"]
    standardisation: Standardisation | None = None

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y):
            raise InputError(
                f"{several(len(self.x), 'sample')} but {several(len(self.y), 'label')}: give one "
                "label per sample"
            )
        if len(self.y) == 0:
            raise InputError("a split without samples: give it at least one")
        if self.standardisation is not None:
            self.standardisation.check(tuple(self.x.shape[1:]))

    def __len__(self) -> int:
        return len(self.y)

    def batch(
        self, indices: Tensor | np.ndarray | Sequence[int]
    ) -> tuple[Any, Int64[Tensor, "batch ..."]]:
        """Samples and labels at `indices`; images as float32 in [0, 1]."""
        rows = torch.as_tensor(indices, dtype=torch.int64)
        x = self.x[rows]
        if x.dtype == torch.uint8:
            x = x.to(torch.float32).div_(255)
        return x, self.y[rows]

    def take(self, count: int) -> Split:
        """The first `count` samples, without a copy.

        Held-out and training splits are in random order, so there this is a random sample;
        a set's own test part keeps the order of its file.
        """
        if not 1 <= count <= len(self):
            raise InputError(
                f"{several(count, 'sample')} asked of a split of {len(self)}: take 1 to all"
            )
        return replace(self, x=self.x[:count], y=self.y[:count])


@dataclass(frozen=True)
class DataSet:
    """Three disjoint splits: train on one, choose on validation, report on test.

    Attributes:
        name: what `load` was asked for.
        class_names: one per class; class c of `y` is `class_names[c]`.
        train: what parameters are fitted to.
        validation: what depth and settings are chosen on.
        test: what figures are reported on, and nothing else.

    Raises:
        InputError: if the splits' samples differ in shape or kind, or a label has no class name.
    """

    name: str
    class_names: tuple[str, ...]
    train: Split
    validation: Split
    test: Split

    def __post_init__(self) -> None:
        for part in ("validation", "test"):
            split: Split = getattr(self, part)
            if split.x.dtype != self.train.x.dtype or split.x.shape[1:] != self.train.x.shape[1:]:
                raise InputError(
                    f"data set {self.name!r}: {part} samples are {_describe(split.x)}, training "
                    f"samples are {_describe(self.train.x)}: give all parts one shape"
                )
        for part in ("train", "validation", "test"):
            y = getattr(self, part).y
            y = y if self.vocabulary is None else y[y >= 0]  # −100 is no target
            if int(y.min()) < 0 or int(y.max()) >= self.classes:
                raise InputError(
                    f"data set {self.name!r}: {part} labels lie in {int(y.min())} … "
                    f"{int(y.max())}, expected 0 … {self.classes - 1}: correct the labels"
                )

    @property
    def vocabulary(self) -> int | None:
        """How many tokens there are, if the next token is to be predicted; None for classes."""
        return getattr(self.train, "vocabulary", None)

    @property
    def classes(self) -> int:
        """The number of classes C: of the names, or the vocabulary."""
        return self.vocabulary or len(self.class_names)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample: (d,) for vectors, (C, H, W) for images."""
        return tuple(self.train.x.shape[1:])

    @property
    def is_text(self) -> bool:
        """Whether samples are tokens of texts."""
        return self.train.x.dtype == torch.int64

    @property
    def is_image(self) -> bool:
        """Whether samples are images."""
        return self.train.x.dtype == torch.uint8

    def standardised(self, by: Standardisation | None = None) -> DataSet:
        """The same data for a model that does not standardise them itself.

        Args:
            by: the figures; by default those of the training split, per channel or feature.
        """
        if by is None:
            mean, std = self.standardisation()
            by = Standardisation(tuple(mean.tolist()), tuple(std.tolist()))
        parts = ("train", "validation", "test")
        return replace(self, **{p: replace(getattr(self, p), standardisation=by) for p in parts})

    def standardisation(
        self, *, pixelwise: bool = False
    ) -> tuple[Float[Tensor, "*k"], Float32[Tensor, " k"]]:
        """Mean and standard deviation of the training split as the model sees it.

        Args:
            pixelwise: for images, the mean of every pixel, [C, H, W], in place of the channel's:
                for networks that see an image as one vector.

        Returns:
            Mean and (population) standard deviation: per channel, over images in [0, 1], or per
            feature. A constant feature gets standard deviation 1, so that it maps to zero; one that
            is nearly constant at least a tenth of its largest deviation, so that no training sample
            lies further than 10 from zero. The mean is in the precision of x.
        """
        x = self.train.x
        if not self.is_image:
            std, mean = torch.std_mean(x.double(), dim=0, correction=0)
            std = torch.maximum(std, (x - mean).abs().amax(dim=0) / RARE)
            constant = x.amax(dim=0) == x.amin(dim=0)
            return mean.to(x.dtype), torch.where(constant, 1.0, std).float()
        # Sums of integers below 2⁵³ are exact in float64: no cancellation in the variance.
        total = torch.zeros(x.shape[1:], dtype=torch.float64)
        squares = torch.zeros_like(total)
        for chunk in torch.split(x, _CHUNK):
            pixels = chunk.double()
            total += pixels.sum(dim=0)
            squares += pixels.square_().sum(dim=0)
        mean = total / len(x)
        channel = mean.mean(dim=(1, 2))
        variance = squares.mean(dim=(1, 2)) / len(x) - channel.square()
        std = torch.where(variance > 0, variance.sqrt() / 255, 1.0)
        return (mean if pixelwise else channel).float() / 255, std.float()


def _describe(x: Tensor) -> str:
    kind = {torch.uint8: "images", torch.int64: "texts"}.get(x.dtype, "vectors")
    return f"{kind} of shape {'×'.join(str(size) for size in x.shape[1:])}"
