"""`npz:FILE`: samples x and labels y in a NumPy archive."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from deeplimit.data.dataset import RARE, DataSet
from deeplimit.data.registry import NPZ, Request
from deeplimit.data.splitting import integer_labels, number_classes, split_whole
from deeplimit.errors import InputError, several
from deeplimit.memory import require, require_unpacked
from deeplimit.reading import reading

_CHANNELS = (1, 3)


def load_npz(request: Request) -> DataSet:
    """The arrays x and y of a file written by `numpy.savez(FILE, x=x, y=y)`; 60/20/20, stratified.

    x is [n, d], numbers, for vectors, or uint8 [n, C, H, W] or [n, H, W, C] with C = 1 or 3 for
    images (where both readings are possible, the first). y is integers [n]; its distinct values
    are the classes. Archives with pickled objects are refused. Vectors that 32 bits are too coarse
    for stay in 64 (`checked_vectors`).
    """
    path = Path(request.target).expanduser()
    arrays = _read(path)
    labels = integer_labels(arrays["y"], f"{path}: y")
    x = _images(arrays["x"], path) if arrays["x"].ndim == 4 else _vectors(arrays["x"], path)
    if len(x) != len(labels):
        raise InputError(
            f"{path}: x has {several(len(x), 'sample')}, y {len(labels)}: expected as many"
        )
    numbered, class_names = number_classes({"train": labels}, None, str(path))
    return split_whole(request.name, x, numbered["train"], class_names)


def _read(path: Path) -> dict[str, np.ndarray]:
    with reading(path, "not a readable npz archive of plain numbers", NPZ):
        with path.open("rb") as file:
            if file.read(6) == npy.MAGIC_PREFIX:
                raise InputError(f"{path}: a single array, expected an archive: {NPZ}")
        with zipfile.ZipFile(path) as archive:
            files = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            missing = [name for name in ("x", "y") if name not in files]
            if missing:
                raise InputError(
                    f"{path}: no array {missing[0]!r} among {sorted(files)}: write it with "
                    "numpy.savez(FILE, x=samples, y=labels)"
                )
            for name in ("x", "y"):
                _require_memory(archive, files[name], f"{path}: {name}", path.stat().st_size)
            return {name: _array(archive, files[name]) for name in ("x", "y")}


def _require_memory(
    archive: zipfile.ZipFile, info: zipfile.ZipInfo, source: str, packed: int
) -> None:
    """Refuses an array whose header, or whose file in the archive, announces too much."""
    with archive.open(info) as file:
        version = npy.read_magic(file)
        header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, _, dtype = header(file)
        count, there = math.prod(shape), info.file_size - file.tell()
        if dtype.hasobject:
            raise ValueError("object arrays are programs")
        if min(shape, default=1) < 0 or count * dtype.itemsize != there:
            raise ValueError(
                f"{count * dtype.itemsize} bytes announced by the shape {shape} of {dtype}, "
                f"{there} by the archive"
            )
    what, remedy = (
        f"{source}, {' × '.join(map(str, shape))}",
        "give fewer samples, or do not compress",
    )
    require_unpacked(there, packed, what, remedy)
    # The array, its splits, and of vectors what they are in 32 and 64 bits.
    require(count * (2 * dtype.itemsize + (16 if len(shape) == 2 else 0)), what, remedy)


def _array(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(info) as file:
        return npy.read_array(file, allow_pickle=False)


def _images(x: np.ndarray, path: Path) -> np.ndarray:
    if x.dtype != np.uint8:
        raise InputError(
            f"{path}: images x are of type {x.dtype}, expected uint8 in 0 … 255: convert them"
        )
    if 0 in x.shape[1:]:
        raise InputError(f"{path}: images x have shape {x.shape}, no pixels: write them again")
    if x.shape[1] in _CHANNELS:
        return x
    if x.shape[3] in _CHANNELS:
        return np.moveaxis(x, 3, 1)
    raise InputError(
        f"{path}: images x have shape {x.shape}, expected [n, C, H, W] or [n, H, W, C] with 1 or 3 "
        "channels C: reorder the axes"
    )


def _vectors(x: np.ndarray, path: Path) -> np.ndarray:
    if x.ndim != 2 or x.shape[1] == 0:
        raise InputError(
            f"{path}: x has shape {x.shape}, expected vectors [n, d] or images [n, C, H, W]: "
            "reshape it"
        )
    if x.dtype.kind not in "iuf":
        raise InputError(f"{path}: x is of type {x.dtype}, expected numbers: convert it to float32")
    return checked_vectors(x, f"{path}: x")


_NARROW = 16  # standard deviations; so far from 0 a feature can lie and lose nothing in 32 bits
_ROWS = 10_000  # looked at, evenly spread; of more, neighbouring values meet in 32 bits by chance
_BLOCK = 64  # features at once
_NOISE = 2.0**-42  # of a large value: what arithmetic in 64 bits leaves between equal values
_SHARE = 0.01  # of a feature's values that may meet others: those of a smooth distribution


def checked_vectors(x: np.ndarray, source: str) -> np.ndarray:
    """Samples [n, d] as float32, or as float64 where float32 is too coarse; every number finite.

    A network standardises its inputs, z = (x − mean) / std, and goes on in 32 bits. That is fine
    for x near 0; where it lies further out than its spread, such as a year or x + 10⁹, the rounding
    of x itself would be seen, so x stays in 64 bits until it is standardised.

    Args:
        x: integers or floats.
        source: what errors name.

    Raises:
        InputError: numbers that are not finite, or a feature whose different values become one: two
            integers, or more than 1 % of its floats. So it is with a rare value far from all
            others, or with identification numbers of more than 16 digits.
    """
    with np.errstate(over="ignore"):  # too large for float32 becomes inf, refused below
        narrow = x.astype(np.float32)
    finite = np.isfinite(narrow)
    if not finite.all():
        sample, feature = np.argwhere(~finite)[0]
        raise InputError(
            f"{source}[{sample}, {feature}] is {narrow[sample, feature]}, expected finite numbers: "
            f"replace it, and {(~finite).sum() - 1} others"
        )
    if x.dtype.itemsize < 4:
        return narrow
    coarse = False
    for first in range(0, x.shape[1], _BLOCK):
        block = x[:, first : first + _BLOCK]
        wide = block.astype(np.float64)
        mean, std = wide.mean(axis=0), wide.std(axis=0)
        spread = np.maximum(std, np.abs(wide - mean).max(axis=0) / RARE)
        spread[spread == 0] = 1
        some, names = block[:: -(-len(block) // _ROWS)], range(first, first + len(mean))
        _require_distinct(some, mean, spread, [f"{source}[:, {j}]" for j in names])
        far = np.abs(wide).max(axis=0) > _NARROW * spread
        coarse |= bool((narrow[:, first : first + _BLOCK] != wide)[:, far].any())
    return x.astype(np.float64) if coarse else narrow


def _require_distinct(
    x: np.ndarray, mean: np.ndarray, std: np.ndarray, features: list[str]
) -> None:
    """Refuses features whose different values are one number once standardised in 32 bits."""
    x = np.sort(x, axis=0)
    z = ((x.astype(np.float64) - mean) / std).astype(np.float32)
    whole = x.dtype.kind in "iu"
    size = np.abs(x[[len(x) // 20, -1 - len(x) // 20]]).max(axis=0)  # of all but rare values
    noise = 0 if whole else _NOISE * np.where(size > 0, size, np.abs(x).max(axis=0))
    differ = (x[1:] != x[:-1]) if whole else (x[1:] - x[:-1] > noise)
    met = differ & (z[1:] == z[:-1])
    allowed = 0 if whole else _SHARE * (1 + differ.sum(axis=0))
    wrong = np.flatnonzero(met.sum(axis=0) > allowed)
    if len(wrong):
        j = wrong[0]
        i = np.flatnonzero(met[:, j])[0]
        raise InputError(
            f"{features[j]} has the values {x[i, j]} and {x[i + 1, j]}, which are one "
            f"in 32 bits after (x − mean) / std, with std = {std[j]:.3g}, as are "
            f"{met[:, j].sum() - 1} other pairs: take away what they have in common, take the "
            "logarithm, or remove rare values"
        )
