"""Data sets by name: the one place where a source is entered."""

from __future__ import annotations

import os
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deeplimit.errors import InputError, did_you_mean
from deeplimit.reading import reading

if TYPE_CHECKING:
    from deeplimit.data.dataset import DataSet
else:
    DataSet = Any  # names are checked without torch

# A new source is one file with a function Request → DataSet, and one entry here, FILE:FUNCTION.
BY_NAME = {name: f"arrays:load_{name}" for name in ("digits", "mazes", "spirals")}
BY_PREFIX = {
    "hub": "tables:load_hub",
    "npz": "arrays:load_npz",
    "text": "text:load_text",
    "table": "text:load_table",
}
BY_LAYOUT = {"*-ubyte*": "arrays:load_idx", "*.parquet": "tables:load_parquet"}  # files in a folder
FOLDERS = ("mnist", "cifar10")  # well-known names of folders, for error messages only
NPZ = (
    "check the path, or write it with numpy.savez(FILE, x=samples, y=labels), without object arrays"
)
FILES = {"npz": NPZ, "text": "check the path", "table": "check the path"}

ENVIRONMENT = "DEEPLIMIT_DATA"


@dataclass(frozen=True)
class Request:
    """One call of `load_dataset`, as a source sees it.

    Attributes:
        name: the whole name, as given: "digits", "mnist", "npz:FILE".
        target: what to read: the folder DATA_DIR/NAME, or what follows the prefix in the name.
        cache_dir: where decoded images may be kept; None for nowhere.
        seed: for data that is generated.
        model: folder, or name in the hub's cache, of the model that reads it, for texts.
        length: tokens of a window of text; None for the reader's own.
    """

    name: str
    target: str
    cache_dir: Path | None
    seed: int
    model: str | None = None
    length: int | None = None


def load_dataset(
    name: str,
    *,
    data_dir: Path | None = None,
    cache_dir: Path | None = None,
    seed: int = 0,
    model: str | None = None,
    length: int | None = None,
) -> DataSet:
    """Loads the data set called `name`, with its training, validation and test split.

    >>> data = load_dataset("digits")
    >>> len(data.train), len(data.validation), len(data.test), data.shape
    (1079, 359, 359, (1, 8, 8))

    =============== ==========================================================================
    digits          scikit-learn's digits, grey images of 8×8; no download
    mazes           which of two paints reaches the mark, colour images of 8×8, generated
    spirals         two spirals in the plane, generated from the seed
    mnist, NAME     the folder DATA_DIR/NAME with the four IDX files, gzipped or not
    cifar10, NAME   the folder DATA_DIR/NAME with train-*.parquet and test-*.parquet
    hub:OWNER/NAME  an image set of the Hugging Face hub, or hub:PATH of a folder in its layout
    npz:FILE        the arrays x and y of a NumPy archive
    text:FILE       a text, in windows of tokens; each token is predicted from those before it
    table:FILE      texts and their labels, a .csv, .jsonl or .parquet with columns text and label
    =============== ==========================================================================

    Test is the set's own test part where it has one. What a set lacks is held out from its
    training part, stratified by class: a tenth, at most 5,000; sets without any parts are split
    60/20/20, a text 80/10/10 in the order of the file. The held-out samples are always the same,
    whatever `seed`; only mazes and spirals depend on it.

    Args:
        name: one of the above.
        data_dir: DATA_DIR; by default the environment variable DEEPLIMIT_DATA.
        cache_dir: where decoded Parquet and hub images are kept, memory-mapped; None: in memory.
        seed: for generated data, ≥ 0.
        model: for texts: the folder of the transformers model that reads them, with its tokenizer.
        length: for texts: tokens of a window, or the most of a text in a table; by default 256, or
            as many as the model reads.

    Raises:
        InputError: for an unknown name and for data that is missing, damaged or unusable, that
            does not fit into memory, or that unpacks to more than 1 GiB and a hundred times its
            file. Sizes are read before anything is unpacked.
    """
    if seed < 0:
        raise InputError(f"seed {seed}: give an integer of at least 0")
    source, target = find_source(name, data_dir)
    load: Callable[[Request], DataSet] = pkgutil.resolve_name(f"deeplimit.data.{source}")
    return load(Request(name, target, cache_dir, seed, model, length))


def find_source(name: str, data_dir: Path | None = None) -> tuple[str, str]:
    """Finds which file and function reads a data set, and what it is to read; loads nothing."""
    prefix, colon, rest = name.partition(":")
    if colon and prefix in BY_PREFIX:
        if not rest:
            raise InputError(f"data set {name!r}: nothing after the colon: see {prefix}:… in help")
        if prefix in FILES:
            with reading(Path(rest).expanduser(), "cannot be read", FILES[prefix]):
                pass
        return BY_PREFIX[prefix], rest
    if name in BY_NAME:
        return BY_NAME[name], name
    folder = _folder(name, data_dir)
    for pattern, source in BY_LAYOUT.items():
        if any(folder.glob(pattern)):
            return source, str(folder)
    raise InputError(
        f"{folder}: neither train-images-idx3-ubyte[.gz] and its kin nor train-*.parquet in this "
        "folder: put the data set's files there"
    )


def _folder(name: str, data_dir: Path | None) -> Path:
    """DATA_DIR/name, which exists; or the error that helps."""
    if data_dir is None and os.environ.get(ENVIRONMENT):
        data_dir = Path(os.environ[ENVIRONMENT])
    if data_dir is not None and not data_dir.is_dir():
        raise InputError(
            f"data folder {data_dir} does not exist: pass another --data-dir, or set {ENVIRONMENT}"
        )
    if data_dir is not None and name and (data_dir / name).is_dir():
        return data_dir / name
    if name in FOLDERS:
        raise InputError(
            f"data set {name!r} is read from DATA_DIR/{name}, but no data folder was given: "
            f"pass --data-dir or set {ENVIRONMENT}"
            if data_dir is None
            else f"no folder {data_dir / name}: put the data set {name!r} there"
        )
    known = [*BY_NAME, *FOLDERS]
    there = "with --data-dir, a folder there"
    if data_dir is not None:
        there = f"a folder in {data_dir}"
        found = {folder.parent.name for like in BY_LAYOUT for folder in data_dir.glob(f"*/{like}")}
        known += sorted(found - set(known))
    prefixes = [f"{prefix}:" for prefix in BY_PREFIX]
    near = did_you_mean(name.lower(), known + prefixes)
    guess = f"{near} Expected" if near else ": expected"
    listed = ", ".join(known + [f"{prefix}…" for prefix in prefixes])
    raise InputError(f"unknown data set {name!r}{guess} one of {listed}, or {there}")
