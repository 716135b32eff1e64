"""Sets that are arrays: digits, spirals and mazes, made here, IDX files and NumPy archives.

IDX is the format in which MNIST and its kin (Fashion-MNIST, KMNIST, …) are published
(http://yann.lecun.com/exdb/mnist): two zero bytes, a type byte (8: unsigned byte), the number of
dimensions, each dimension as a big-endian 32-bit integer, then the values, row by row.
"""

from __future__ import annotations

import gzip
import math
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.lib import format as npy

from deeplimit.data import splitting
from deeplimit.data.dataset import DataSet, Split
from deeplimit.data.registry import NPZ, Request
from deeplimit.errors import InputError, refuse, several
from deeplimit.memory import require, require_unpacked
from deeplimit.reading import reading

_POINTS = 500  # per arm
_TURNS = 1.25
_INNER_RADIUS = 0.1  # keeps the arms apart at the centre: 0.2 = 10 standard deviations of the noise
_NOISE = 0.02
_MAZES, _SIDE, _WALLS = 20_000, 8, 0.4
_OPEN, _MARK = (128, 128, 128), (0, 255, 0)
_PAINTS = np.array([(255, 0, 0), (0, 0, 255)], dtype=np.uint8)
_UNSIGNED_BYTE = 8
_FILES = {"train": "train", "test": "t10k"}
_CHANNELS = (1, 3)


def load_digits(request: Request) -> DataSet:
    """Loads scikit-learn's digits as grey images [1, 8, 8]; 60/20/20, stratified.

    The grey values 0 … 16 become 0 … 255, rounded.
    """
    from sklearn import datasets

    pixels, labels = datasets.load_digits(return_X_y=True)
    x = np.rint(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
    return splitting.split_whole(
        request.name, x, labels.astype(np.int64), tuple(map(str, range(10)))
    )


def load_spirals(request: Request) -> DataSet:
    """Makes two spirals: d = C = 2, 600 / 200 / 200 points, at most 1 + noise from the centre.

    Arm c ∈ {0, 1} is r(t)·(cos α, sin α) with r = 0.1 + 0.9 t, α = 2π·1.25·t + πc, plus normal
    noise of standard deviation 0.02 in both coordinates; t = √u with u uniform in [0, 1] spreads
    the points about evenly along the arm. Another seed gives other points.
    """
    generator = np.random.default_rng(request.seed)
    arm = np.repeat([0, 1], _POINTS)
    t = np.sqrt(generator.uniform(size=2 * _POINTS))
    radius = _INNER_RADIUS + (1 - _INNER_RADIUS) * t
    angle = 2 * np.pi * _TURNS * t + np.pi * arm
    x = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    x += _NOISE * generator.standard_normal(x.shape)
    return splitting.split_whole(
        request.name, x.astype(np.float32), arm.astype(np.int64), ("arm 0", "arm 1")
    )


def load_mazes(request: Request) -> DataSet:
    """Makes mazes, colour images [3, 8, 8]: which paint reaches the mark? 12,000 / 4,000 / 4,000.

    A cell is a wall (black) with probability 0.4, otherwise open (grey). Of the open cells one is
    red, one blue, with no path between them, and one green, the mark. Paths lead up, down, left and
    right from open cell to open cell. The class is the paint from which one leads to the mark; of
    the lengths that a shortest path from there can have in the maze, from 1 on, each is as likely.
    A layer of two 3 × 3 convolutions looks two cells further: a long path needs many layers, a
    short one few. Another seed gives other mazes.
    """
    generator = np.random.default_rng(request.seed)
    drawn, cells = 2 * _MAZES, _SIDE**2  # to keep those with two paints that have a way to go
    rows = np.arange(drawn)
    mazes = generator.uniform(size=(drawn, cells)) >= _WALLS

    def pick(possible: np.ndarray) -> np.ndarray:
        draws = np.where(possible, generator.uniform(size=mazes.shape), -1)
        chosen: np.ndarray = draws.argmax(axis=1)
        return chosen

    first = pick(mazes)
    away = [_path_lengths(mazes, first)]
    second = pick(mazes & (away[0] < 0))
    away.append(_path_lengths(mazes, second))
    reached, labels = generator.integers(0, 2, (2, drawn))
    lengths = np.where(reached[:, None] == 0, *away)
    longest = lengths.max(axis=1)
    wanted = 1 + (generator.uniform(size=drawn) * longest).astype(np.int64)
    x = np.where(mazes[:, None], np.array(_OPEN, dtype=np.uint8)[:, None], 0).astype(np.uint8)
    x[rows, :, first] = _PAINTS[labels ^ reached]
    x[rows, :, second] = _PAINTS[1 - labels ^ reached]
    x[rows, :, pick(lengths == wanted[:, None])] = _MARK
    apart = (away[0].max(axis=1) > 0) & (away[1].max(axis=1) > 0) & (away[0][rows, second] < 0)
    kept = np.flatnonzero(apart)[:_MAZES]
    images = x[kept].reshape(-1, 3, _SIDE, _SIDE)
    return splitting.split_whole(request.name, images, labels[kept], ("red", "blue"))


def _path_lengths(mazes: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Finds how long the shortest paths to every cell are, from one of each maze; −1 for none."""
    reached = mazes & (np.arange(_SIDE**2) == start[:, None])
    lengths = np.where(reached, 0, -1)
    while reached.any():
        near = np.pad(reached.reshape(-1, _SIDE, _SIDE), ((0, 0), (1, 1), (1, 1)))
        near = near[:, :-2, 1:-1] | near[:, 2:, 1:-1] | near[:, 1:-1, :-2] | near[:, 1:-1, 2:]
        reached = near.reshape(mazes.shape) & mazes & (lengths < 0)
        lengths[reached] = lengths.max() + 1
    return lengths


def load_idx(request: Request) -> DataSet:
    """Loads the set in a folder of train-images-idx3-ubyte, train-labels-idx1-ubyte and t10k-*.

    Each may be gzipped (.gz); an unzipped file wins over a zipped one. Test is t10k; validation is
    held out from train (MNIST: 55,000 + 5,000). Images become uint8 [n, 1, H, W].
    """
    folder = Path(request.target)
    images, raw_labels = {}, {}
    for part, prefix in _FILES.items():
        x_file, y_file = (
            _find(folder, f"{prefix}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1")
        )
        x, y = read_idx(x_file, dimensions=3)[:, None], read_idx(y_file, dimensions=1)
        images[part], raw_labels[part] = x, splitting.integer_labels(y, str(y_file))
        if len(x) != len(y):
            raise InputError(
                f"{x_file} holds {len(x)} images, {y_file} {len(y)} labels: expected one label per "
                "image; fetch both again"
            )
    labels, class_names = splitting.number_classes(raw_labels, None, str(folder))
    rows = splitting.hold_out_tenths(labels["train"], class_names, ("validation",), str(folder))
    splits = splitting.splits_of(images["train"], labels["train"], rows)
    # A copy, because the file's bytes are read-only and torch's tensors cannot be.
    test = Split(torch.from_numpy(images["test"].copy()), torch.from_numpy(labels["test"]))
    return DataSet(request.name, class_names, **splits, test=test)


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise InputError(f"{folder}: no {name}[.gz] there: put the four original files in this folder")


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Reads the unsigned bytes in an IDX file of so many dimensions, gzipped or not; read-only."""
    zipped, start = path.suffix == ".gz", 4 + 4 * dimensions
    fault = "not a whole gzip file" if zipped else "damaged"
    with (
        reading(path, fault, "the download was cut, fetch it again"),
        # Unpacked as it is read: the header says how far.
        gzip.GzipFile(path) if zipped else path.open("rb") as file,
    ):
        head = file.read(start)
        refuse(path, _header_faults(head, dimensions, start))
        shape = tuple(map(int, np.frombuffer(head, ">u4", offset=4)))
        size = math.prod(shape)
        what, remedy = f"{path}, {' × '.join(map(str, shape))}", "fetch it again, or unpack it"
        if zipped:
            require_unpacked(size, path.stat().st_size, what, remedy)
        require(2 * size, what, remedy)  # the bytes, and the splits that are taken out of them
        content = file.read(size + 1)
    if len(content) != size:
        least = "at least " if len(content) > size else ""
        raise InputError(f"{path}: {least}{_cut(start + len(content), start + size)}")
    if 0 in shape:
        raise InputError(f"{path}: shape {shape} holds no samples: fetch the file again")
    return np.frombuffer(content, dtype=np.uint8).reshape(shape)


def _header_faults(head: bytes, dimensions: int, start: int) -> Iterator[str]:
    if len(head) < 4 or head[:2] != b"\0\0" or head[2] != _UNSIGNED_BYTE:
        yield (
            f"starts with {head[:4].hex() or 'nothing'}, expected "
            f"{bytes([0, 0, _UNSIGNED_BYTE, dimensions]).hex()} (an IDX file of unsigned bytes): "
            "fetch the original file again"
        )
    if head[3] != dimensions:
        yield (
            f"{head[3]} dimensions, expected {dimensions}: "
            "are image and label file swapped, or images in colour?"
        )
    if len(head) < start:
        yield _cut(len(head), start)


def _cut(found: int, announced: int) -> str:
    return (
        f"{found} bytes, its header announces {announced}: the file is cut or damaged, fetch it "
        "again"
    )


def load_npz(request: Request) -> DataSet:
    """Loads the arrays x and y that `numpy.savez(FILE, x=x, y=y)` wrote; 60/20/20, stratified.

    x is [n, d], numbers, for vectors, or uint8 [n, C, H, W] or [n, H, W, C] with C = 1 or 3 for
    images (where both readings are possible, the first). y is integers [n]; its distinct values
    are the classes. Archives with pickled objects are refused. Vectors that 32 bits are too coarse
    for stay in 64 (`checked_vectors`).
    """
    path = Path(request.target).expanduser()
    with reading(path, "not a readable npz archive of plain numbers", NPZ):
        with path.open("rb") as file:
            if file.read(6) == npy.MAGIC_PREFIX:
                raise InputError(f"{path}: a single array, expected an archive: {NPZ}")
        with zipfile.ZipFile(path) as archive:
            x, y = (_array(archive, name, path) for name in ("x", "y"))
    labels = splitting.integer_labels(y, f"{path}: y")
    refuse(path, _faults(x, len(labels)))
    if x.ndim == 2:
        x = splitting.checked_vectors(x, f"{path}: x")
    elif x.shape[1] not in _CHANNELS:
        x = np.moveaxis(x, 3, 1)
    numbered, class_names = splitting.number_classes({"train": labels}, None, str(path))
    return splitting.split_whole(request.name, x, numbered["train"], class_names)


def _array(archive: zipfile.ZipFile, name: str, path: Path) -> np.ndarray:
    """One array of an archive, if its header, and its file there, do not announce too much."""
    files = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
    if name not in files:
        raise InputError(
            f"{path}: no array {name!r} among {sorted(files)}: write it with "
            "numpy.savez(FILE, x=samples, y=labels)"
        )
    with archive.open(files[name]) as file:
        version = npy.read_magic(file)
        header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, _, dtype = header(file)
        count, there = math.prod(shape), files[name].file_size - file.tell()
    if dtype.hasobject:
        raise ValueError("object arrays are programs")
    if min(shape, default=1) < 0 or count * dtype.itemsize != there:
        raise ValueError(
            f"{count * dtype.itemsize} bytes announced by the shape {shape} of {dtype}, "
            f"{there} by the archive"
        )
    what = f"{path}: {name}, {' × '.join(map(str, shape))}"
    remedy = "give fewer samples, or do not compress"
    require_unpacked(there, path.stat().st_size, what, remedy)
    # The array, its splits, and of vectors what they are in 32 and 64 bits.
    require(count * (2 * dtype.itemsize + (16 if len(shape) == 2 else 0)), what, remedy)
    with archive.open(files[name]) as file:
        return npy.read_array(file, allow_pickle=False)


def _faults(x: np.ndarray, labels: int) -> Iterator[str]:
    """Says what keeps x from being the samples of so many labels."""
    if x.ndim == 4 and x.dtype != np.uint8:
        yield f"images x are of type {x.dtype}, expected uint8 in 0 … 255: convert them"
    if x.ndim == 4 and 0 in x.shape[1:]:
        yield f"images x have shape {x.shape}, no pixels: write them again"
    if x.ndim == 4 and x.shape[1] not in _CHANNELS and x.shape[3] not in _CHANNELS:
        yield (
            f"images x have shape {x.shape}, expected [n, C, H, W] or [n, H, W, C] with 1 or 3 "
            "channels C: reorder the axes"
        )
    if x.ndim not in (2, 4) or x.shape[1] == 0:
        yield f"x has shape {x.shape}, expected vectors [n, d] or images [n, C, H, W]: reshape it"
    if x.dtype.kind not in "iuf":
        yield f"x is of type {x.dtype}, expected numbers: convert it to float32"
    if len(x) != labels:
        yield f"x has {several(len(x), 'sample')}, y {labels}: expected as many"
