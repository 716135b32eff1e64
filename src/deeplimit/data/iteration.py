"""Batches of a split, the same for one process and for several; images cropped and flipped."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import DataLoader, Dataset, Sampler

from deeplimit.data.dataset import Split
from deeplimit.errors import InputError, several


@dataclass(frozen=True)
class Augmentation:
    """Random changes of images that leave their class alone.

    Attributes:
        crop: pixels of black that are added on each side before a window of the original size
            is cut at random; 0 for none.
        flip: whether half of the images are mirrored left to right.
    """

    crop: int = 0
    flip: bool = False

    def __post_init__(self) -> None:
        if self.crop < 0:
            raise InputError(f"crop of {self.crop} pixels: give 0 (none) or more")

    def check(self, shape: tuple[int, ...]) -> None:
        """Refuse samples that it cannot be applied to."""
        if len(shape) != 3:
            raise InputError(
                f"augmentation is for images, samples have shape {shape}: leave crop and flip off"
            )
        if self.crop >= min(shape[1:]):
            raise InputError(
                f"crop of {self.crop} pixels on images of {shape[1]}×{shape[2]}: "
                f"give less than {min(shape[1:])}"
            )

    def draw(self, samples: int, generator: np.random.Generator) -> Int64[Tensor, "samples 3"]:
        """Per sample: first row and first column of its window, and 1 if it is mirrored.

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
        """The images, each changed by its own row of `draws`."""
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
    """A loader of (x, y) batches of one epoch.

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
    if batch_size < 1:
        raise InputError(f"batch size {batch_size}: give at least 1")
    if world < 1 or not 0 <= rank < world:
        raise InputError(f"rank {rank} of {world} processes: give 0 <= rank < world")
    if augmentation is not None:
        augmentation.check(tuple(split.x.shape[1:]))
    if seed is None:
        if augmentation is not None:
            raise InputError("augmentation without a seed: evaluate without augmentation")
        return _loader(_Samples(split), _Slices(torch.arange(len(split)), batch_size))
    if seed < 0 or epoch < 0:
        raise InputError(f"seed {seed}, epoch {epoch}: give integers of at least 0")

    size = min(batch_size, len(split))
    if size % world:
        raise InputError(
            f"a batch of {several(size, 'sample')} cannot be shared by {world} processes: "
            f"give a multiple of {world}, at most the split's {several(len(split), 'sample')}"
        )
    order = torch.from_numpy(_generator(seed, epoch, _ORDER).permutation(len(split)))
    complete = order[: len(split) // size * size].view(-1, world, size // world)
    draws = None
    if augmentation is not None:
        draws = augmentation.draw(len(split), _generator(seed, epoch, _AUGMENTATION))
    return _loader(
        _Samples(split, augmentation, draws), _Slices(complete[:, rank].flatten(), size // world)
    )


def _generator(seed: int, epoch: int, stream: int) -> np.random.Generator:
    return np.random.default_rng([seed, epoch, stream])


class _Samples(Dataset[Batch]):
    """A split that is asked for whole batches at once."""

    def __init__(
        self,
        split: Split,
        augmentation: Augmentation | None = None,
        draws: Tensor | None = None,
    ) -> None:
        self.split, self.augmentation, self.draws = split, augmentation, draws

    def __len__(self) -> int:
        return len(self.split)

    def __getitems__(self, indices: list[int]) -> Batch:
        x, y = self.split.batch(indices)
        if self.augmentation is not None and self.draws is not None:
            x = self.augmentation.apply(x, self.draws[indices])
        if self.split.standardisation is not None:
            x = self.split.standardisation.apply(x)
        return x, y


class _Slices(Sampler[list[int]]):
    """Sample numbers, a batch at a time."""

    def __init__(self, order: Tensor, size: int) -> None:
        self.parts = [part.tolist() for part in torch.split(order, size)]

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.parts)


def _identity(batch: Any) -> Any:
    return batch


def _loader(samples: _Samples, slices: _Slices) -> DataLoader[Batch]:
    # Its own generator: without one a DataLoader draws from torch's global random state.
    return DataLoader(
        samples, batch_sampler=slices, collate_fn=_identity, generator=torch.Generator()
    )
