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


@dataclass(frozen=True)
class EncodedBatch:
    """Consecutive images of one source.

    Attributes:
        source: the file, for errors.
        first: number of the first image in that file.
        images: each image's bytes, or None where there are none.
    """

    source: str
    first: int
    images: list[bytes | None]


def decode_images(batches: Iterator[EncodedBatch], places: np.ndarray) -> np.ndarray:
    """All images as uint8 [n, C, H, W]; the i-th goes to row `places[i]`.

    The first image settles size and channels: grey gives C = 1, everything else is converted to
    RGB, without transparency.

    Raises:
        InputError: for bytes that are no image, another size, colour in a grey set, more than 8
            bits per channel, more than 2²⁶ pixels, or more images than fit into memory. Sizes are
            read before anything is decoded.
    """
    out: np.ndarray | None = None
    done = 0

    def decode_slice(
        batch: EncodedBatch, start: int, target: np.ndarray, place: np.ndarray
    ) -> None:
        for offset in range(start, min(start + _SLICE, len(batch.images))):
            target[place[offset]] = _decode(batch, offset, target.shape[1:])

    # Pillow decodes outside the interpreter lock. What it warns of, _image refuses.
    with ThreadPoolExecutor(os.cpu_count()) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        for batch in batches:
            if out is None:
                with _image(batch, 0) as (image, where):
                    shape = _shape(image, where)
                what = f"{batch.source}: {len(places)} images of {_size(shape)}"
                require(len(places) * math.prod(shape), what, "make them smaller")
                out = np.empty((len(places), *shape), dtype=np.uint8)
            place = places[done : done + len(batch.images)]
            tasks = [
                pool.submit(decode_slice, batch, start, out, place)
                for start in range(0, len(batch.images), _SLICE)
            ]
            for task in tasks:
                task.result()
            done += len(batch.images)
    if out is None or done != len(places):
        raise InputError(f"{done} images for {len(places)} labels: expected one label per image")
    return out


def _decode(batch: EncodedBatch, offset: int, shape: tuple[int, ...]) -> np.ndarray:
    """One image [C, H, W], of the given shape."""
    with _image(batch, offset) as (image, where):
        found = _shape(image, where)
        grey = found[0] == 1
        if found[1:] != shape[1:] or (shape[0] == 1 and not grey):
            raise InputError(
                f"{where} is {_size(found)}, the first image {_size(shape)}: "
                "bring all images to one size and number of channels"
            )
        pixels = np.asarray(image.convert("L" if grey else "RGB"))
    return np.broadcast_to(pixels[None], shape) if grey else pixels.transpose(2, 0, 1)


@contextmanager
def _image(batch: EncodedBatch, offset: int) -> Iterator[tuple[Image.Image, str]]:
    """An image, opened and not decoded yet, and what errors call it."""
    where = f"{batch.source}: image {batch.first + offset}"
    encoded = batch.images[offset]
    if not encoded:
        raise InputError(
            f"{where} has no bytes: embed the images in the file (datasets' to_parquet does)"
        )
    try:
        with Image.open(io.BytesIO(encoded), formats=_FORMATS) as image:
            yield image, where
    except InputError:
        raise
    except Exception as error:  # Pillow raises what the bytes lead it to
        raise InputError(
            f"{where} cannot be decoded ({one_line(error)}): repair it or take it out"
        ) from error


def _shape(image: Image.Image, where: str) -> tuple[int, ...]:
    """[C, H, W] of an image that is small enough and has 8 bits."""
    if image.mode in _DEEP:
        raise InputError(
            f"{where} has mode {image.mode}, more than 8 bits per pixel: convert to 8-bit grey or "
            "RGB"
        )
    width, height = image.size
    if width * height > _PIXELS:
        raise InputError(
            f"{where} has {width}×{height} pixels, expected at most {_PIXELS:,}: make it smaller"
        )
    return (1 if image.mode in _GREY else 3), height, width


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
    def of(cls, cache_dir: Path | None, name: str, files: Iterable[Path]) -> ImageCache:
        """The cache of data set `name`, keyed by its files' names, sizes and times of change."""
        files = list(files)
        stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        digest = hashlib.sha256(json.dumps([_LAYOUT, sorted(stats)]).encode()).hexdigest()
        # Without files nothing tells a stale array from a good one: no cache.
        folder = cache_dir / re.sub(r"[^\w.-]+", "_", name) if cache_dir and files else None
        return cls(folder, digest[:16])

    def get(self, part: str, count: int, build: Callable[[], np.ndarray]) -> np.ndarray:
        """The array of `count` images of one part: memory-mapped, or built and then kept.

        An array that is stale, cut or damaged is built again; where none can be written the
        built one is returned, with a warning, since the cache only saves time.
        """
        if self.folder is None:
            return build()
        for path in self.folder.glob(f"{part}-{self.key}-*.npy"):
            found = _mapped(path, count)
            if found is not None and path == self._place(part, found):
                return found
        images = build()
        path = self._place(part, images)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, lambda file: np.save(file, images, allow_pickle=False))
        except (OSError, RunError) as error:
            warnings.warn(f"decoded images are not kept: {error}", stacklevel=2)
            return images
        for stale in self.folder.glob(f"{part}-*.npy"):
            if stale != path:
                stale.unlink(missing_ok=True)
        mapped = _mapped(path, count)
        return images if mapped is None else mapped

    def _place(self, part: str, images: np.ndarray) -> Path:
        """The name says the shape: a header that was damaged does not go with it."""
        shape = "x".join(map(str, images.shape[1:]))
        return (self.folder or Path()) / f"{part}-{self.key}-{shape}.npy"


def _mapped(path: Path, count: int) -> np.ndarray | None:
    try:
        # Copy-on-write: torch asks for writable memory, the file must stay as it is.
        images = np.load(path, mmap_mode="c", allow_pickle=False)
        whole = path.stat().st_size == images.offset + images.nbytes and images.flags.c_contiguous
    except Exception:  # whatever a damaged header leads to
        return None
    sound = images.dtype == np.uint8 and images.ndim == 4 and len(images) == count
    return images if whole and sound else None
