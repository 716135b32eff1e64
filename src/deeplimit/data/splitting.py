"""Labels and vectors as they are in a file, checked; stratified splits into parts.

The splits are drawn from a seed of their own: the held-out samples are the same whatever seed a
network is trained with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from sklearn.model_selection import train_test_split

from deeplimit.data.dataset import RARE, DataSet, Split
from deeplimit.errors import InputError, refuse, several

_SPLIT_SEED = 0
_LARGEST_HELD_OUT = 5000  # of 60,000 MNIST images 55,000 remain, of 50,000 in CIFAR-10 45,000
_NARROW = 16  # standard deviations; so far from 0 a feature can lie and lose nothing in 32 bits
_ROWS = 10_000  # looked at, evenly spread; of more, neighbouring values meet in 32 bits by chance
_BLOCK = 64  # features at once
_NOISE = 2.0**-42  # of a large value: what arithmetic in 64 bits leaves between equal values
_SHARE = 0.01  # of a feature's values that may meet others: those of a smooth distribution


def integer_labels(labels: np.ndarray, source: str) -> np.ndarray:
    """`labels` as int64 [n]; InputError unless they are integers ≥ 0, one per sample."""
    refuse(source, _label_faults(labels))
    return labels.astype(np.int64)


def _label_faults(labels: np.ndarray) -> Iterator[str]:
    if labels.ndim != 1:
        yield (
            f"labels have shape {labels.shape}, expected one number per sample: flatten them, or "
            "turn one-hot rows into class numbers"
        )
    if labels.dtype.kind not in "iu":
        yield f"labels are of type {labels.dtype}, expected integers: number the classes 0, 1, 2, …"
    if len(labels) == 0:
        yield "no samples: give a file that holds some"
    if labels.min() < 0:
        yield (
            f"label {labels.min()} of sample {labels.argmin()} is negative, expected class numbers "
            "from 0 on: remove samples without a label, number the rest from 0"
        )
    if labels.max() > np.iinfo(np.int64).max:
        yield f"label {labels.max()} is no class number: number from 0 on"


def number_classes(
    parts: Mapping[str, np.ndarray], names: Sequence[str] | None, source: str
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Labels renumbered to 0 … C − 1, and the C class names.

    Class names that the source declares fix the numbering, also of classes that never occur: it
    may be the numbering of a pretrained model. Without names the classes are the labels that occur
    in the training part, in order; gaps are closed, and the class names keep the original numbers.
    """
    present = np.unique(parts["train"])
    refuse(source, _class_faults(parts, names, present))
    if names is not None:
        return dict(parts), tuple(names)
    numbered = {part: np.searchsorted(present, labels) for part, labels in parts.items()}
    return numbered, tuple(map(str, present))


def _class_faults(
    parts: Mapping[str, np.ndarray], names: Sequence[str] | None, present: np.ndarray
) -> Iterator[str]:
    if len(present) < 2:
        yield (
            f"only one class ({present[0]}) in the training part, expected at least 2: give labels "
            "of several classes"
        )
    for part, labels in parts.items():
        if names is not None and labels.max() >= len(names):
            yield (
                f"{part} label {labels.max()} is out of range, {len(names)} classes are declared: "
                f"expected 0 … {len(names) - 1}; correct labels or class names"
            )
        unknown = np.setdiff1d(labels, present)
        if names is None and len(unknown):
            shown = ", ".join(map(str, present[:10]))
            shown += f", … {present[-1]}" if len(present) > 10 else ""
            yield (
                f"{part} label {unknown[0]} is out of range, the training part has {shown}: "
                "correct it, or add such samples to the training part"
            )


def checked_vectors(x: np.ndarray, source: str) -> np.ndarray:
    """Samples [n, d] as float32, or as float64 where float32 is too coarse; every number finite.

    A network standardises its inputs, z = (x − mean) / std, and goes on in 32 bits. That is fine
    for x near 0; where it lies further out than its spread, such as a year or x + 10⁹, the rounding
    of x itself would be seen, so x stays in 64 bits until it is standardised. Refused is a feature
    whose different values become one: two integers, or more than 1 % of its floats. So it is with a
    rare value far from all others, or with identification numbers of more than 16 digits.
    """
    with np.errstate(over="ignore"):  # too large for float32 becomes inf, refused below
        narrow = x.astype(np.float32)
    finite = np.isfinite(narrow)
    if not finite.all():
        sample, feature = np.argwhere(~finite)[0]
        raise InputError(
            f"{source}[{sample}, {feature}] is {narrow[sample, feature]}, expected finite numbers: "
            f"replace it, and {(~finite).sum() - 1} others"
        )
    if x.dtype.itemsize < 4:
        return narrow
    coarse = False
    for first in range(0, x.shape[1], _BLOCK):
        block = x[:, first : first + _BLOCK]
        wide = block.astype(np.float64)
        mean, std = wide.mean(axis=0), wide.std(axis=0)
        spread = np.maximum(std, np.abs(wide - mean).max(axis=0) / RARE)
        spread[spread == 0] = 1
        some, names = block[:: -(-len(block) // _ROWS)], range(first, first + len(mean))
        _require_distinct(some, mean, spread, [f"{source}[:, {j}]" for j in names])
        far = np.abs(wide).max(axis=0) > _NARROW * spread
        coarse |= bool((narrow[:, first : first + _BLOCK] != wide)[:, far].any())
    return x.astype(np.float64) if coarse else narrow


def _require_distinct(
    x: np.ndarray, mean: np.ndarray, std: np.ndarray, features: list[str]
) -> None:
    """Refuses features whose different values are one number once standardised in 32 bits."""
    x = np.sort(x, axis=0)
    z = ((x.astype(np.float64) - mean) / std).astype(np.float32)
    whole = x.dtype.kind in "iu"
    size = np.abs(x[[len(x) // 20, -1 - len(x) // 20]]).max(axis=0)  # of all but rare values
    noise = 0 if whole else _NOISE * np.where(size > 0, size, np.abs(x).max(axis=0))
    differ = (x[1:] != x[:-1]) if whole else (x[1:] - x[:-1] > noise)
    met = differ & (z[1:] == z[:-1])
    wrong = np.flatnonzero(met.sum(axis=0) > (0 if whole else _SHARE * (1 + differ.sum(axis=0))))
    if len(wrong):
        j = wrong[0]
        i = np.flatnonzero(met[:, j])[0]
        raise InputError(
            f"{features[j]} has the values {x[i, j]} and {x[i + 1, j]}, which are one "
            f"in 32 bits after (x − mean) / std, with std = {std[j]:.3g}, as are "
            f"{met[:, j].sum() - 1} other pairs: take away what they have in common, take the "
            "logarithm, or remove rare values"
        )


def hold_out_tenths(
    labels: np.ndarray, class_names: Sequence[str], parts: Sequence[str], source: str
) -> dict[str, np.ndarray]:
    """Rows of a training file that go to "train" and to each part that the set lacks.

    A tenth of the file for each, at most 5,000 and at least the number of classes.
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
    return DataSet(name, class_names, **splits_of(np.ascontiguousarray(x), labels, rows))


def splits_of(
    x: np.ndarray, labels: np.ndarray, rows: Mapping[str, np.ndarray]
) -> dict[str, Split]:
    """The splits that consist of these rows of samples and labels."""
    return {
        part: Split(torch.from_numpy(x[chosen]), torch.from_numpy(labels[chosen]))
        for part, chosen in rows.items()
    }


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
            f"least {samples} of each class: add samples or leave the class out"
        )
    return len(classes)
