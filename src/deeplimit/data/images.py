"""Encoded images (JPEG, PNG, …) to one array, kept on disk: the second load maps it."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from deeplimit.errors import InputError, RunError
from deeplimit.files import write_whole
from deeplimit.memory import require
from deeplimit.reading import one_line

_GREY = ("1", "L", "LA")
_DEEP = ("F", "I", "I;16", "I;16B", "I;16L", "I;16N")  # more than 8 bits a pixel
_SLICE = 64  # images per task of the pool
_PIXELS = 2**26  # of one image, 8192²
# What sets are published in. Not all that Pillow opens: for EPS it runs another program.
_FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")

Encoded = tuple[str, bytes | None]  # what errors call an image, and its bytes


def decode_images(
    batches: Iterable[tuple[str, int, list[bytes | None]]], places: np.ndarray
) -> np.ndarray:
    """Decodes images to uint8 [n, C, H, W]; the i-th goes to row `places[i]`.

    The first image settles size and channels: grey gives C = 1, everything else is converted to
    RGB, without transparency. Sizes are read before anything is decoded. Batches are (file, number
    of the first image in that file, images), in order.
    """
    out: np.ndarray | None = None
    done = 0
    # Pillow decodes outside the interpreter lock. What it warns of, _image refuses.
    with ThreadPoolExecutor(os.cpu_count()) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        for source, first, found in batches:
            images = [(f"{source}: image {first + n}", one) for n, one in enumerate(found)]
            if out is None:
                with _image(*images[0]) as (_, shape):
                    what = f"{source}: {len(places)} images of {_size(shape)}"
                    require(len(places) * math.prod(shape), what, "make them smaller")
                out = np.empty((len(places), *shape), dtype=np.uint8)
            rows = places[done : done + len(images)]
            parts = [slice(start, start + _SLICE) for start in range(0, len(images), _SLICE)]
            tasks = [pool.submit(_decode, images[part], rows[part], out) for part in parts]
            for task in tasks:
                task.result()
            done += len(images)
    if out is None or done != len(places):
        raise InputError(f"{done} images for {len(places)} labels: expected one label per image")
    return out


def _decode(images: list[Encoded], rows: np.ndarray, out: np.ndarray) -> None:
    """Decodes images into their rows [C, H, W] of an array."""
    for (where, encoded), row in zip(images, rows, strict=True):
        with _image(where, encoded) as (image, found):
            grey, shape = found[0] == 1, out.shape[1:]
            if found[1:] != shape[1:] or (shape[0] == 1 and not grey):
                raise InputError(
                    f"{where} is {_size(found)}, the first image {_size(shape)}: "
                    "bring all images to one size and number of channels"
                )
            pixels = np.asarray(image.convert("L" if grey else "RGB"))
        out[row] = pixels if grey else pixels.transpose(2, 0, 1)


@contextmanager
def _image(where: str, encoded: bytes | None) -> Iterator[tuple[Image.Image, tuple[int, ...]]]:
    """An image, opened and not decoded yet, and its shape [C, H, W]."""
    if not encoded:
        raise InputError(
            f"{where} has no bytes: embed the images in the file (datasets' to_parquet does)"
        )
    try:
        with Image.open(io.BytesIO(encoded), formats=_FORMATS) as image:
            width, height = image.size
            if image.mode in _DEEP:
                raise InputError(
                    f"{where} has mode {image.mode}, more than 8 bits per pixel: convert to 8-bit "
                    "grey or RGB"
                )
            if width * height > _PIXELS:
                raise InputError(
                    f"{where} has {width}×{height} pixels, expected at most {_PIXELS:,}: make it "
                    "smaller"
                )
            yield image, (1 if image.mode in _GREY else 3, height, width)
    except InputError:
        raise
    except Exception as error:  # Pillow raises what the bytes lead it to
        raise InputError(
            f"{where} cannot be decoded ({one_line(error)}): repair it or take it out"
        ) from error


def _size(shape: tuple[int, ...]) -> str:
    channels, height, width = shape
    return f"{width}×{height} in {'grey' if channels == 1 else 'colour'}"


_LAYOUT = 3  # raise it when the order or form of cached images changes


@dataclass(frozen=True)
class ImageCache:
    """A folder of arrays, one per part of a data set.

    Attributes:
        folder: where the arrays lie; None for no cache.
        key: changes whenever the files do that the arrays come from.
    """

    folder: Path | None
    key: str

    @classmethod
    def of(cls, cache_dir: Path | None, name: str, files: list[Path]) -> ImageCache:
        """Makes the cache of a data set, keyed by its files' names, sizes and times of change."""
        stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        digest = hashlib.sha256(json.dumps([_LAYOUT, sorted(stats)]).encode()).hexdigest()
        # Without files nothing tells a stale array from a good one: no cache.
        folder = cache_dir / re.sub(r"[^\w.-]+", "_", name) if cache_dir and files else None
        return cls(folder, digest[:16])

    def get(self, part: str, count: int, build: Callable[[], np.ndarray]) -> np.ndarray:
        """Maps the array of `count` images of one part, or builds and then keeps it.

        An array that is stale, cut or damaged is built again; where none can be written the
        built one is returned, with a warning, since the cache only saves time.
        """
        if self.folder is None:
            return build()
        for path in self.folder.glob(f"{part}-{self.key}-*.npy"):
            if (found := _mapped(path, count)) is not None:
                return found
        images = build()
        path = self.folder / f"{part}-{self.key}-{_sizes(images)}.npy"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(path, lambda file: np.save(file, images, allow_pickle=False))
        except (OSError, RunError) as error:
            warnings.warn(f"decoded images are not kept: {error}", stacklevel=2)
            return images
        for stale in self.folder.glob(f"{part}-*.npy"):
            if stale != path:
                stale.unlink(missing_ok=True)
        mapped = _mapped(path, count)
        return images if mapped is None else mapped


def _sizes(images: np.ndarray) -> str:
    """The part of a file's name that a damaged header does not go with."""
    return "x".join(map(str, images.shape[1:]))


def _mapped(path: Path, count: int) -> np.ndarray | None:
    try:
        # Copy-on-write: torch asks for writable memory, the file must stay as it is.
        images = np.load(path, mmap_mode="c", allow_pickle=False)
        whole = path.stat().st_size == images.offset + images.nbytes and images.flags.c_contiguous
    except Exception:  # whatever a damaged header leads to
        return None
    sound = images.dtype == np.uint8 and images.ndim == 4 and len(images) == count
    return images if whole and sound and path.stem.endswith(f"-{_sizes(images)}") else None
