"""Stratified splits into training, validation and test part.

They are drawn from a seed of their own: the held-out samples are the same whatever seed a network
is trained with.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from sklearn.model_selection import train_test_split

from deeplimit.data.dataset import DataSet, Split
from deeplimit.errors import InputError, several

_SPLIT_SEED = 0
_LARGEST_HELD_OUT = 5000  # of 60,000 MNIST images 55,000 remain, of 50,000 in CIFAR-10 45,000


def hold_out_tenths(
    labels: np.ndarray, class_names: Sequence[str], parts: Sequence[str], source: str
) -> dict[str, np.ndarray]:
    """Rows of a training file that go to "train" and to each part that the set lacks.

    A tenth of the file for each, at most 5,000 and at least the number of classes.

    Args:
        labels: [n], of the training file, in 0 … C − 1.
        class_names: what errors call the classes.
        parts: what to hold out besides "train", such as ("validation",).
        source: what errors name.
    """
    classes = _require(labels, class_names, 1 + len(parts), source)
    held = max(min(_LARGEST_HELD_OUT, len(labels) // 10), classes)
    return _divide(labels, dict.fromkeys(parts, held))


def sixty_twenty_twenty(
    labels: np.ndarray, class_names: Sequence[str], source: str
) -> dict[str, np.ndarray]:
    """Rows of a whole set for "train", "validation" and "test": 60, 20 and 20 percent."""
    _require(labels, class_names, 5, source)
    fifth = round(len(labels) / 5)
    return _divide(labels, {"test": fifth, "validation": fifth})


def split_whole(
    name: str, x: np.ndarray, labels: np.ndarray, class_names: tuple[str, ...]
) -> DataSet:
    """A data set from samples without a test part of their own: 60/20/20, stratified."""
    rows = sixty_twenty_twenty(labels, class_names, name)
    x = np.ascontiguousarray(x)
    splits = {
        part: Split(torch.from_numpy(x[chosen]), torch.from_numpy(labels[chosen]))
        for part, chosen in rows.items()
    }
    return DataSet(name, class_names, splits["train"], splits["validation"], splits["test"])


def _divide(labels: np.ndarray, sizes: dict[str, int]) -> dict[str, np.ndarray]:
    """`sizes` samples for each part, the rest for "train", which comes first; in random order."""
    rest = np.arange(len(labels))
    if not sizes:
        rest = np.random.default_rng(_SPLIT_SEED).permutation(rest)
    held: dict[str, np.ndarray] = {}
    for part, size in sizes.items():
        rest, held[part] = train_test_split(
            rest, test_size=size, stratify=labels[rest], random_state=_SPLIT_SEED
        )
    return {"train": rest, **held}


def _require(labels: np.ndarray, class_names: Sequence[str], samples: int, source: str) -> int:
    """The number of classes; InputError if one has fewer than `samples`."""
    classes, counts = np.unique(labels, return_counts=True)
    if counts.min() < samples:
        raise InputError(
            f"{source}: class {class_names[classes[counts.argmin()]]} has "
            f"{several(int(counts.min()), 'sample')}, too few to split into parts, expected at "
            f"least {samples} of each class: "
            "add samples or leave the class out"
        )
    return len(classes)
