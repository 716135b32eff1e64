"""A data set: three splits of labelled samples, and what a model needs to know of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64, UInt8
from torch import Tensor

from deeplimit.data.standardisation import Standardisation, figures_of
from deeplimit.errors import InputError, refuse, several

PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class Split:
    """Labelled samples.

    >>> split = Split(torch.tensor([[0.5], [1.5]]), torch.tensor([0, 1]))
    >>> split.batch([1])
    (tensor([[1.5000]]), tensor([1]))

    Attributes:
        x: [n, d] for vectors, float32, or float64 where that is too coarse for them before they
            are standardised; uint8 [n, C, H, W] for images, possibly memory-mapped.
        y: int64 [n], the class of each sample.
        standardisation: what `iter_batches` does to the samples last, for a model that does not
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
        if len(self.x) != len(self.y) or not len(self.y):
            found = f"{several(len(self.x), 'sample')} but {several(len(self.y), 'label')}"
            found = found if len(self.x) != len(self.y) else "a split without samples"
            raise InputError(f"{found}: give at least one, and one label per sample")
        if self.standardisation is not None:
            self.standardisation.check(tuple(self.x.shape[1:]))

    def __len__(self) -> int:
        return len(self.y)

    def batch(
        self, indices: Tensor | np.ndarray | Sequence[int]
    ) -> tuple[Any, Int64[Tensor, "batch ..."]]:
        """Returns samples and labels at `indices`; images as float32 in [0, 1]."""
        rows = torch.as_tensor(indices, dtype=torch.int64)
        x = self.x[rows]
        if x.dtype == torch.uint8:
            x = x.to(torch.float32).div_(255)
        return x, self.y[rows]

    def take(self, count: int) -> Split:
        """Returns the first `count` samples, without a copy.

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

    >>> split = Split(torch.rand(4, 3), torch.tensor([0, 1, 1, 0]))
    >>> DataSet("mine", ("no", "yes"), train=split, validation=split, test=split).classes
    2

    Attributes:
        name: what `load_dataset` was asked for.
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
        refuse(f"data set {self.name!r}", self._faults())

    def _faults(self) -> Iterator[str]:
        x = self.train.x
        for part in PARTS:
            split: Split = getattr(self, part)
            if (split.x.dtype, split.x.shape[1:]) != (x.dtype, x.shape[1:]):
                yield (
                    f"{part} samples are {_describe(split.x)}, training samples are {_describe(x)}:"
                    " give all parts one shape"
                )
            y = split.y if self.vocabulary is None else split.y[split.y >= 0]  # −100 is no target
            if int(y.min()) < 0 or int(y.max()) >= self.classes:
                yield (
                    f"{part} labels lie in {int(y.min())} … {int(y.max())}, expected "
                    f"0 … {self.classes - 1}: correct the labels"
                )

    @property
    def vocabulary(self) -> int | None:
        """The number of tokens there are, if the next one is to be predicted; None for classes."""
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
        """True if samples are tokens of texts."""
        return self.train.x.dtype == torch.int64

    @property
    def is_image(self) -> bool:
        """True if samples are images."""
        return self.train.x.dtype == torch.uint8

    def standardised(self, by: Standardisation | None = None) -> DataSet:
        """Returns the same data for a model that does not standardise them itself.

        Args:
            by: the figures; by default those of the training split, per channel or feature.
        """
        if by is None:
            mean, std = self.standardisation()
            by = Standardisation(tuple(mean.tolist()), tuple(std.tolist()))
        return replace(self, **{p: replace(getattr(self, p), standardisation=by) for p in PARTS})

    def standardisation(
        self, *, pixelwise: bool = False
    ) -> tuple[Float[Tensor, "*k"], Float32[Tensor, " k"]]:
        """Computes mean and standard deviation of the training split as the model sees it.

        Args:
            pixelwise: for images, the mean of every pixel, [C, H, W], in place of the channel's:
                for networks that see an image as one vector.

        Returns:
            Mean and (population) standard deviation: per channel, over images in [0, 1], or per
            feature. A constant feature gets standard deviation 1, so that it maps to zero; one that
            is nearly constant at least a tenth of its largest deviation, so that no training sample
            lies further than 10 from zero. The mean is in the precision of x.
        """
        return figures_of(self.train.x, pixelwise=pixelwise)


def _describe(x: Tensor) -> str:
    kind = {torch.uint8: "images", torch.int64: "texts"}.get(x.dtype, "vectors")
    return f"{kind} of shape {'×'.join(str(size) for size in x.shape[1:])}"
