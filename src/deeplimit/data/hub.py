"""`hub:OWNER/NAME`: image sets through the Hugging Face datasets library."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from deeplimit.data.dataset import DataSet
from deeplimit.data.imagetable import PART_NAMES, load_image_tables
from deeplimit.data.request import Request
from deeplimit.errors import InputError

_ROWS = 1024


def load_hub(request: Request) -> DataSet:
    """The image set OWNER/NAME of the hub, or a local folder that datasets.load_dataset reads.

    Columns, class names and missing parts as for Parquet files. The library keeps its own download
    cache; decoded images go to `cache_dir`. The download is the only part that needs the network.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise InputError(
            f"data set {request.name!r} needs the datasets library: pip install deeplimit[hub]"
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
