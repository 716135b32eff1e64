"""Held-out parts: sizes, disjointness, proportions, the same every time."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deeplimit.data.splitting import hold_out_tenths, sixty_twenty_twenty
from deeplimit.errors import InputError

counts_per_class = st.lists(st.integers(5, 60), min_size=2, max_size=6)


def labels_of(counts: list[int]) -> np.ndarray:
    return np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))


def names(labels: np.ndarray) -> list[str]:
    return [str(label) for label in range(labels.max() + 1)]


def assert_partition(rows: dict[str, np.ndarray], labels: np.ndarray) -> None:
    together = np.concatenate(list(rows.values()))
    assert np.array_equal(np.sort(together), np.arange(len(labels)))
    for chosen in rows.values():
        # Stratified: no class is further from its proportional share than rounding (once per cut).
        share = np.bincount(labels) * len(chosen) / len(labels)
        drawn = np.bincount(labels[chosen], minlength=labels.max() + 1)
        assert np.abs(drawn - share).max() < 2


@pytest.mark.slow
@settings(deadline=None, derandomize=True)
@given(counts_per_class)
def test_sixty_twenty_twenty(counts: list[int]) -> None:
    labels = labels_of(counts)
    rows = sixty_twenty_twenty(labels, names(labels), "set")
    assert_partition(rows, labels)
    assert list(rows) == ["train", "test", "validation"]
    assert len(rows["test"]) == len(rows["validation"]) == round(len(labels) / 5)
    assert set(labels[rows["train"]]) == set(range(len(counts)))
    again = sixty_twenty_twenty(labels, names(labels), "set")
    assert all(np.array_equal(rows[part], again[part]) for part in rows)


@pytest.mark.slow
@settings(deadline=None, derandomize=True)
@given(counts_per_class, st.sampled_from([("validation",), ("test",), ("validation", "test")]))
def test_a_tenth_is_held_out_for_each_missing_part(counts: list[int], missing: tuple) -> None:
    labels = labels_of(counts)
    rows = hold_out_tenths(labels, names(labels), missing, "set")
    assert_partition(rows, labels)
    assert list(rows) == ["train", *missing]
    for part in missing:
        assert len(rows[part]) == max(len(labels) // 10, len(counts))


@pytest.mark.parametrize(("total", "held"), [(60_000, 5000), (50_000, 5000), (20_000, 2000)])
def test_at_most_five_thousand(total: int, held: int) -> None:
    labels = np.arange(total) % 10
    assert len(hold_out_tenths(labels, names(labels), ("validation",), "set")["validation"]) == held


def test_nothing_is_held_out_where_all_parts_exist() -> None:
    """All of it is for training, in random order as elsewhere: sets come sorted by class."""
    rows = hold_out_tenths(np.repeat([0, 1], 50), ["a", "b"], (), "set")
    assert sorted(rows["train"]) == list(range(100))
    assert 10 < sum(rows["train"][:50] < 50) < 40


def test_too_few_of_a_class_names_the_class() -> None:
    labels = np.array([0] * 20 + [1] * 4)
    with pytest.raises(InputError, match="set: class bee has 4 samples, too few"):
        sixty_twenty_twenty(labels, ["ant", "bee"], "set")
    with pytest.raises(InputError, match=r"class bee has 1 sample,.*at least 2"):
        hold_out_tenths(labels[:21], ["ant", "bee"], ("validation",), "set")
