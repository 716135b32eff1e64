"""IDX sets: the four files in which MNIST and its kin (Fashion-MNIST, KMNIST, …) are published.

The format (http://yann.lecun.com/exdb/mnist): two zero bytes, a type byte (8: unsigned byte), the
number of dimensions, each dimension as a big-endian 32-bit integer, then the values, row by row.
"""

from __future__ import annotations

import gzip
import io
import math
from pathlib import Path

import numpy as np
import torch

from deeplimit.data.dataset import DataSet, Split
from deeplimit.data.registry import Request
from deeplimit.data.splitting import hold_out_tenths, integer_labels, number_classes
from deeplimit.errors import InputError
from deeplimit.memory import require, require_unpacked
from deeplimit.reading import reading

_UNSIGNED_BYTE = 8
_FILES = {"train": "train", "test": "t10k"}


def load_idx(request: Request) -> DataSet:
    """The set in a folder of train-images-idx3-ubyte, train-labels-idx1-ubyte and their t10k-*.

    Each may be gzipped (.gz); an unzipped file wins over a zipped one. Test is t10k; validation is
    held out from train (MNIST: 55,000 + 5,000). Images become uint8 [n, 1, H, W].
    """
    folder = Path(request.target)
    images, raw_labels = {}, {}
    for part, prefix in _FILES.items():
        image_file = _find(folder, f"{prefix}-images-idx3-ubyte")
        label_file = _find(folder, f"{prefix}-labels-idx1-ubyte")
        images[part] = read_idx(image_file, dimensions=3)[:, None]
        raw_labels[part] = integer_labels(read_idx(label_file, dimensions=1), str(label_file))
        if len(images[part]) != len(raw_labels[part]):
            raise InputError(
                f"{image_file} holds {len(images[part])} images, {label_file} "
                f"{len(raw_labels[part])} labels: expected one label per image; fetch both again"
            )
    labels, class_names = number_classes(raw_labels, None, str(folder))
    rows = hold_out_tenths(labels["train"], class_names, ("validation",), str(folder))
    splits = {
        part: Split(
            torch.from_numpy(images["train"][chosen]), torch.from_numpy(labels["train"][chosen])
        )
        for part, chosen in rows.items()
    }
    # A copy, because the file's bytes are read-only and torch's tensors cannot be.
    test = Split(torch.from_numpy(images["test"].copy()), torch.from_numpy(labels["test"]))
    return DataSet(request.name, class_names, splits["train"], splits["validation"], test)


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The unsigned bytes in an IDX file, gzipped or not; read-only.

    Raises:
        InputError: unless the file is a whole IDX file of bytes with so many `dimensions`.
    """
    fault = "not a whole gzip file" if _zipped(path) else "damaged"
    with reading(path, fault, "the download was cut, fetch it again"), _open(path) as file:
        shape, start = _header(file, path, dimensions)
        size = math.prod(shape)
        what, remedy = f"{path}, {' × '.join(map(str, shape))}", "fetch it again, or unpack it"
        if _zipped(path):
            require_unpacked(size, path.stat().st_size, what, remedy)
        require(2 * size, what, remedy)  # the bytes, and the splits that are taken out of them
        content = file.read(size + 1)
    if len(content) != size:
        least = "at least " if len(content) > size else ""
        raise InputError(
            f"{path}: {least}{start + len(content)} bytes, its header announces {start + size}: "
            "the file is cut or damaged, fetch it again"
        )
    if 0 in shape:
        raise InputError(f"{path}: shape {shape} holds no samples: fetch the file again")
    return np.frombuffer(content, dtype=np.uint8).reshape(shape)


def _header(
    file: gzip.GzipFile | io.BufferedReader, path: Path, dimensions: int
) -> tuple[tuple[int, ...], int]:
    """The shape that a file announces, and the header's length."""
    start = 4 + 4 * dimensions
    head = file.read(start)
    if len(head) < 4 or head[:2] != b"\0\0" or head[2] != _UNSIGNED_BYTE:
        raise InputError(
            f"{path}: starts with {head[:4].hex() or 'nothing'}, expected "
            f"{bytes([0, 0, _UNSIGNED_BYTE, dimensions]).hex()} (an IDX file of unsigned bytes): "
            "fetch the original file again"
        )
    if head[3] != dimensions:
        raise InputError(
            f"{path}: {head[3]} dimensions, expected {dimensions}: "
            "are image and label file swapped, or images in colour?"
        )
    if len(head) < start:
        raise InputError(
            f"{path}: {len(head)} bytes, its header announces {start}: "
            "the file is cut or damaged, fetch it again"
        )
    sizes = (head[place : place + 4] for place in range(4, start, 4))
    return tuple(int.from_bytes(size, "big") for size in sizes), start


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise InputError(f"{folder}: no {name}[.gz] there: put the four original files in this folder")


def _zipped(path: Path) -> bool:
    return path.suffix == ".gz"


def _open(path: Path) -> gzip.GzipFile | io.BufferedReader:
    # Unpacked as it is read: the header says how far.
    return gzip.GzipFile(path) if _zipped(path) else path.open("rb")
