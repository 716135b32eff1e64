"""`npz:FILE`: samples x and labels y in a NumPy archive."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np

from deeplimit.data.dataset import DataSet
from deeplimit.data.labels import integer_labels, number_classes
from deeplimit.data.request import Request
from deeplimit.data.splitting import split_whole
from deeplimit.errors import InputError

_CHANNELS = (1, 3)


def load_npz(request: Request) -> DataSet:
    """The arrays x and y of a file written by `numpy.savez(FILE, x=x, y=y)`; 60/20/20, stratified.

    x is [n, d], numbers, for vectors, or uint8 [n, C, H, W] or [n, H, W, C] with C = 1 or 3 for
    images (where both readings are possible, the first). y is integers [n]; its distinct values
    are the classes. Archives with pickled objects are refused.
    """
    path = Path(request.target).expanduser()
    arrays = _read(path)
    labels = integer_labels(arrays["y"], f"{path}: y")
    x = _images(arrays["x"], path) if arrays["x"].ndim == 4 else _vectors(arrays["x"], path)
    if len(x) != len(labels):
        raise InputError(f"{path}: x has {len(x)} samples, y {len(labels)}: expected as many")
    numbered, class_names = number_classes({"train": labels}, None, str(path))
    return split_whole(request.name, x, numbered["train"], class_names)


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        archive = np.load(path, allow_pickle=False)
        if isinstance(archive, np.ndarray):
            raise InputError(f"{path}: a single array, expected an archive: numpy.savez(…, x=, y=)")
        with archive:
            missing = [name for name in ("x", "y") if name not in archive.files]
            if missing:
                raise InputError(
                    f"{path}: no array {missing[0]!r} among {sorted(archive.files)}: "
                    "write it with numpy.savez(FILE, x=samples, y=labels)"
                )
            return {name: archive[name] for name in ("x", "y")}
    except InputError:
        raise
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        raise InputError(
            f"{path}: not a readable npz archive of plain numbers ({_line(error)}): write it with "
            "numpy.savez(FILE, x=samples, y=labels), without object arrays"
        ) from error
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror or _line(error)}): check the path after npz:"
        ) from error


def _line(error: Exception) -> str:
    return str(error).partition("\n")[0]


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
    with np.errstate(over="ignore"):  # too large for float32 becomes inf, refused below
        x = x.astype(np.float32)
    finite = np.isfinite(x)
    if not finite.all():
        sample, feature = np.argwhere(~finite)[0]
        raise InputError(
            f"{path}: x[{sample}, {feature}] is {x[sample, feature]}, expected finite numbers: "
            f"replace it, and {(~finite).sum() - 1} others"
        )
    return x
