"""Files and folders that are whole or not there: written aside, flushed to the disk, renamed.

Every room writes by these functions.
"""

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from threading import get_native_id
from typing import Any, BinaryIO

from deeplimit.errors import RunError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
ASIDE = re.compile(r"\..+\.(\d+)\.\d+\.new")  # .NAME.PID.THREAD.new, while NAME is written
SHOWN = 40  # letters of NAME


def aside_of(path: Path) -> Path:
    """Where this thread writes what is going to be `path`."""
    return path.with_name(f".{path.name[:SHOWN]}.{os.getpid()}.{get_native_id()}.new")


@contextmanager
def whole(path: Path, *, folder: bool = False) -> Iterator[Path]:
    """Yields a place beside `path` for a file, or a folder, which becomes `path` at the end.

    A killed process leaves the old one or the new one, also after a power cut; of a folder that
    replaces another for a moment none. What a killed process left aside goes. File modes are those
    that the umask says, whatever a library gave its files. Where the disk is full, or does not let
    itself be written to, `path` is as before, and a RunError says so.
    """
    aside = aside_of(path)
    try:
        remove_stale(path.parent, path.name)
        remove(aside)
        aside.mkdir() if folder else aside.touch(exist_ok=False)
        mode = aside.stat().st_mode & 0o666
        yield aside
        flush(aside, mode)
        if folder:
            remove(path)
        os.replace(aside, path)
        flush_folder(path.parent)
    except RunError:
        raise
    except (OSError, RuntimeError) as error:  # torch.save turns what its file says into the latter
        raise cannot_write(path, error) from error
    finally:
        remove(aside)


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Calls write(file) on a file that becomes `path`; errors as `whole`."""
    with whole(path) as aside, aside.open("wb") as file:
        write(file)


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole; errors as `whole`."""
    write_whole(path, lambda file: file.write(text.encode()))


def remove(path: Path) -> None:
    """Removes a file, or a folder with all in it, as far as that can be done."""
    with suppress(OSError):  # a file too many does no harm
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def remove_stale(folder: Path, name: str = "*") -> None:
    """Removes what processes that are gone left aside of `name` in a folder; of all without one."""
    pattern = name if name == "*" else escape(name[:SHOWN])
    for path in folder.glob(f".{pattern}.*.new"):
        found = ASIDE.fullmatch(path.name)
        if found is not None and _gone(int(found[1])):
            remove(path)


def _gone(process: int) -> bool:
    """No process on this machine has this number."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except OSError:
        return False
    return False


def flush(path: Path, mode: int) -> None:
    """Makes a file, or all below a folder, last through a power cut; sets the files' modes."""
    if path.is_dir():
        for below in path.iterdir():
            flush(below, mode)
        flush_folder(path)
        return
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_mode & 0o777 != mode:
            os.fchmod(file.fileno(), mode)
        os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Makes renames in a folder last through a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def cannot_write(path: Path, error: Any) -> RunError:
    """The error for a file that could not be written; it says what to do."""
    number = getattr(error, "errno", None) or getattr(error.__context__, "errno", None)
    remedy = "free some space" if number in FULL else "see that the disk can be written to"
    reason = os.strerror(number) if number else str(error).splitlines()[0]
    return RunError(f"{path} cannot be written: {reason}; {remedy}, then run it again")
