"""Samples standardised outside the model: the figures, their place behind the augmentation."""

import math

import pytest
import torch

from deeplimit.data import Augmentation, DataSet, Split, Standardisation, iter_batches
from deeplimit.errors import InputError

IMAGES = Split(
    torch.randint(0, 256, (6, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator()),
    torch.tensor([0, 1, 0, 1, 0, 1]),
)
SCALE = Standardisation((0.1, 0.5, 0.9), (0.5, 2.0, 0.25))


def data(split: Split) -> DataSet:
    return DataSet("some", ("a", "b"), split, split, split)


def test_each_channel_by_its_own_figures() -> None:
    (plain, _), (x, y) = (next(iter(iter_batches(d.test, 6))) for d in (data(IMAGES), scaled()))
    for c in range(3):
        torch.testing.assert_close(x[:, c], (plain[:, c] - SCALE.mean[c]) / SCALE.std[c])
    assert torch.equal(y, IMAGES.y)


def scaled() -> DataSet:
    return data(IMAGES).standardised(SCALE)


def test_the_training_splits_own_figures_by_default() -> None:
    x = torch.cat([x for x, _ in iter_batches(data(IMAGES).standardised().train, 2)])
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3), correction=0), torch.ones(3))


def test_features_of_vectors() -> None:
    vectors = Split(torch.tensor([[1.0, 10.0], [3.0, 10.0]]), torch.tensor([0, 1]))
    (x, _) = next(iter(iter_batches(data(vectors).standardised().train, 2)))
    assert x.tolist() == [[-1.0, 0.0], [1.0, 0.0]]


def test_the_padding_of_a_crop_is_black_as_a_model_sees_black() -> None:
    """Standardised last: as if the model itself did it."""
    same = {"seed": 3, "augmentation": Augmentation(crop=2, flip=True)}
    (plain, _), (x, _) = (
        next(iter(iter_batches(d.train, 6, **same))) for d in (data(IMAGES), scaled())
    )
    assert (plain == 0).all(dim=1).any()  # some padding is seen
    torch.testing.assert_close(x, SCALE.apply(plain), rtol=0, atol=0)


def test_fewer_samples_keep_it() -> None:
    assert scaled().train.take(2).standardisation == SCALE


@pytest.mark.parametrize(
    ("mean", "std", "says"),
    [
        ((0.1,), (1.0, 1.0), "1 means and 2 standard deviations"),
        ((), (), "0 means"),
        ((0.1,), (0.0,), "standard deviation 0 given"),
        ((math.nan,), (1.0,), "mean nan"),
    ],
)
def test_wrong_figures(mean: tuple[float, ...], std: tuple[float, ...], says: str) -> None:
    with pytest.raises(InputError, match=says):
        Standardisation(mean, std)


def test_another_number_of_channels() -> None:
    with pytest.raises(InputError, match="1 means for samples of 3 channels"):
        data(IMAGES).standardised(Standardisation((0.0,), (1.0,)))
