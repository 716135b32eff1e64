"""Decoded images on disk: mapped the second time, rebuilt when stale or damaged."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from deeplimit.data import DataSet, images, load_dataset, tables


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each images run so far has given; the real decoder runs."""
    runs: list[int] = []

    def counted(*arguments: object) -> np.ndarray:
        found = images.decode_images(*arguments)  # type: ignore[arg-type]
        runs.append(len(found))
        return found

    monkeypatch.setattr(tables, "decode_images", counted)
    return runs


def equal(a: DataSet, b: DataSet) -> bool:
    return all(
        torch.equal(getattr(getattr(a, part), field), getattr(getattr(b, part), field))
        for part in ("train", "validation", "test")
        for field in ("x", "y")
    )


def files(cache_dir: Path) -> list[Path]:
    return sorted(path for path in cache_dir.rglob("*") if path.is_file())


def is_mapped(data: DataSet, path: Path) -> bool:
    """Whether the training images lie in memory mapped from `path`."""
    address = data.train.x.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, target = line.split(maxsplit=5)
        low, high = (int(end, 16) for end in span.split("-"))
        if low <= address < high:
            return target == str(path)
    return False


def test_the_second_load_maps_the_files(
    parquet_folder: Path, tmp_path: Path, decoded: list[int]
) -> None:
    cache_dir = tmp_path / "cache"
    plain = load_dataset("tiny", data_dir=parquet_folder.parent)
    assert decoded == [60, 20]
    first = load_dataset("tiny", data_dir=parquet_folder.parent, cache_dir=cache_dir)
    assert decoded == [60, 20] * 2
    second = load_dataset("tiny", data_dir=parquet_folder.parent, cache_dir=cache_dir)
    assert decoded == [60, 20] * 2
    assert equal(plain, first)
    assert equal(plain, second)
    test_file, train_file = files(cache_dir)
    assert (test_file.name[:5], train_file.name[:6]) == ("test-", "train-")
    if Path("/proc/self/maps").exists():
        assert is_mapped(second, train_file)
        assert not is_mapped(plain, train_file)
    # Training and validation split are views of one array.
    assert second.validation.x.untyped_storage().data_ptr() == (
        second.train.x.untyped_storage().data_ptr()
    )
    # Writing to the tensors leaves the file alone.
    before = train_file.read_bytes()
    second.train.x.zero_()
    assert train_file.read_bytes() == before


@pytest.mark.parametrize("keep", [0, 50, 128, 1000])
def test_a_cut_cache_is_built_again(
    parquet_folder: Path, tmp_path: Path, decoded: list[int], keep: int
) -> None:
    cache_dir = tmp_path / "cache"
    first = load_dataset("tiny", data_dir=parquet_folder.parent)
    load_dataset("tiny", data_dir=parquet_folder.parent, cache_dir=cache_dir)
    train_file = files(cache_dir)[1]
    whole = train_file.read_bytes()
    train_file.write_bytes(whole[:keep])
    again = load_dataset("tiny", data_dir=parquet_folder.parent, cache_dir=cache_dir)
    assert equal(first, again)
    assert decoded[-1] == 60  # only the damaged array
    assert train_file.read_bytes() == whole


@pytest.mark.slow
def test_an_array_of_another_kind_is_built_again(parquet_folder: Path, tmp_path: Path) -> None:
    cache_dir = tmp_path / "cache"
    first = load_dataset("tiny", data_dir=parquet_folder.parent)
    load_dataset("tiny", data_dir=parquet_folder.parent, cache_dir=cache_dir)
    for wrong in (np.zeros((60, 3, 6, 5)), np.zeros((59, 3, 6, 5), np.uint8), np.zeros(60)):
        np.save(files(cache_dir)[1], wrong)
        assert equal(
            first, load_dataset("tiny", data_dir=parquet_folder.parent, cache_dir=cache_dir)
        )


@pytest.mark.parametrize(
    ("there", "instead"),
    [
        (b"(60, 3, 6, 5)", b"(60, 3, 5, 6)"),
        (b"'fortran_order': False", b"'fortran_order': True "),
        (b"v\0{", b"u\0{"),  # the header's length: all pixels one byte further on
        (b"{'descr'", b"(((((((("),
    ],
)
def test_a_damaged_header_of_the_same_size_is_built_again(
    there: bytes, instead: bytes, parquet_folder: Path, tmp_path: Path
) -> None:
    cache_dir = tmp_path / "cache"
    first = load_dataset("tiny", data_dir=parquet_folder.parent)
    load_dataset("tiny", data_dir=parquet_folder.parent, cache_dir=cache_dir)
    train_file = files(cache_dir)[1]
    whole = train_file.read_bytes()
    assert whole.count(there) == 1
    train_file.write_bytes(whole.replace(there, instead))
    assert equal(first, load_dataset("tiny", data_dir=parquet_folder.parent, cache_dir=cache_dir))
    assert train_file.read_bytes() == whole


def test_changed_files_make_it_stale_and_the_old_arrays_go(
    parquet_folder: Path, tmp_path: Path, decoded: list[int]
) -> None:
    cache_dir = tmp_path / "cache"
    load_dataset("tiny", data_dir=parquet_folder.parent, cache_dir=cache_dir)
    old = files(cache_dir)
    path = parquet_folder / "test-00000-of-00001.parquet"
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    load_dataset("tiny", data_dir=parquet_folder.parent, cache_dir=cache_dir)
    assert decoded == [60, 20] * 2
    assert len(files(cache_dir)) == 2
    assert not set(files(cache_dir)) & set(old)


def test_a_cache_that_cannot_be_written_only_warns(parquet_folder: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "cache"
    blocked.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="decoded images are not kept"):
        data = load_dataset("tiny", data_dir=parquet_folder.parent, cache_dir=blocked)
    assert equal(data, load_dataset("tiny", data_dir=parquet_folder.parent))
