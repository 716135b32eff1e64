"""Image sets as Parquet files in a folder, as the Hugging Face hub stores them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from deeplimit.data.dataset import DataSet
from deeplimit.data.imagetable import PART_NAMES, load_image_tables
from deeplimit.data.request import Request
from deeplimit.errors import InputError
from deeplimit.memory import require, require_unpacked
from deeplimit.reading import reading

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
