"""Image sets in the Hugging Face hub's column layout, as Parquet files or from the hub.

A table has an image column `img` or `image` of struct {bytes, path} and an integer label column;
the schema's metadata `huggingface` may declare the class names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from deeplimit.data.dataset import DataSet, Split
from deeplimit.data.images import EncodedBatch, ImageCache, decode_images
from deeplimit.data.registry import Request
from deeplimit.data.splitting import hold_out_tenths, integer_labels, number_classes
from deeplimit.errors import InputError
from deeplimit.memory import require, require_unpacked
from deeplimit.reading import parse_json, reading

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

    def distinct(name: str) -> int:
        return int(pc.count_distinct(table.column(name)).as_py())

    finest: str = max(candidates, key=distinct)
    return finest


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
    return np.asarray(column.to_numpy())


def _images(table: ImageTable, places: np.ndarray, cache: ImageCache, part: str) -> torch.Tensor:
    name = _find_image_column(table)
    encoded = (
        EncodedBatch(source, first, rows.field("bytes").to_pylist())
        for source, first, rows in table.batches(name)
    )
    return torch.from_numpy(cache.get(part, len(places), lambda: decode_images(encoded, places)))


_ROWS = 1024  # read and decoded at once
_SHARD = re.compile(r"-(\d+)-of-(\d+)(?:-[0-9a-f]+)?\.parquet$")  # the hub used to add a hash


def load_parquet(request: Request) -> DataSet:
    """The set in a folder of train-*.parquet, test-*.parquet and, optionally, validation-*.parquet.

    Images: column `img` or `image`, struct {bytes, path}. Labels: column `label`, else the only
    integer column; of several the one with the most classes (fine_label, not coarse_label). Class
    names: from the metadata `huggingface`, else CIFAR-10's own, else the label numbers. A missing
    test or validation part is held out from train (CIFAR-10: 45,000 + 5,000).
    """
    folder = Path(request.target)
    tables = {}
    for part, names in PART_NAMES.items():
        patterns = [
            pattern for name in names for pattern in (f"{name}.parquet", f"{name}-*.parquet")
        ]
        files = sorted(path for pattern in patterns for path in folder.glob(pattern))
        if files:
            _require_all_shards(files)
            for path in files:
                with _readable(path):
                    _opened(path)
            tables[part] = ParquetPart(tuple(files))
    if "train" not in tables:
        raise InputError(
            f"{folder}: no train-*.parquet there, expected train-*.parquet and test-*.parquet: "
            "put the files of the hub's folder `data` here"
        )
    return load_image_tables(request, tables)


@dataclass(frozen=True)
class ParquetPart:
    """One part of a set in one or more files; an `ImageTable`."""

    files: tuple[Path, ...]

    @property
    def source(self) -> str:
        """What errors name: the first file."""
        return str(self.files[0])

    @property
    def schema(self) -> pa.Schema:
        """Of the first file."""
        with _readable(self.files[0]):
            return pq.read_schema(self.files[0])

    def column(self, name: str) -> pa.ChunkedArray:
        """A whole column, all files."""
        chunks = []
        for path in self.files:
            with _readable(path):
                # Not pq.read_table: it reads key=value in the folder names above as columns.
                chunks.append(_opened(path).read(columns=[name]).column(0))
        return pa.chunked_array([chunk for column in chunks for chunk in column.chunks])

    def batches(self, name: str) -> Iterator[tuple[str, int, pa.Array]]:
        """A column in order, some rows at a time."""
        for path in self.files:
            first = 0
            with _readable(path):
                for batch in _opened(path).iter_batches(_ROWS, columns=[name]):
                    yield str(path), first, batch.column(0)
                    first += len(batch)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    with reading(path, "not a whole Parquet file", "the download was cut, fetch it again"):
        yield


def _opened(path: Path) -> pq.ParquetFile:
    """A file whose row groups fit into memory one by one, and whose labels do together."""
    file = pq.ParquetFile(path)
    groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
    labels = 8 * file.metadata.num_rows
    sizes = [group.total_byte_size for group in groups]
    remedy = "fetch it again, or write smaller row groups"
    require_unpacked(sum(sizes) + labels, path.stat().st_size, str(path), remedy)
    require(2 * max(sizes, default=0) + 4 * labels, str(path), remedy)
    return file


def _require_all_shards(files: list[Path]) -> None:
    """InputError if files of the form train-00001-of-00003.parquet are incomplete."""
    shards = [match for path in files if (match := _SHARD.search(path.name))]
    announced = int(shards[0][2]) if shards else 0
    numbers = sorted(int(match[1]) for match in shards)
    if shards and (len(files) != announced or numbers != list(range(announced))):
        raise InputError(
            f"{files[0].parent}: {len(files)} files like {files[0].name}, expected {announced}, "
            "each number once: "
            "fetch the others, or remove those of another version"
        )


def load_hub(request: Request) -> DataSet:
    """The image set OWNER/NAME of the hub, or a local folder that datasets.load_dataset reads.

    Columns, class names and missing parts as for Parquet files. The library keeps its own download
    cache; decoded images go to `cache_dir`. The download is the only part that needs the network.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise InputError(
            f"data set {request.name!r} needs the datasets library: pip install deeplimit[cli]"
        ) from error
    target = Path(request.target).expanduser()
    try:
        found = load_dataset(str(target) if target.is_dir() else request.target)
    except Exception as error:  # the library's, httpx's and pyarrow's own types: all mean unread
        raise InputError(
            f"data set {request.name!r} cannot be read ({_line(error)}): check OWNER/NAME and the "
            "network, or download it and give its folder as hub:PATH"
        ) from error
    tables = {
        part: HubPart(f"{request.name} [{name}]", found[name])
        for part, names in PART_NAMES.items()
        for name in names
        if name in found
    }
    if "train" not in tables:
        raise InputError(
            f"data set {request.name!r} has the parts {', '.join(found)}, expected `train`: "
            "choose another set"
        )
    return load_image_tables(request, tables)


@dataclass(frozen=True)
class HubPart:
    """One split of a datasets.DatasetDict; an `ImageTable`."""

    source: str
    dataset: Any

    @property
    def schema(self) -> pa.Schema:
        """The columns, with the declared features as metadata."""
        return self.dataset.features.arrow_schema

    @property
    def files(self) -> tuple[Path, ...]:
        """The Arrow files in the library's cache."""
        return tuple(Path(file["filename"]) for file in self.dataset.cache_files)

    def column(self, name: str) -> pa.ChunkedArray:
        """A whole column."""
        return self.dataset.with_format("arrow").select_columns([name])[:].column(0)

    def batches(self, name: str) -> Iterator[tuple[str, int, pa.Array]]:
        """A column in order, some rows at a time, with images that lie in files read in."""
        from datasets.table import embed_table_storage

        first = 0
        for table in self.dataset.with_format("arrow").select_columns([name]).iter(_ROWS):
            try:
                embedded = embed_table_storage(table)
            except OSError as error:
                raise InputError(
                    f"{self.source}: an image file of {name} cannot be read ({_line(error)}): "
                    "fetch the set again"
                ) from error
            for rows in embedded.column(0).chunks:
                yield self.source, first, rows
                first += len(rows)


def _line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
