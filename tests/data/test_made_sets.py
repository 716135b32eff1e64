"""The sets that need no files."""

from collections import deque

import numpy as np
import pytest
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


def paths_from(maze: list[list[bool]], start: tuple[int, int]) -> dict[tuple[int, int], int]:
    """Breadth first, one cell at a time."""
    lengths, queue = {start: 0}, deque([start])
    while queue:
        row, column = queue.popleft()
        for cell in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
            inside = 0 <= cell[0] < 8 and 0 <= cell[1] < 8
            if inside and maze[cell[0]][cell[1]] and cell not in lengths:
                lengths[cell] = lengths[row, column] + 1
                queue.append(cell)
    return lengths


@pytest.mark.slow
def test_in_a_maze_a_path_leads_from_one_paint_to_the_mark_and_from_the_other_none() -> None:
    data = load_dataset("mazes", seed=1)
    assert (data.shape, data.class_names) == ((3, 8, 8), ("red", "blue"))
    assert (len(data.train), len(data.validation), len(data.test)) == (12_000, 4_000, 4_000)
    assert 0.48 < data.train.y.float().mean() < 0.52
    assert torch.equal(load_dataset("mazes", seed=1).test.x, data.test.x)
    assert not torch.equal(load_dataset("mazes", seed=2).test.x, data.test.x)
    share, larger = [], []
    for x, y in zip(data.test.x[:1000], data.test.y[:1000].tolist(), strict=True):
        colors = [[tuple(cell) for cell in row] for row in x.permute(1, 2, 0).tolist()]
        places = {color: (i, j) for i, row in enumerate(colors) for j, color in enumerate(row)}
        assert set(places) == {(0,) * 3, (128,) * 3, (255, 0, 0), (0, 0, 255), (0, 255, 0)}
        assert sum(color[0] != color[1] or color[1] != color[2] for r in colors for color in r) == 3
        maze = [[any(color) for color in row] for row in colors]
        own, other = (paths_from(maze, places[c]) for c in ((255, 0, 0), (0, 0, 255))[:: 1 - 2 * y])
        mark = places[0, 255, 0]
        assert mark in own
        assert mark not in other
        share.append((own[mark] - 0.5) / max(own.values()))
        larger.append(len(own) > len(other))
    assert np.mean(share) == pytest.approx(0.5, abs=0.03)  # each length is as likely
    assert np.histogram(share, 4, (0, 1))[0].min() > 150
    assert np.mean(larger) == pytest.approx(0.5, abs=0.05)  # how far it spreads tells nothing
