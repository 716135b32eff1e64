"""Small data sets on disk, made to be broken by the tests."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_layouts import idx_bytes, image_table, make_images, png

WriteParts = Callable[..., Path]


@pytest.fixture
def idx_folder(tmp_path: Path) -> Path:
    """DATA_DIR/tiny with 60 training and 20 test images of 4×5 pixels, three classes, gzipped."""
    generator = np.random.default_rng(0)
    folder = tmp_path / "tiny"
    folder.mkdir()
    for prefix, count in (("train", 60), ("t10k", 20)):
        images = generator.integers(0, 256, (count, 4, 5))
        labels = np.arange(count) % 3
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            path = folder / f"{prefix}-{kind}-ubyte.gz"
            path.write_bytes(gzip.compress(idx_bytes(array)))
    return folder


@pytest.fixture
def parquet_folder(tmp_path: Path) -> Path:
    """DATA_DIR/tiny with 60 training images in two shards and 20 test images, three classes."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    images = [png(image) for image in make_images(60)]
    labels = [row % 3 for row in range(60)]
    names = {"label": ("ant", "bee", "cat")}
    for shard, rows in enumerate((slice(0, 35), slice(35, 60))):
        table = image_table(images[rows], {"label": labels[rows]}, names)
        pq.write_table(table, folder / f"train-0000{shard}-of-00002.parquet", row_group_size=8)
    tests = [png(image) for image in make_images(20, seed=1)]
    table = image_table(tests, {"label": [row % 3 for row in range(20)]}, names)
    pq.write_table(table, folder / "test-00000-of-00001.parquet")
    return folder


@pytest.fixture
def write_parts(tmp_path: Path) -> WriteParts:
    """Writes DATA_DIR/tiny from one table per part and returns DATA_DIR."""

    def write(**tables: pa.Table) -> Path:
        (tmp_path / "tiny").mkdir(exist_ok=True)
        for part, table in tables.items():
            pq.write_table(table, tmp_path / "tiny" / f"{part}-00000-of-00001.parquet")
        return tmp_path

    return write
