"""Decoded images on disk, so that the second load maps them instead of decoding."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deeplimit.errors import RunError
from deeplimit.files import write_whole

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
