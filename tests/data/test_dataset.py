"""Split, DataSet and standardisation."""

import numpy as np
import pytest
import torch

from deeplimit.data import DataSet, Split
from deeplimit.errors import InputError


def vectors(count: int, features: int = 3) -> Split:
    return Split(torch.arange(count * features).float().view(count, features), torch.arange(count))


def test_batch_scales_images_and_leaves_vectors_alone() -> None:
    x = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1)
    images = Split(x, torch.tensor([4, 5, 6]))
    for indices in ([2, 1], torch.tensor([2, 1]), np.array([2, 1])):
        batch, y = images.batch(indices)
        assert batch.dtype == torch.float32
        assert batch.flatten().tolist() == pytest.approx([1.0, 0.2])
        assert y.tolist() == [6, 5]
    x, y = vectors(4).batch([3, 0])
    assert x.tolist() == [[9, 10, 11], [0, 1, 2]]
    assert y.tolist() == [3, 0]


def test_take_is_a_view_of_the_first_samples() -> None:
    split = vectors(5)
    few = split.take(2)
    assert len(few) == 2
    assert few.y.tolist() == [0, 1]
    assert few.x.data_ptr() == split.x.data_ptr()
    with pytest.raises(InputError, match="6 samples asked of a split of 5"):
        split.take(6)


def test_split_refuses_mismatch_and_emptiness() -> None:
    with pytest.raises(InputError, match="3 samples but 2 labels"):
        Split(torch.zeros(3, 1), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(InputError, match="without samples"):
        Split(torch.zeros(0, 1), torch.zeros(0, dtype=torch.int64))


def test_dataset_properties() -> None:
    split = Split(torch.zeros(2, 3, 4, 5, dtype=torch.uint8), torch.tensor([0, 1]))
    data = DataSet("x", ("a", "b"), split, split, split)
    assert (data.classes, data.shape, data.is_image) == (2, (3, 4, 5), True)
    split = vectors(2)
    data = DataSet("x", ("a", "b"), split, split, split)
    assert (data.classes, data.shape, data.is_image) == (2, (3,), False)


def test_dataset_refuses_parts_that_differ() -> None:
    with pytest.raises(InputError, match="test samples are vectors of shape 2"):
        DataSet("x", ("a", "b", "c"), vectors(3), vectors(3), vectors(3, features=2))
    with pytest.raises(InputError, match=r"validation labels lie in 0 … 3, expected 0 … 2"):
        DataSet("x", ("a", "b", "c"), vectors(3), vectors(4), vectors(3))


def test_standardisation_of_vectors() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 4, generator=generator) * torch.tensor([1.0, 5.0, 0.0, 2.0])
    x[:, 2] = 0.1  # constant, and not a binary fraction: its computed std is not quite zero
    data = DataSet(
        "x", ("a", "b"), Split(x, torch.arange(50) % 2), vectors(2, 4).take(2), vectors(2, 4)
    )
    mean, std = data.standardisation()
    expected = x.numpy().astype(np.float64)
    np.testing.assert_allclose(mean, expected.mean(0), rtol=1e-6)
    np.testing.assert_allclose(std[[0, 1, 3]], expected.std(0)[[0, 1, 3]], rtol=1e-6)
    assert std[2] == 1


def test_a_rare_value_is_not_blown_up_whatever_the_scale() -> None:
    x = torch.zeros(10_000, 2)
    x[0] = torch.tensor([1.0, 1e-4])
    data = DataSet(
        "x", ("a", "b"), Split(x, torch.arange(10_000) % 2), vectors(2, 2), vectors(2, 2)
    )
    mean, std = data.standardisation()
    largest = ((x - mean) / std).abs().amax(0)
    torch.testing.assert_close(largest, torch.tensor([10.0, 10.0]))


def test_standardisation_of_images_is_per_channel_of_the_training_split() -> None:
    generator = torch.Generator().manual_seed(0)
    # More images than one chunk of the computation, and a constant third channel.
    x = torch.randint(0, 256, (5000, 3, 2, 2), generator=generator, dtype=torch.uint8)
    x[:, 0] //= 4
    x[:, 2] = 77
    y = torch.arange(5000) % 2
    other = Split(x[:2] // 2, y[:2])
    mean, std = DataSet("x", ("a", "b"), Split(x, y), other, other).standardisation()
    pixels = x.numpy() / 255
    np.testing.assert_allclose(mean, pixels.mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(std[:2], pixels.std((0, 2, 3))[:2], rtol=1e-6)
    assert std[2] == 1
    image, same = DataSet("x", ("a", "b"), Split(x, y), other, other).standardisation(
        pixelwise=True
    )
    np.testing.assert_allclose(image, pixels.mean(0), rtol=1e-6)
    assert torch.equal(same, std)
