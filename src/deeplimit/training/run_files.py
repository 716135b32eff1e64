"""The files of a run: those of one verb appear together, and run.json vouches for all.

A verb writes into RUN/.staging, run.json with the size and sha256 of every file last. That folder's
renaming to RUN/.committed is the moment from which all of it counts; then its files move to their
own names, run.json last. A reader looks into .committed first, so it sees everything or nothing
wherever a process was killed; who writes next finishes the moves, or drops what is in .staging.
"""

import errno
import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from shlex import quote
from typing import Literal, NamedTuple

from filelock import FileLock, Timeout

from deeplimit.errors import InputError, RunError
from deeplimit.files import (
    ASIDE,
    aside_of,
    cannot_write,
    flush,
    flush_folder,
    remove,
    write_text,
)
from deeplimit.records import read_record
from deeplimit.terminal import is_first_process

RECIPE, METRICS, MANIFEST = "recipe.toml", "metrics.csv", "run.json"
STAGING, COMMITTED, LOCK = ".staging", ".committed", ".lock"
FORMAT = 1
# Written while a training goes on, with their own checksums.
GROWING = ("checkpoint", "heal", "search")
PAUSES = (0.0, 0.05, 0.2)  # s; files that move just now are where they belong soon
SUFFIX = ".safetensors"  # of a network, unless it is a folder
READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}


class RunFile(NamedTuple):
    """A file that a run may hold.

    Attributes:
        remedy: how it is written again where it is damaged, of the run in {}.
        result: the attribute of `RunResults` that it is, whose type says what is in it.
    """

    remedy: str
    result: str = ""


ACCEPT = "deeplimit verify {} --accept"
AGAIN, MADE = (
    "write it again: deeplimit ",
    "make the run again, by deeplimit refine, merge or interpolate",
)
# By their names without suffix: networks are a folder or a .safetensors file.
RUN_FILES = {
    "recipe": RunFile("put it back; if you changed it yourself: " + ACCEPT),
    "metrics": RunFile(
        "delete it, then deeplimit train --resume {} writes it again from the checkpoint"
    ),
    "start": RunFile(MADE),
    "model": RunFile(f"{AGAIN}train --resume {{}}"),
    "cropped": RunFile("make the cut again: deeplimit crop {}"),
    "healed": RunFile("heal its cut again: deeplimit heal {}"),
    "profile": RunFile(f"{AGAIN}profile {{}}", "profiles"),
    "trajectories": RunFile(f"{AGAIN}profile {{}}", "picture"),
    "crop": RunFile(f"{AGAIN}crop {{}} --to auto", "cut"),
    "reference": RunFile(f"{AGAIN}train --resume {{}}", "reference"),
    "heal": RunFile(f"{AGAIN}heal {{}}", "healing"),
    "refine": RunFile(MADE, "refinement"),
    "merge": RunFile(MADE, "merging"),
    "ode": RunFile(f"{AGAIN}ode {{}}", "depth_limit"),
    "certificate": RunFile("write it again: RunFolder.write_certificate", "certificate"),
    "gradient": RunFile(f"{AGAIN}gradient {{}}"),
    "report": RunFile(f"{AGAIN}report {{}}"),
}

State = Literal["sound", "changed", "growing", "unknown"]


def known(name: str) -> RunFile | None:
    """Returns the entry of a file by its path in the run, such as cropped/config.json."""
    return RUN_FILES.get(name.partition("/")[0].partition(".")[0])


def remedy(folder: Path, name: str) -> str:
    """Says what to do where a file of a run is damaged, or run.json is lost."""
    if not any((place / MANIFEST).exists() for place in (folder, folder / COMMITTED)):
        return f"run.json is lost; if you know that the files are right: {ACCEPT.format(folder)}"
    found = known(name)
    return ("put it back" if found is None else found.remedy).format(folder)


def elsewhere(folder: Path) -> str:
    """Says what to do with a run in a place that cannot be written to."""
    copy = f"DIR/{quote(folder.resolve().name)}"
    return (
        "copy the run into a folder DIR that can be: "
        f"cp -r {quote(str(folder))} {copy} && chmod -R u+w {copy}; then give {copy}"
    )


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Holds a run folder for writing; a process that has it may take it again.

    Who only reads need not hold it. The operating system gives it back when a process ends, however
    that ends. Of several processes that train together the first one holds it.

    Raises:
        InputError: the folder is read-only.
        RunError: another process holds it, or the disk is full.
    """
    lock = FileLock(folder.resolve() / LOCK, timeout=0, is_singleton=True)
    first = is_first_process()
    try:
        held = lock.acquire() if first else nullcontext()
    except Timeout:
        raise RunError(
            f"{folder}: another process is working on this run; wait until it is done, then run "
            "the same command again"
        ) from None
    except OSError as error:
        if error.errno in READ_ONLY:
            raise InputError(
                f"{folder} cannot be written to ({error.strerror}); {elsewhere(folder)}"
            ) from error
        raise cannot_write(folder / LOCK, error) from error
    with held:
        try:
            yield
        finally:
            if first and lock.lock_counter == 1:  # held still: who has opened it looks again
                remove(folder / LOCK)


@dataclass(frozen=True)
class Vouched:
    """A file as run.json has it."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """run.json: what it vouches for, by paths in the run folder."""

    format: int
    files: dict[str, Vouched]


class Found(NamedTuple):
    """Where a file or folder of a run lies now, and how it is.

    "sound": as run.json says; "changed": otherwise than it says; "growing": a training writes it,
    or was stopped; "unknown": run.json says nothing of it, or there is none.
    """

    path: Path
    state: State


@dataclass(frozen=True)
class RunFiles:
    """The files in a run folder.

    Attributes:
        folder: the run folder.
        open: whether a commit is open: what was written in it is read, though it counts not yet.
    """

    folder: Path
    open: bool = False

    @contextmanager
    def commit(self) -> Iterator["RunFiles"]:
        """All files written in the with statement become visible at its end, or none at all.

        Inside another commit it is a part of that one. One process at a time.

        Raises:
            InputError: the folder is read-only; before anything is done.
            RunError: another process is working on the run, or the disk is full; the run is as
                before.
        """
        if self.open:
            yield self
            return
        with alone(self.folder):
            remove(self.folder / STAGING)  # what a killed process left is dropped, or finished
            try:
                with _writing(self.folder):
                    _move(self.folder)
                    for path in [*self.folder.rglob(".*.new")]:
                        if ASIDE.fullmatch(path.name):
                            remove(path)
                yield replace(self, open=True)
                with _writing(self.folder):
                    _publish(self.folder)
            finally:
                remove(self.folder / STAGING)

    def place(self, name: str) -> Path:
        """Where to write a file or folder in an open commit; RunError where that cannot be."""
        staging = self.folder / STAGING
        with _writing(self.folder / name):
            staging.mkdir(exist_ok=True)
        return staging / name

    def drop(self, *names: str) -> None:
        """Lets files or folders disappear with the commit."""
        for name in names:
            remove(self.folder / STAGING / name)
            if (self.folder / name).exists():
                self.place(name).mkdir()

    def forget(self, name: str) -> None:
        """Vouches for a file no more, for it is going to grow again; errors as `commit`."""
        vouched = read_manifest(self.folder)
        if vouched.pop(name, None) is not None:
            with self.commit() as files:
                _write_manifest(files.place(MANIFEST), vouched)

    def sound(self, *names: str, unknown: bool = False) -> Path | None:
        """Where the first of these lies; InputError if it is not what run.json vouches for.

        Or nothing is said of it there, unless it may be unknown.
        """
        found = self.find(*names)
        fine = ("sound", "growing", "unknown") if unknown else ("sound", "growing")
        if found is None or found.state in fine:
            return found and found.path
        what = f"{MANIFEST} does not vouch for it"
        if found.state == "changed":
            what = f"damaged or changed: not what {MANIFEST} vouches for"
        path = self.folder / found.path.name
        raise InputError(f"{path}: {what}; {remedy(self.folder, path.name)}")

    def find(self, *names: str) -> Found | None:
        """The first of these files or folders that is there; None without any.

        A file that is not as it should be may be on its move just now: then it is looked at again.
        """
        new = (self.folder / STAGING / name for name in names)
        if self.open and (path := next(filter(Path.exists, new), None)):
            dropped = path.is_dir() and not any(path.iterdir())
            return None if dropped else Found(path, "sound")
        for pause in PAUSES:
            time.sleep(pause)
            before = self._moment()
            found = self._first(self.folder, names)
            if found is not None and found.state in ("sound", "growing"):
                return found
            if before is not None and before == self._moment():  # nothing moved in between
                return found
        # Nobody moves it any more: a process was killed.
        moved = self._first(self.folder / COMMITTED, names)
        return moved if moved is not None and moved.state == "sound" else found

    def _moment(self) -> tuple[int, ...] | None:
        """Which commit was the last; None while the files of one move, which end with run.json."""
        if (self.folder / COMMITTED).exists():
            return None
        try:
            seen = (self.folder / MANIFEST).stat()
        except FileNotFoundError:
            return ()
        return seen.st_ino, seen.st_mtime_ns

    def _first(self, root: Path, names: tuple[str, ...]) -> Found | None:
        files = read_manifest(self.folder)
        name = next((name for name in names if (root / name).exists()), None)
        if name is None:
            return None
        wanted = {n: v for n, v in files.items() if n == name or n.startswith(f"{name}/")}
        if not wanted:
            return Found(root / name, "growing" if name == METRICS else "unknown")
        try:
            sound = _vouched(root / name, root) == wanted
        except OSError:  # moved just now, or not to be read
            sound = False
        return Found(root / name, "sound" if sound else "changed")


def as_vouched(path: Path) -> Path:
    """Where a file or folder lies; InputError if a run's, and not what run.json vouches for."""
    if not (path.parent / RECIPE).is_file():
        return path
    return RunFiles(path.parent).sound(path.name, unknown=True) or path


def read_manifest(folder: Path) -> dict[str, Vouched]:
    """What run.json vouches for; nothing without one, InputError where it is damaged."""
    remedy = f"if the other files are right: {ACCEPT.format(folder)}"
    for path in (folder / COMMITTED / MANIFEST, folder / MANIFEST):
        if not path.exists():
            continue
        try:
            manifest = read_record(Manifest, path, remedy)
        except InputError:
            if path.exists():
                raise
            continue  # moved just now
        outside = [n for n in manifest.files if n[:1] == "/" or ".." in PurePosixPath(n).parts]
        if manifest.format != FORMAT or outside:
            what = "names files outside the run" if outside else f"format {manifest.format}"
            raise InputError(f"{path}: damaged, or of another version ({what}); {remedy}")
        return manifest.files
    return {}


def accept(folder: Path) -> None:
    """Writes run.json for the files as they are, whatever it said before."""
    with RunFiles(folder).commit() as files:
        found = [_vouched(folder / name, folder) for name in files_in(folder)]
        _write_manifest(files.place(MANIFEST), {n: v for one in found for n, v in one.items()})


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error) from error


def _publish(folder: Path) -> None:
    """The commit: run.json is written, the staged folder renamed, its files moved."""
    staging = folder / STAGING
    if not staging.is_dir():  # nothing was written
        return
    tops = {path.name for path in staging.iterdir()}
    flush(staging, staging.stat().st_mode & 0o666)
    if MANIFEST not in tops:
        before = read_manifest(folder).items()
        kept = {n: v for n, v in before if PurePosixPath(n).parts[0] not in tops}
        _write_manifest(staging / MANIFEST, kept | _vouched(staging, staging))
    os.rename(staging, folder / COMMITTED)
    flush_folder(folder)
    _move(folder)


def _move(folder: Path) -> None:
    """Moves what is committed to its own names; can be cut short and called again."""
    committed = folder / COMMITTED
    if not committed.is_dir():
        return
    for path in sorted(committed.iterdir(), key=lambda path: path.name == MANIFEST):
        place = folder / path.name
        if path.is_dir():
            if place.exists():
                os.rename(place, aside_of(place))
                remove(aside_of(place))
            if not any(path.iterdir()):
                path.rmdir()
                continue
        os.replace(path, place)
    flush_folder(folder)
    committed.rmdir()
    flush_folder(folder)


def _write_manifest(path: Path, files: dict[str, Vouched]) -> None:
    plain = asdict(Manifest(FORMAT, dict(sorted(files.items()))))
    write_text(path, json.dumps(plain, indent=1, ensure_ascii=False) + "\n")


def files_in(folder: Path) -> tuple[str, ...]:
    """The files of a run that are not hidden and that run.json may vouch for."""
    return tuple(
        sorted(
            path.relative_to(folder).as_posix()
            for top in folder.iterdir()
            if not top.name.startswith(".") and top.name not in (MANIFEST, *GROWING)
            for path in (top.rglob("*") if top.is_dir() else [top])
            if path.is_file()
        )
    )


def _vouched(place: Path, root: Path) -> dict[str, Vouched]:
    """Of a file, or of all files in a folder, by their paths from `root`."""
    if place.is_dir():
        return {n: v for path in place.iterdir() for n, v in _vouched(path, root).items()}
    if not place.is_file():  # nothing that can be read to its end
        return {}
    with place.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {place.relative_to(root).as_posix(): Vouched(file.tell(), digest)}
