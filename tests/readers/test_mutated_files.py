"""Damaged files of every kind: one line and exit code 2, or the value that the file says.

DEEPLIMIT_MUTANTS=20000 tries so many; 2,000 otherwise, the same ones each time.
"""

import os
import random
import shutil
import signal
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from file_readers import READERS, Reader
from mutations import changed_bytes, changed_json, changed_toml

from deeplimit.errors import InputError

MUTANTS = int(os.environ.get("DEEPLIMIT_MUTANTS", "2000"))
SECONDS = 30  # for one file


@contextmanager
def time_limit() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"still reading after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of every kind of file a folder in which it is whole, not to be changed.

    Each is read once, for what is imported then counts for none.
    """
    found = {}
    for reader in READERS:
        found[reader.file] = folder = tmp_path_factory.mktemp("whole")
        reader.make(folder)
        reader.read(shutil.copytree(folder, tmp_path_factory.mktemp("read") / "copy"))
    return found


def mutant(reader: Reader, whole: dict[str, Path], seed: int) -> bytes:
    draw = random.Random(f"{reader.file} {seed}")
    content = (whole[reader.file] / reader.file).read_bytes()
    if reader.kind == "json" and draw.random() < 0.6:
        return changed_json(content, draw)
    if reader.kind == "toml" and draw.random() < 0.6:
        return changed_toml(content, draw)
    other = draw.choice(list(whole))
    return changed_bytes(content, (whole[other] / other).read_bytes(), draw)


def verdict(reader: Reader, folder: Path) -> str | None:
    """What is wrong with how a file in a folder is read; None if nothing is."""
    try:
        with time_limit(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = reader.read(folder)
    except InputError as refused:
        return "more than a line" if "\n" in str(refused) else None
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"{type(error).__name__}: {error}"
    try:
        return None if reader.right(folder, value) else "another value than the file's"
    except Exception as error:  # what the package takes, others cannot read
        return f"taken, but {type(error).__name__}: {error}"


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.file)
def test_a_whole_file_is_read_right(reader: Reader, tmp_path: Path) -> None:
    reader.make(tmp_path)
    assert reader.right(tmp_path, reader.read(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.file)
def test_a_damaged_file_is_refused_in_a_line_or_read_right(
    reader: Reader, whole: dict[str, Path]
) -> None:
    wrong = {}
    for seed in range(-(-MUTANTS // len(READERS))):
        with tempfile.TemporaryDirectory() as name:
            folder = shutil.copytree(whole[reader.file], Path(name) / "copy")
            (folder / reader.file).write_bytes(mutant(reader, whole, seed))
            problem = verdict(reader, folder)
        if problem is not None:
            wrong[seed] = problem[:300]
    assert not wrong
