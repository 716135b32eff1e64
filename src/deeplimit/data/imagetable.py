"""Image sets in the Hugging Face hub's column layout, whatever they are read from.

A table has an image column `img` or `image` of struct {bytes, path} and an integer label column;
the schema's metadata `huggingface` may declare the class names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from deeplimit.data.cache import ImageCache
from deeplimit.data.dataset import DataSet, Split
from deeplimit.data.decoding import EncodedBatch, decode_images
from deeplimit.data.labels import integer_labels, number_classes
from deeplimit.data.request import Request
from deeplimit.data.splitting import hold_out_tenths
from deeplimit.errors import InputError
from deeplimit.reading import parse_json

# What the parts are called by those who publish sets.
PART_NAMES = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}
_IMAGE_COLUMNS = ("img", "image")

# Of sets whose files do not always carry them; used where the file declares none.
_KNOWN_CLASS_NAMES = {
    "cifar10": (
        *("airplane", "automobile", "bird", "cat", "deer"),
        *("dog", "frog", "horse", "ship", "truck"),
    ),
}


@runtime_checkable
class ImageTable(Protocol):
    """One part of a set, read column by column."""

    @property
    def source(self) -> str:
        """What errors name."""

    @property
    def schema(self) -> pa.Schema:
        """The columns and the metadata."""

    @property
    def files(self) -> Sequence[Path]:
        """The files behind it."""

    def column(self, name: str) -> pa.ChunkedArray:
        """A whole column."""

    def batches(self, name: str) -> Iterator[tuple[str, int, pa.Array]]:
        """A column in order: (file, number of the first row in that file, rows)."""


def load_image_tables(request: Request, tables: Mapping[str, ImageTable]) -> DataSet:
    """A data set from its parts "train" and, where the source has them, "validation" and "test".

    Missing parts are held out from the training part. The cached training array holds the kept
    samples first and the held-out ones after them, so that each split is a view of it.
    """
    train = tables["train"]
    label_column = find_label_column(train)
    raw_labels = {
        part: integer_labels(_to_numpy(table, label_column), f"{table.source}: {label_column}")
        for part, table in tables.items()
    }
    names = _declared_names(train.schema).get(label_column) or _KNOWN_CLASS_NAMES.get(request.name)
    labels, class_names = number_classes(raw_labels, names, train.source)

    missing = [part for part in ("validation", "test") if part not in tables]
    rows = hold_out_tenths(labels["train"], class_names, missing, train.source)
    order = np.concatenate(list(rows.values()))
    places = {part: np.arange(len(labels[part])) for part in tables}
    places["train"] = np.argsort(order)  # the inverse permutation: file row → row of the array

    files = [path for table in tables.values() for path in table.files]
    cache = ImageCache.of(request.cache_dir, request.name, files)
    images = {part: _images(table, places[part], cache, part) for part, table in tables.items()}
    splits = {
        part: Split(images[part], torch.from_numpy(labels[part]))
        for part in tables
        if part != "train"
    }
    start = 0
    for part, chosen in rows.items():
        stop = start + len(chosen)
        splits[part] = Split(images["train"][start:stop], torch.from_numpy(labels["train"][chosen]))
        start = stop
    return DataSet(request.name, class_names, splits["train"], splits["validation"], splits["test"])


def find_label_column(table: ImageTable) -> str:
    """The label column: `label`, or else the finest of the integer columns.

    Columns that are declared as ClassLabel go before other integers; of several (CIFAR-100's
    fine_label and coarse_label) the one with the most distinct values is taken.
    """
    if "label" in table.schema.names:
        return "label"
    integers = [field.name for field in table.schema if pa.types.is_integer(field.type)]
    declared = _declared_names(table.schema)
    candidates = [name for name in integers if name in declared] or integers
    if not candidates:
        raise InputError(
            f"{table.source}: no label column among {', '.join(table.schema.names)}, "
            "expected `label` or another integer column: rename or add it"
        )
    return max(candidates, key=lambda name: pc.count_distinct(table.column(name)).as_py())


def _find_image_column(table: ImageTable) -> str:
    for name in _IMAGE_COLUMNS:
        if name not in table.schema.names:
            continue
        kind = table.schema.field(name).type
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            return name
        raise InputError(
            f"{table.source}: column {name} is of type {kind}, expected struct {{bytes, path}}: "
            "write encoded images, as datasets' to_parquet does"
        )
    raise InputError(
        f"{table.source}: no image column among {', '.join(table.schema.names)}, "
        f"expected {' or '.join(_IMAGE_COLUMNS)}: rename it"
    )


def _declared_names(schema: pa.Schema) -> dict[str, list[str]]:
    """Class names by column, from the metadata that the hub's libraries write."""
    try:
        features = parse_json((schema.metadata or {})[b"huggingface"].decode())["info"]["features"]
        return {
            column: [str(name) for name in feature["names"]]
            for column, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError):
        return {}  # no metadata, or none that we understand: the labels number themselves


def _to_numpy(table: ImageTable, name: str) -> np.ndarray:
    if name not in table.schema.names:
        raise InputError(
            f"{table.source}: no column {name}, which the training part has: "
            "give all parts the same columns"
        )
    column = table.column(name)
    if column.null_count:
        raise InputError(
            f"{table.source}: {column.null_count} labels in {name} are missing: remove these rows"
        )
    if not pa.types.is_integer(column.type):
        raise InputError(
            f"{table.source}: labels in {name} are of type {column.type}, expected integers: "
            "number the classes 0, 1, 2, …"
        )
    return column.to_numpy()


def _images(table: ImageTable, places: np.ndarray, cache: ImageCache, part: str) -> torch.Tensor:
    name = _find_image_column(table)
    encoded = (
        EncodedBatch(source, first, rows.field("bytes").to_pylist())
        for source, first, rows in table.batches(name)
    )
    return torch.from_numpy(cache.get(part, len(places), lambda: decode_images(encoded, places)))
