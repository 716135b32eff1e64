"""Files that are whole or not there: written aside, flushed to the disk, then renamed."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from deeplimit.errors import RunError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Calls write(file) on a file aside and renames it to `path`.

    A killed process leaves either the old file or the new one, also after a power cut.

    Raises:
        RunError: the disk is full or does not let itself be written to; `path` is as before.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        flush_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch.save turns what its file says into the latter
        raise cannot_write(path, error) from error
    finally:
        aside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole; errors as `write_whole`."""
    write_whole(path, lambda file: file.write(text.encode()))


def flush_folder(folder: Path) -> None:
    """Makes renames in a folder last through a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def cannot_write(path: Path, error: Exception) -> RunError:
    """The error for a file that could not be written; it says what to do."""
    number = getattr(error, "errno", None) or getattr(error.__context__, "errno", None)
    remedy = "free some space" if number in FULL else "see that the disk can be written to"
    reason = os.strerror(number) if number else str(error).splitlines()[0]
    return RunError(f"{path} cannot be written: {reason}; {remedy}, then run it again")
