"""A data set: three splits of labelled samples, what a model needs to know of them, batches.

They are the same for one process and for several.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64, UInt8
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import DataLoader, Dataset

from deeplimit.errors import InputError, refuse, several

PARTS = ("train", "validation", "test")
RARE = 10.0  # standard deviations; what lies further out is a rare value, not a scale
_CHUNK = 4096  # images converted at once, so that a memory-mapped set is never copied whole
_ORDER, _AUGMENTATION = 0, 1  # independent random streams of one (seed, epoch)

Batch = tuple[Any, Tensor]  # samples: a tensor, of texts tensors by name


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
        x = self.train.x
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


def _describe(x: Tensor) -> str:
    kind = {torch.uint8: "images", torch.int64: "texts"}.get(x.dtype, "vectors")
    return f"{kind} of shape {'×'.join(str(size) for size in x.shape[1:])}"


@dataclass(frozen=True)
class Augmentation:
    """Random changes of images that leave their class alone.

    Attributes:
        crop: pixels of black that are added on each side before a window of the original size
            is cut at random; 0 for none.
        flip: whether half of the images are mirrored left to right.

    >>> Augmentation(crop=4, flip=True).check((3, 32, 32))
    """

    crop: int = 0
    flip: bool = False

    def __post_init__(self) -> None:
        if self.crop < 0:
            raise InputError(f"crop of {self.crop} pixels: give 0 (none) or more")

    def check(self, shape: tuple[int, ...]) -> None:
        """Refuses samples that it cannot be applied to."""
        if len(shape) != 3:
            raise InputError(f"augmentation is for images, samples have shape {shape}: give none")
        if self.crop >= min(shape[1:]):
            raise InputError(
                f"crop of {self.crop} pixels on images of {shape[1]}×{shape[2]}: "
                f"give less than {min(shape[1:])}"
            )

    def draw(self, samples: int, generator: np.random.Generator) -> Int64[Tensor, "samples 3"]:
        """Draws each sample's first row and column of its window, and 1 if it is mirrored.

        Both kinds are always drawn, so that switching one on leaves the other's draws alone.
        """
        window = generator.integers(0, 2 * self.crop, (samples, 2), endpoint=True)
        mirrored = generator.integers(0, 2, (samples, 1)) * self.flip
        return torch.from_numpy(np.concatenate([window, mirrored], axis=1))

    def apply(
        self,
        images: Float32[Tensor, "batch channels height width"],
        draws: Int64[Tensor, "batch 3"],
    ) -> Float32[Tensor, "batch channels height width"]:
        """Changes each of the images by its own row of `draws`."""
        top, left, mirrored = draws.unbind(dim=1)
        if self.crop:
            height, width = images.shape[-2:]
            # A view of all windows [batch, C, 2·crop + 1, 2·crop + 1, H, W]; one gather picks.
            windows = pad(images, (self.crop,) * 4).unfold(2, height, 1).unfold(3, width, 1)
            images = windows[torch.arange(len(images)), :, top, left]
        if self.flip:
            images = torch.where(mirrored.bool()[:, None, None, None], images.flip(-1), images)
        return images


def iter_batches(
    split: Split,
    batch_size: int,
    *,
    seed: int | None = None,
    epoch: int = 0,
    rank: int = 0,
    world: int = 1,
    augmentation: Augmentation | None = None,
) -> DataLoader[Batch]:
    """Makes a loader of (x, y) batches of one epoch.

    >>> split = Split(torch.zeros(5, 2), torch.arange(5))
    >>> [len(y) for _, y in iter_batches(split, 2)]
    [2, 2, 1]

    Without a seed, for evaluation: every sample, in order, on every rank; the last batch may be
    smaller. With a seed, for training: the permutation and the augmentation are functions of
    (seed, epoch) alone; an incomplete last global batch is dropped; each rank gets its contiguous
    slice of every global batch, so that the ranks' batches, concatenated, are those of one process.
    Global random state is neither read nor changed. The split's standardisation comes last.

    Args:
        split: the samples.
        batch_size: samples of a *global* batch; a smaller split is one batch.
        seed: of the training order, ≥ 0; None for evaluation.
        epoch: which pass over the data, ≥ 0.
        rank: this process, 0 … world − 1.
        world: the number of processes; divides the batch.
        augmentation: of images, in training only.

    Raises:
        InputError: on arguments out of range, a batch that `world` does not divide, augmentation
            of vectors or without a seed.
    """
    table = (
        (batch_size < 1, f"batch size {batch_size}: give at least 1"),
        (not 0 <= rank < world, f"rank {rank} of {world} processes: give 0 <= rank < world"),
        (seed is None and augmentation, "augmentation without a seed: evaluate without it"),
        ((seed or 0) < 0 or epoch < 0, f"seed {seed}, epoch {epoch}: give integers of at least 0"),
    )
    refuse("iter_batches", (fault for wrong, fault in table if wrong))
    if augmentation is not None:
        augmentation.check(tuple(split.x.shape[1:]))
    draws = None
    if seed is None:
        rows = torch.split(torch.arange(len(split)), batch_size)
    else:
        size = min(batch_size, len(split))
        if size % world:
            raise InputError(
                f"a batch of {several(size, 'sample')} cannot be shared by {world} processes: "
                f"give a multiple of {world}, at most the split's {several(len(split), 'sample')}"
            )
        order = np.random.default_rng([seed, epoch, _ORDER]).permutation(len(split))
        complete = torch.from_numpy(order[: len(split) // size * size])
        rows = complete.view(-1, world, size // world)[:, rank].unbind()
        if augmentation is not None:
            generator = np.random.default_rng([seed, epoch, _AUGMENTATION])
            draws = augmentation.draw(len(split), generator)
    batches: Any = _Batches(split, augmentation, draws)
    # Its own generator: without one a DataLoader draws from torch's global random state.
    own = torch.Generator()
    return DataLoader(batches, batch_size=None, sampler=rows, collate_fn=tuple, generator=own)


@dataclass(frozen=True)
class _Batches(Dataset[Batch]):
    """A split whose items are whole batches, by their rows."""

    split: Split
    augmentation: Augmentation | None = None
    draws: Tensor | None = None

    def __getitem__(self, rows: Tensor) -> Batch:
        x, y = self.split.batch(rows)
        if self.augmentation is not None and self.draws is not None:
            x = self.augmentation.apply(x, self.draws[rows])
        if self.split.standardisation is not None:
            x = self.split.standardisation.apply(x)
        return x, y
