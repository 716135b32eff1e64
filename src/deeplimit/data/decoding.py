"""Encoded images (JPEG, PNG, …) to one array."""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from PIL import Image

from deeplimit.errors import InputError

_GREY = ("1", "L", "LA")
_DEEP = ("F", "I", "I;16", "I;16B", "I;16L", "I;16N")  # more than 8 bits a pixel
_SLICE = 64  # images per task of the pool


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
        InputError: for bytes that are no image, another size, colour in a grey set, or more than
            8 bits per channel.
    """
    out: np.ndarray | None = None
    done = 0

    def decode_slice(
        batch: EncodedBatch, start: int, target: np.ndarray, place: np.ndarray
    ) -> None:
        for offset in range(start, min(start + _SLICE, len(batch.images))):
            target[place[offset]] = _decode(batch, offset, target.shape[1:])

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes outside the interpreter lock
        for batch in batches:
            if out is None:
                first = _decode(batch, 0, None)
                out = np.empty((len(places), *first.shape), dtype=np.uint8)
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


def _decode(batch: EncodedBatch, offset: int, shape: tuple[int, ...] | None) -> np.ndarray:
    """One image [C, H, W], of the given shape if any."""
    where = f"{batch.source}: image {batch.first + offset}"
    encoded = batch.images[offset]
    if not encoded:
        raise InputError(
            f"{where} has no bytes: embed the images in the file (datasets' to_parquet does)"
        )
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            mode = image.mode
            grey = mode in _GREY
            pixels = np.asarray(image.convert("L" if grey else "RGB"))
    except (
        OSError,
        ValueError,
        SyntaxError,
        EOFError,
        struct.error,
        Image.DecompressionBombError,
    ) as error:
        raise InputError(
            f"{where} cannot be decoded ({str(error).partition(chr(10))[0]}): "
            "repair it or take it out"
        ) from error
    if mode in _DEEP:
        raise InputError(
            f"{where} has mode {mode}, more than 8 bits per pixel: convert to 8-bit grey or RGB"
        )
    if shape is not None and shape[0] == 3 and grey:
        pixels = np.repeat(pixels[:, :, None], 3, axis=2)
    pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    if shape is not None and pixels.shape != shape:
        raise InputError(
            f"{where} is {_size(pixels.shape)}, the first image {_size(shape)}: "
            "bring all images to one size and number of channels"
        )
    return pixels


def _size(shape: tuple[int, ...]) -> str:
    channels, height, width = shape
    return f"{width}×{height} in {'grey' if channels == 1 else 'colour'}"
