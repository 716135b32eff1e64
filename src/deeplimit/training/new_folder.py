"""New folders that appear with what belongs into them, under a name that nobody has."""

import errno
import os
import re
from collections.abc import Callable
from itertools import chain, count
from pathlib import Path

from deeplimit.errors import InputError
from deeplimit.files import aside_of, flush_folder, remove, remove_stale
from deeplimit.training.run_files import elsewhere

ANOTHER = "give another folder for the runs, or make this one writable"
LONGEST = 200  # bytes of a run's name: file systems take 255, and -x2, -12 and .new may follow


def name_of(data: str) -> str:
    """digits, hub:OWNER/NAME, npz:FOLDER/NAME.npz: the last part of it."""
    return re.sub(r"[^\w.-]+", "-", Path(data.rpartition(":")[2]).stem).strip(".") or "run"


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


def check_beside(run: Path) -> None:
    """Raises InputError where nothing can be written beside a run; before long work."""
    check_runs(run.resolve().parent, elsewhere(run))


def _no_folder(place: Path, reason: str | None, remedy: str = ANOTHER) -> InputError:
    return InputError(f"{place}: no run folder can be made there ({reason}); {remedy}")
