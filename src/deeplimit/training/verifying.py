"""A run folder compared with what it was when it was written."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from deeplimit.records import read_record
from deeplimit.training import run_files
from deeplimit.training.checkpoint import checkpoint_problems
from deeplimit.training.recipe import read_recipe
from deeplimit.training.run_files import RECIPE, RunFiles, State
from deeplimit.training.run_folder import check_run, result_kinds

DAMAGED = "delete it; deeplimit train --resume {} goes on from the one before"


@dataclass(frozen=True)
class CheckedFile:
    """A file of a run, by its path in the folder.

    It is "sound": as run.json says, or its own checksums do; "changed", "missing"; "growing":
    metrics.csv of a training that is not at its end; "unknown": put there by somebody else, or
    run.json was lost. What to do says the remedy, which is empty where nothing is wrong.
    """

    name: str
    state: State | Literal["missing"]
    remedy: str = ""


@dataclass(frozen=True)
class Verification:
    """Every file of a run, as `verify_run` found it."""

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
        InputError: no run folder, or a damaged run.json in it; to be accepted a recipe or a result
            that cannot be read.
        RunError: run.json cannot be written.
    """
    folder = Path(path)
    files = RunFiles(folder)
    check_run(folder)
    if accepting:
        read_recipe(folder / RECIPE)  # and the results, before somebody vouches for them
        for stem, kind in result_kinds().items():
            if (file := folder / f"{stem}.json").is_file():
                read_record(kind, file, run_files.RUN_FILES[stem].remedy.format(folder))
        run_files.accept(folder)
    moved = [path.name for path in folder.glob(f"{run_files.COMMITTED}/*")]
    there = {name for name in run_files.files_in(folder) if name.partition("/")[0] not in moved}
    checked = []
    for name in sorted(there.union(run_files.read_manifest(folder))):
        found = files.find(name)
        state = "missing" if found is None else found.state
        # Of what we never read nothing need be known.
        harmless = state in ("sound", "growing") or (
            state == "unknown" and run_files.known(name) is None
        )
        checked.append(CheckedFile(name, state, "" if harmless else run_files.remedy(folder, name)))
    for run in (folder, folder / run_files.GROWING[1], *folder.glob(f"{run_files.GROWING[2]}/*/")):
        for file, problem in checkpoint_problems(run).items():
            name = file.relative_to(folder).as_posix()
            what = f"{problem}; {DAMAGED.format(folder)}" if problem else ""
            checked.append(CheckedFile(name, "changed" if problem else "sound", what))
    return Verification(str(path), tuple(checked))
