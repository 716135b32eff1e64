"""Whether a run folder is what it was when it was written."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from deeplimit.errors import InputError
from deeplimit.training.checkpoint import checkpoint_problems
from deeplimit.training.files import (
    COMMITTED,
    GROWING,
    RunFiles,
    State,
    accept,
    files_in,
    read_manifest,
)
from deeplimit.training.remedies import REMEDIES, remedy, stem
from deeplimit.training.run_folder import RECIPE

OWN = "if you know that it is right: deeplimit verify {} --accept"
DAMAGED = "delete it; deeplimit train --resume {} goes on from the one before"


@dataclass(frozen=True)
class CheckedFile:
    """A file of a run.

    Attributes:
        name: its path in the run folder.
        state: "sound": as run.json says, or its own checksums do; "changed", "missing"; "growing":
            metrics.csv of a training that is not at its end; "earlier": of an earlier version, or
            run.json was lost, so that nothing is known of it, and it is read as it is; "unknown":
            put there by somebody else.
        remedy: what to do; empty where nothing is wrong.
    """

    name: str
    state: State | Literal["missing"]
    remedy: str = ""


@dataclass(frozen=True)
class Verification:
    """What `verify_run` found: every file of a run."""

    run: str
    files: tuple[CheckedFile, ...]

    @property
    def wrong(self) -> tuple[CheckedFile, ...]:
        """The files that are not as they should be, or not known to be."""
        return tuple(file for file in self.files if file.remedy)


def verify_run(path: str | Path, *, accepting: bool = False) -> Verification:
    """Compares every file of a run with what run.json vouches for.

    Checkpoints, which come and go while a training goes on, carry their own checksums.

    Args:
        path: the run folder.
        accepting: write run.json anew first, for the files as they are.

    Raises:
        InputError: no run folder, or a damaged run.json in it.
        RunError: run.json cannot be written.
    """
    folder = Path(path)
    files = RunFiles(folder)
    if not (folder / RECIPE).is_file():
        raise InputError(f"{path}: no {RECIPE} in it; expected a folder of `deeplimit train`")
    if accepting:
        accept(folder)
    manifest = read_manifest(folder)
    checked = []
    there = {
        name
        for name in files_in(folder)
        if not (folder / COMMITTED / name.partition("/")[0]).exists()
    }
    for name in sorted(there.union(() if manifest is None else manifest.files)):
        found = files.find(name)
        state = "missing" if found is None else found.state
        # Of what we never read nothing need be known.
        unread = state in ("unknown", "earlier") and stem(name) not in REMEDIES
        told = OWN.format(folder) if state == "earlier" else remedy(folder, name)
        harmless = unread or state in ("sound", "growing")
        checked.append(CheckedFile(name, state, "" if harmless else told))
    for run in (folder, folder / GROWING[1]):
        for file, problem in checkpoint_problems(run).items():
            name = file.relative_to(folder).as_posix()
            told = f"{problem}; {DAMAGED.format(folder)}" if problem else ""
            checked.append(CheckedFile(name, "changed" if problem else "sound", told))
    return Verification(str(path), tuple(checked))
