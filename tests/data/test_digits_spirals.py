"""The two sets that need no files."""

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from deeplimit.data import DataSet, load_dataset


def rows(data: DataSet) -> torch.Tensor:
    return torch.cat([data.train.x, data.validation.x, data.test.x])


def test_digits_are_scikit_learns_split_once() -> None:
    data = load_dataset("digits", seed=3)
    pixels, labels = load_digits(return_X_y=True)
    assert (data.name, data.shape, data.is_image) == ("digits", (1, 8, 8), True)
    assert data.class_names == tuple("0123456789")
    assert (len(data.train), len(data.validation), len(data.test)) == (1079, 359, 359)
    # The splits together are the set, each sample once and with its own label.
    grey = np.rint(rows(data).flatten(1).numpy() / 255 * 16)
    ours = np.column_stack([grey, torch.cat([data.train.y, data.validation.y, data.test.y])])
    theirs = np.column_stack([pixels, labels])
    assert np.array_equal(ours[np.lexsort(ours.T)], theirs[np.lexsort(theirs.T)])
    shares = [np.bincount(s.y) / len(s) for s in (data.train, data.validation, data.test)]
    assert np.ptp(shares, axis=0).max() < 0.005
    # Whatever the training seed, the same samples are held out.
    assert torch.equal(load_dataset("digits", seed=0).test.x, data.test.x)


def test_spirals_come_from_the_seed_and_are_learnable() -> None:
    data = load_dataset("spirals", seed=1)
    assert (data.shape, data.classes) == ((2,), 2)
    assert (len(data.train), len(data.validation), len(data.test)) == (600, 200, 200)
    assert torch.equal(torch.bincount(data.test.y), torch.tensor([100, 100]))
    assert torch.equal(load_dataset("spirals", seed=1).train.x, data.train.x)
    assert not torch.equal(load_dataset("spirals", seed=2).train.x, data.train.x)
    assert 0.9 < rows(data).norm(dim=1).max() < 1.1
    for seed in range(5):
        data = load_dataset("spirals", seed=seed)
        neighbours = KNeighborsClassifier(5).fit(data.train.x, data.train.y)
        assert neighbours.score(data.test.x, data.test.y) >= 0.99
        # No straight line does it: the depth of a network is needed.
        signed = torch.where(data.train.y[:, None] == 1, data.train.x, -data.train.x)
        assert signed.mean(dim=0).norm() < 0.3
