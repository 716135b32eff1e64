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
from itertools import chain, count
from pathlib import Path
from threading import get_native_id
from typing import Any, BinaryIO

from deeplimit.errors import InputError, RunError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
ASIDE = re.compile(r"\..+\.(\d+)\.\d+\.new")  # .NAME.PID.THREAD.new, while NAME is written
SHOWN = 40  # letters of NAME
ANOTHER = "give another folder for the runs, or make this one writable"
LONGEST = 200  # bytes of a run's name: file systems take 255, and -x2, -12 and .new may follow


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


def new_folder(runs: Path, name: str, fill: Callable[[Path, Path], object]) -> Path:
    """A folder in `runs` that appears with all that `fill` writes: NAME, or NAME-2, NAME-3, ….

    `fill` is given the folder as it is now and the path that it will have, and called once more
    where somebody else was quicker under that name. What is killed before leaves nothing that is in
    the way, and goes when the next one is made.

    Raises:
        InputError: the name is no folder's name, or the folder cannot be made or written to.
    """
    check_name(name)
    if runs.is_symlink() and not runs.exists():
        raise InputError(
            f"{runs} is a link to {runs.readlink()}, which is not there; make that folder, or give "
            "another one for the runs"
        )
    aside = aside_of(runs / name)
    try:
        runs.mkdir(parents=True, exist_ok=True)
        remove_stale(runs)
        remove(aside)
        while True:
            names = chain([name], (f"{name}-{number}" for number in count(2)))
            path = next(runs / one for one in names if not os.path.lexists(runs / one))
            aside.mkdir()
            fill(aside, path)
            try:
                os.rename(aside, path)  # not onto a folder with something in it
            except OSError:
                if not os.path.lexists(path):
                    raise
                remove(aside)
                continue
            flush_folder(runs)
            return path
    except OSError as error:
        reason = "a file is in the way" if isinstance(error, FileExistsError) else error.strerror
        raise _no_folder(runs / name if runs.is_dir() else runs, reason) from error
    finally:
        remove(aside)


def check_name(name: str) -> None:
    """Raises InputError where a name is no folder's."""
    if name in ("", ".", "..") or "/" in name or "\\" in name or not name.isprintable():
        raise InputError(f"the name {name!r} cannot be a folder's; give a plain one")
    if (length := len(name.encode())) > LONGEST:
        what = f"the name {name[:20]}… has {length} bytes; expected at most {LONGEST}"
        raise InputError(f"{what}: give a shorter one")


def check_runs(runs: Path, remedy: str = ANOTHER) -> None:
    """Raises InputError where no folder can be made, as far as can be told without making one."""
    if runs.is_symlink() and not runs.exists():
        return  # told in full by who makes it
    there = runs.absolute()
    nearest = next(path for path in (there, *there.parents) if os.path.lexists(path))
    if not nearest.is_dir():
        raise _no_folder(runs, "a file is in the way", remedy)
    if not os.access(nearest, os.W_OK):
        read_only = os.statvfs(nearest).f_flag & os.ST_RDONLY
        reason = os.strerror(errno.EROFS) if read_only else "it may not be written to"
        raise _no_folder(runs, reason, remedy)


def _no_folder(place: Path, reason: str | None, remedy: str = ANOTHER) -> InputError:
    return InputError(f"{place}: no run folder can be made there ({reason}); {remedy}")
