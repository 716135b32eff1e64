"""Random crops and flips of images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor
from torch.nn.functional import pad

from deeplimit.errors import InputError


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
