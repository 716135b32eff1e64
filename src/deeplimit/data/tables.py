"""Image sets in the Hugging Face hub's column layout, as Parquet files or from the hub.

A table has an image column `img` or `image` of struct {bytes, path} and an integer label column;
the schema's metadata `huggingface` may declare the class names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from deeplimit.data.dataset import DataSet, Split
from deeplimit.data.images import ImageCache, decode_images
from deeplimit.data.registry import Request
from deeplimit.data.splitting import hold_out_tenths, integer_labels, number_classes
from deeplimit.errors import InputError, refuse
from deeplimit.memory import require, require_unpacked
from deeplimit.reading import one_line, parse_json, reading

# What the parts are called by those who publish sets.
PART_NAMES = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}
_IMAGE_COLUMNS = ("img", "image")
# Of sets whose files do not always carry them; used where the file declares none.
_CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck"
_KNOWN_CLASS_NAMES = {"cifar10": tuple(_CIFAR10.split())}
_ROWS = 1024  # read and decoded at once
_SHARD = re.compile(r"-(\d+)-of-(\d+)(?:-[0-9a-f]+)?\.parquet$")  # the hub used to add a hash


@dataclass(frozen=True)
class ImageTable:
    """One part of a set, read column by column.

    Attributes:
        source: what errors name.
        schema: the columns and the metadata.
        files: the files behind it.
        read: yields a column in order: (file, number of the first row in that file, rows).
    """

    source: str
    schema: pa.Schema
    files: tuple[Path, ...]
    read: Callable[[str], Iterator[tuple[str, int, pa.Array]]]

    def column(self, name: str) -> pa.ChunkedArray:
        """Reads a whole column."""
        return pa.chunked_array([rows for *_, rows in self.read(name)], self.kind(name))

    def kind(self, name: str) -> pa.DataType:
        """Returns the type of a column."""
        return self.schema.field(name).type


def load_parquet(request: Request) -> DataSet:
    """Loads the set in a folder of train-*.parquet, test-*.parquet and perhaps validation-*."""
    folder, tables = Path(request.target), {}
    for part, names in PART_NAMES.items():
        patterns = [f"{name}{rest}" for name in names for rest in (".parquet", "-*.parquet")]
        files = tuple(sorted(path for pattern in patterns for path in folder.glob(pattern)))
        if files:
            _require_all_shards(files)
            tables[part] = _parquet_table(files)
    if "train" not in tables:
        raise InputError(
            f"{folder}: no train-*.parquet there, expected train-*.parquet and test-*.parquet: "
            "put the files of the hub's folder `data` here"
        )
    return _data_set(request, tables)


def _parquet_table(files: tuple[Path, ...]) -> ImageTable:
    """The files of one part, of which the first one's schema counts."""
    schema, *_ = [opened_parquet(path).schema_arrow for path in files]

    def read(name: str) -> Iterator[tuple[str, int, pa.Array]]:
        kind = schema.field(name).type
        for path in files:
            first, file = 0, opened_parquet(path)
            with reading(path, *_UNREADABLE):
                # Not pq.read_table: it reads key=value in the folder names above as columns.
                for batch in file.iter_batches(_ROWS, columns=[name]):
                    rows = batch.column(0)
                    yield str(path), first, rows if pa.types.is_struct(kind) else rows.cast(kind)
                    first += len(batch)

    return ImageTable(str(files[0]), schema, files, read)


_UNREADABLE = "not a whole Parquet file", "the download was cut, fetch it again"


def opened_parquet(path: Path) -> pq.ParquetFile:
    """A file whose row groups fit into memory one by one, and whose labels do together."""
    with reading(path, *_UNREADABLE):
        file = pq.ParquetFile(path)
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        labels, sizes = 8 * file.metadata.num_rows, [group.total_byte_size for group in groups]
        remedy = "fetch it again, or write smaller row groups"
        require_unpacked(sum(sizes) + labels, path.stat().st_size, str(path), remedy)
        require(2 * max(sizes, default=0) + 4 * labels, str(path), remedy)
    return file


def _require_all_shards(files: tuple[Path, ...]) -> None:
    """Refuses files of the form train-00001-of-00003.parquet that are incomplete."""
    shards = [match for path in files if (match := _SHARD.search(path.name))]
    announced = int(shards[0][2]) if shards else 0
    numbers = sorted(int(match[1]) for match in shards)
    if shards and (len(files) != announced or numbers != list(range(announced))):
        raise InputError(
            f"{files[0].parent}: {len(files)} files like {files[0].name}, expected {announced}, "
            "each number once: fetch the others, or remove those of another version"
        )


def load_hub(request: Request) -> DataSet:
    """Loads the image set OWNER/NAME of the hub, or a local folder that `datasets` reads.

    The library keeps its own download cache; decoded images go to `cache_dir`. The download is the
    only part that needs the network.
    """
    name = f"data set {request.name!r}"
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise InputError(
            f"{name} needs the datasets library: pip install deeplimit[cli]"
        ) from error
    target = Path(request.target).expanduser()
    try:
        found = load_dataset(str(target) if target.is_dir() else request.target)
    except Exception as error:  # the library's, httpx's and pyarrow's own types: all mean unread
        raise InputError(
            f"{name} cannot be read ({one_line(error)}): check OWNER/NAME and the network, or "
            "download it and give its folder as hub:PATH"
        ) from error
    if "train" not in found:
        raise InputError(
            f"{name} has the parts {', '.join(found)}, expected `train`: choose another set"
        )
    tables = {
        part: _hub_table(f"{request.name} [{name}]", found[name])
        for part, names in PART_NAMES.items()
        for name in names
        if name in found
    }
    return _data_set(request, tables)


def _hub_table(source: str, dataset: Any) -> ImageTable:
    """One split of a datasets.DatasetDict, with images that lie in files read in."""

    def read(name: str) -> Iterator[tuple[str, int, pa.Array]]:
        from datasets.table import embed_table_storage

        first = 0
        for table in dataset.with_format("arrow").select_columns([name]).iter(_ROWS):
            try:
                embedded = embed_table_storage(table)
            except OSError as error:
                raise InputError(
                    f"{source}: an image file of {name} cannot be read ({one_line(error)}): fetch "
                    "the set again"
                ) from error
            for rows in embedded.column(0).chunks:
                yield source, first, rows
                first += len(rows)

    files = tuple(Path(file["filename"]) for file in dataset.cache_files)  # the library's cache
    return ImageTable(source, dataset.features.arrow_schema, files, read)


def _data_set(request: Request, tables: Mapping[str, ImageTable]) -> DataSet:
    """A data set from its part "train" and, where the source has them, "validation" and "test".

    Missing parts are held out from the training part. The cached training array holds the kept
    samples first and the held-out ones after them, so that each split is a view of it.
    """
    train = tables["train"]
    column = _label_column(train)
    raw = {part: _labels(table, column) for part, table in tables.items()}
    names = _declared_names(train.schema).get(column) or _KNOWN_CLASS_NAMES.get(request.name)
    labels, class_names = number_classes(raw, names, train.source)

    missing = [part for part in ("validation", "test") if part not in tables]
    rows = hold_out_tenths(labels["train"], class_names, missing, train.source)
    places = {part: np.arange(len(labels[part])) for part in tables}
    places["train"] = np.argsort(np.concatenate(list(rows.values())))  # file row → row of the array
    files = [path for table in tables.values() for path in table.files]
    cache = ImageCache.of(request.cache_dir, request.name, files)
    images = {part: _images(table, places[part], cache, part) for part, table in tables.items()}

    y = {part: torch.from_numpy(numbers) for part, numbers in labels.items()}
    views = torch.split(images.pop("train"), [len(chosen) for chosen in rows.values()])
    splits = {part: Split(x, y[part]) for part, x in images.items()}
    for (part, chosen), x in zip(rows.items(), views, strict=True):
        splits[part] = Split(x, y["train"][torch.from_numpy(chosen)])
    return DataSet(request.name, class_names, **splits)


def _label_column(table: ImageTable) -> str:
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
    finest: str = max(candidates, key=lambda name: pc.count_distinct(table.column(name)).as_py())
    return finest


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


def _labels(table: ImageTable, name: str) -> np.ndarray:
    if name not in table.schema.names:
        raise InputError(
            f"{table.source}: no column {name}, which the training part has: give all parts the "
            "same columns"
        )
    column = table.column(name)
    refuse(table.source, _label_faults(column, name))
    return integer_labels(np.asarray(column), f"{table.source}: {name}")


def _label_faults(column: pa.ChunkedArray, name: str) -> Iterator[str]:
    if column.null_count:
        yield f"{column.null_count} labels in {name} are missing: remove these rows"
    if not pa.types.is_integer(column.type):
        yield f"labels in {name} are of type {column.type}, expected integers: number the classes"


def _images(table: ImageTable, places: np.ndarray, cache: ImageCache, part: str) -> torch.Tensor:
    column = next((name for name in _IMAGE_COLUMNS if name in table.schema.names), "")
    refuse(table.source, _image_faults(table, column))
    encoded = (
        (at, first, rows.field("bytes").to_pylist()) for at, first, rows in table.read(column)
    )
    return torch.from_numpy(cache.get(part, len(places), lambda: decode_images(encoded, places)))


def _image_faults(table: ImageTable, column: str) -> Iterator[str]:
    if not column:
        yield (
            f"no image column among {', '.join(table.schema.names)}, "
            f"expected {' or '.join(_IMAGE_COLUMNS)}: rename it"
        )
    kind = table.kind(column)
    if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        yield (
            f"column {column} is of type {kind}, expected struct {{bytes, path}}: write encoded "
            "images, as datasets' to_parquet does"
        )
