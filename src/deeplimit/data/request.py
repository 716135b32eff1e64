"""What a source of data is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Request:
    """One call of `load`, as a source sees it.

    Attributes:
        name: the whole name, as given: "digits", "mnist", "npz:FILE".
        target: what to read: the folder DATA_DIR/NAME, or what follows the prefix in the name.
        cache_dir: where decoded images may be kept; None for nowhere.
        seed: for data that is generated.
    """

    name: str
    target: str
    cache_dir: Path | None
    seed: int
