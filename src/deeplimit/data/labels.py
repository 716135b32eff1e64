"""Labels as they are in a file, checked and numbered 0 … C − 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from deeplimit.errors import InputError


def integer_labels(labels: np.ndarray, source: str) -> np.ndarray:
    """`labels` as int64 [n]; InputError unless they are integers ≥ 0, one per sample."""
    if labels.ndim != 1:
        raise InputError(
            f"{source}: labels have shape {labels.shape}, expected one number per sample: "
            "flatten them, or turn one-hot rows into class numbers"
        )
    if labels.dtype.kind not in "iu":
        raise InputError(
            f"{source}: labels are of type {labels.dtype}, expected integers: "
            "number the classes 0, 1, 2, …"
        )
    if len(labels) == 0:
        raise InputError(f"{source}: no samples: give a file that holds some")
    if labels.min() < 0:
        raise InputError(
            f"{source}: label {labels.min()} of sample {labels.argmin()} is negative, expected "
            "class numbers from 0 on: remove samples without a label, number the rest from 0"
        )
    if labels.max() > np.iinfo(np.int64).max:
        raise InputError(f"{source}: label {labels.max()} is no class number: number from 0 on")
    return labels.astype(np.int64)


def number_classes(
    parts: Mapping[str, np.ndarray], names: Sequence[str] | None, source: str
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Labels renumbered to 0 … C − 1, and the C class names.

    Class names that the source declares fix the numbering, also of classes that never occur: it
    may be the numbering of a pretrained model. Without names the classes are the labels that occur
    in the training part, in order; gaps are closed, and the class names keep the original numbers.

    Args:
        parts: labels by part, "train" among them, from `integer_labels`.
        names: class names as declared by the source, or None.
        source: what errors name.
    """
    present = np.unique(parts["train"])
    if len(present) < 2:
        raise InputError(
            f"{source}: only one class ({present[0]}) in the training part, expected at least 2: "
            "give labels of several classes"
        )
    if names is not None:
        for part, labels in parts.items():
            if labels.max() >= len(names):
                raise InputError(
                    f"{source}: {part} label {labels.max()} is out of range, {len(names)} classes "
                    f"are declared: expected 0 … {len(names) - 1}; correct labels or class names"
                )
        return dict(parts), tuple(names)
    for part, labels in parts.items():
        unknown = np.setdiff1d(labels, present)
        if len(unknown):
            raise InputError(
                f"{source}: {part} label {unknown[0]} is out of range, the training part has "
                f"{_listed(present)}: correct it, or add such samples to the training part"
            )
    numbered = {part: np.searchsorted(present, labels) for part, labels in parts.items()}
    return numbered, tuple(str(label) for label in present)


def _listed(labels: np.ndarray) -> str:
    shown = ", ".join(str(label) for label in labels[:10])
    return shown if len(labels) <= 10 else f"{shown}, … {labels[-1]}"
