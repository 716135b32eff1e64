"""Encoded images (JPEG, PNG, …) to one array."""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from PIL import Image

from deeplimit.errors import InputError
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
