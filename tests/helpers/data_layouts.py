"""Encoders of the layouts that people have on disk: IDX, and Parquet as on the hub."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from PIL import Image


def idx_bytes(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim])
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + sizes + array.astype(np.uint8).tobytes()


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def make_images(count: int, seed: int = 0, shape: tuple[int, ...] = (6, 5, 3)) -> np.ndarray:
    """Random uint8 images [n, H, W, 3] or [n, H, W]."""
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def image_table(
    encoded: Sequence[bytes | None],
    labels: dict[str, Sequence[object]],
    names: dict[str, Sequence[str]] | None = None,
    image_column: str = "img",
) -> pa.Table:
    """A table in the hub's layout; PNG is lossless, so that pixels can be compared."""
    columns: dict[str, object] = {
        image_column: pa.array(
            [{"bytes": data, "path": f"{row}.png"} for row, data in enumerate(encoded)],
            type=pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
        )
    }
    columns |= {name: pa.array(list(values)) for name, values in labels.items()}
    table = pa.table(columns)
    if names is None:
        return table
    features: dict[str, object] = {image_column: {"_type": "Image"}}
    for name in labels:
        features[name] = (
            {"_type": "ClassLabel", "names": list(names[name])}
            if name in names
            else {"_type": "Value", "dtype": "int64"}
        )
    return table.replace_schema_metadata(
        {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    )
