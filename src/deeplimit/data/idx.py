"""IDX sets: the four files in which MNIST and its kin (Fashion-MNIST, KMNIST, …) are published.

The format (http://yann.lecun.com/exdb/mnist): two zero bytes, a type byte (8: unsigned byte), the
number of dimensions, each dimension as a big-endian 32-bit integer, then the values, row by row.
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import torch

from deeplimit.data.dataset import DataSet, Split
from deeplimit.data.labels import integer_labels, number_classes
from deeplimit.data.request import Request
from deeplimit.data.splitting import hold_out_tenths
from deeplimit.errors import InputError

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
    content = _read(path)
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != _UNSIGNED_BYTE:
        raise InputError(
            f"{path}: starts with {content[:4].hex() or 'nothing'}, expected "
            f"{bytes([0, 0, _UNSIGNED_BYTE, dimensions]).hex()} (an IDX file of unsigned bytes): "
            "fetch the original file again"
        )
    if content[3] != dimensions:
        raise InputError(
            f"{path}: {content[3]} dimensions, expected {dimensions}: "
            "are image and label file swapped, or images in colour?"
        )
    start = 4 + 4 * dimensions
    sizes = (content[place : place + 4] for place in range(4, start, 4))
    shape = tuple(int.from_bytes(size, "big") for size in sizes)
    expected = start + math.prod(shape)
    if len(content) != expected:
        raise InputError(
            f"{path}: {len(content)} bytes, its header announces {expected}: "
            "the file is cut or damaged, fetch it again"
        )
    if 0 in shape:
        raise InputError(f"{path}: shape {shape} holds no samples: fetch the file again")
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise InputError(f"{folder}: no {name}[.gz] there: put the four original files in this folder")


def _read(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix == ".gz" else content
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(
            f"{path}: not a whole gzip file ({error}): the download was cut, fetch it again"
        ) from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}): check the file") from error
