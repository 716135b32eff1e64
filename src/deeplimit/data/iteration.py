"""Batches of a split, the same for one process and for several; images cropped and flipped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import DataLoader, Dataset

from deeplimit.data.dataset import Split
from deeplimit.errors import InputError, refuse, several


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


_ORDER, _AUGMENTATION = 0, 1  # independent random streams of one (seed, epoch)

Batch = tuple[Any, Tensor]  # samples: a tensor, of texts tensors by name


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
    batches = _Batches(split, rows, augmentation, draws)
    # Its own generator: without one a DataLoader draws from torch's global random state.
    own = torch.Generator()
    return DataLoader(batches, batch_size=None, collate_fn=_identity, generator=own)


@dataclass(frozen=True)
class _Batches(Dataset[Batch]):
    """A split in whole batches: those of these rows."""

    split: Split
    rows: Sequence[Tensor]
    augmentation: Augmentation | None = None
    draws: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Batch:
        rows = self.rows[number]
        x, y = self.split.batch(rows)
        if self.augmentation is not None and self.draws is not None:
            x = self.augmentation.apply(x, self.draws[rows])
        if self.split.standardisation is not None:
            x = self.split.standardisation.apply(x)
        return x, y


def _identity(batch: Any) -> Any:
    return batch
