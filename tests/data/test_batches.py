"""Batches: one process and several, epochs, evaluation."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deeplimit.data import Augmentation, Split, iter_batches
from deeplimit.errors import InputError


def images(count: int) -> Split:
    """Images whose label is their number."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (count, 3, 6, 5), generator=generator, dtype=torch.uint8)
    return Split(x, torch.arange(count))


@pytest.mark.slow
@settings(deadline=None, derandomize=True)
@given(
    st.integers(1, 40),
    st.integers(1, 12),
    st.sampled_from([1, 2, 3]),
    st.integers(0, 2**31),
    st.integers(0, 5),
    st.sampled_from([None, Augmentation(crop=2, flip=True)]),
)
def test_ranks_together_see_what_one_process_sees(
    count: int,
    per_rank: int,
    world: int,
    seed: int,
    epoch: int,
    augmentation: Augmentation | None,
) -> None:
    split, size = images(count * world), per_rank * world
    chosen = {"seed": seed, "epoch": epoch, "augmentation": augmentation}
    whole = list(iter_batches(split, size, **chosen))
    ranks = [iter_batches(split, size, rank=rank, world=world, **chosen) for rank in range(world)]
    assert all(len(loader) == len(whole) for loader in ranks)
    for (x, y), *parts in zip(whole, *ranks, strict=True):
        assert torch.equal(x, torch.cat([part for part, _ in parts]))
        assert torch.equal(y, torch.cat([labels for _, labels in parts]))
    seen = torch.cat([y for _, y in whole])
    size = min(size, len(split))
    assert len(seen) == len(seen.unique()) == len(split) // size * size
    assert all(len(y) == size for _, y in whole)


def test_samples_keep_their_labels() -> None:
    split = images(10)
    for x, y in iter_batches(split, 4, seed=0):
        assert torch.equal(x, split.x[y] / 255)


def test_permutation_is_a_function_of_seed_and_epoch() -> None:
    split = images(50)

    def order(seed: int, epoch: int, augmentation: Augmentation | None = None) -> list[int]:
        loader = iter_batches(split, 10, seed=seed, epoch=epoch, augmentation=augmentation)
        return torch.cat([y for _, y in loader]).tolist()

    first = order(3, 1)
    torch.manual_seed(99)
    np.random.seed(99)
    assert order(3, 1) == first
    assert order(3, 1, Augmentation(flip=True)) == first
    # (1, 3) and (3, 1) too: seed and epoch are not merely added.
    others = [order(3, 0), order(3, 2), order(2, 1), order(4, 0), order(1, 3)]
    assert all(other != first for other in others)
    assert sorted(first) == list(range(50))


def test_augmentation_repeats_per_epoch_and_sample_and_differs_between_epochs() -> None:
    split = images(30)

    def by_sample(epoch: int, size: int) -> torch.Tensor:
        augmentation = Augmentation(crop=2, flip=True)
        loader = iter_batches(split, size, seed=5, epoch=epoch, augmentation=augmentation)
        pairs = list(loader)
        order = torch.cat([y for _, y in pairs]).argsort()
        return torch.cat([x for x, _ in pairs])[order]

    # Also under another batch size: a sample's draw is its own.
    assert torch.equal(by_sample(0, 10), by_sample(0, 15))
    assert not torch.equal(by_sample(0, 10), by_sample(1, 10))


def test_a_loader_repeats_itself_and_leaves_global_random_state_alone() -> None:
    torch.manual_seed(0)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    loader = iter_batches(images(20), 4, seed=1, augmentation=Augmentation(crop=1, flip=True))
    assert isinstance(loader, torch.utils.data.DataLoader)
    first, second = list(loader), list(loader)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, second, strict=True))
    list(iter_batches(images(20), 4))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])


@pytest.mark.parametrize("rank", [0, 1])
def test_evaluation_sees_every_sample_in_order_on_every_rank(rank: int) -> None:
    split = images(11)
    pairs = list(iter_batches(split, 4, rank=rank, world=2))
    assert [len(y) for _, y in pairs] == [4, 4, 3]
    assert torch.cat([y for _, y in pairs]).tolist() == list(range(11))
    assert torch.equal(torch.cat([x for x, _ in pairs]), split.x / 255)


def test_refusals() -> None:
    split = images(7)
    with pytest.raises(InputError, match="batch of 5 samples cannot be shared by 2 processes"):
        iter_batches(split, 5, seed=0, world=2)
    with pytest.raises(InputError, match="batch of 7 samples cannot be shared by 2 processes"):
        iter_batches(split, 8, seed=0, world=2)
    with pytest.raises(InputError, match="batch size 0"):
        iter_batches(split, 0)
    with pytest.raises(InputError, match="rank 2 of 2 processes"):
        iter_batches(split, 4, seed=0, rank=2, world=2)
    with pytest.raises(InputError, match="seed -1"):
        iter_batches(split, 4, seed=-1)
    with pytest.raises(InputError, match="augmentation without a seed"):
        iter_batches(split, 4, augmentation=Augmentation(flip=True))
    vectors = Split(torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(InputError, match="augmentation is for images"):
        iter_batches(vectors, 2, seed=0, augmentation=Augmentation(flip=True))
