"""Crops and flips against one image at a time."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deeplimit.data import Augmentation
from deeplimit.errors import InputError


def naive(image: np.ndarray, crop: int, top: int, left: int, mirrored: int) -> np.ndarray:
    """One image [C, H, W]: embed in black, cut the window, mirror."""
    channels, height, width = image.shape
    padded = np.zeros((channels, height + 2 * crop, width + 2 * crop), image.dtype)
    padded[:, crop : crop + height, crop : crop + width] = image
    window = padded[:, top : top + height, left : left + width]
    return window[:, :, ::-1] if mirrored else window


@pytest.mark.slow
@settings(deadline=None, derandomize=True)
@given(
    st.integers(0, 3),
    st.booleans(),
    st.integers(0, 2**32),
    st.sampled_from([(1, 4, 4), (3, 5, 7), (2, 8, 4)]),
)
def test_equals_one_image_at_a_time(crop: int, flip: bool, seed: int, shape: tuple) -> None:
    generator = np.random.default_rng(seed)
    images = generator.random((9, *shape), dtype=np.float32)
    augmentation = Augmentation(crop, flip)
    draws = augmentation.draw(len(images), generator)
    result = augmentation.apply(torch.from_numpy(images), draws).numpy()
    expected = [
        naive(*pair)
        for pair in ((i, crop, *d) for i, d in zip(images, draws.tolist(), strict=True))
    ]
    assert np.array_equal(result, np.stack(expected))


def test_draws_are_uniform() -> None:
    draws = Augmentation(crop=2, flip=True).draw(20_000, np.random.default_rng(0))
    for column, values in enumerate((5, 5, 2)):
        counts = torch.bincount(draws[:, column], minlength=values)
        assert len(counts) == values
        # Within five standard deviations of a binomial count.
        share = 1 / values
        spread = 5 * (20_000 * share * (1 - share)) ** 0.5
        assert (counts - 20_000 * share).abs().max() < spread


def test_switching_the_flip_on_leaves_the_crops_alone() -> None:
    crops = [Augmentation(3, flip).draw(50, np.random.default_rng(7)) for flip in (False, True)]
    assert torch.equal(crops[0][:, :2], crops[1][:, :2])
    assert crops[0][:, 2].sum() == 0
    assert crops[1][:, 2].sum() > 0


def test_refusals() -> None:
    with pytest.raises(InputError, match="crop of -1 pixels"):
        Augmentation(crop=-1)
    with pytest.raises(InputError, match="augmentation is for images"):
        Augmentation(flip=True).check((64,))
    with pytest.raises(InputError, match="crop of 4 pixels on images of 4×9: give less than 4"):
        Augmentation(crop=4).check((1, 4, 9))
