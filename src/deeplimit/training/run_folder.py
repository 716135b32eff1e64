"""The folder of a run: what is in it, read and written."""

import csv
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

from deeplimit.control import TrajectoryPicture
from deeplimit.errors import InputError, RunError
from deeplimit.network.storage import load, save
from deeplimit.training.building import Network
from deeplimit.training.files import cannot_write, write_text
from deeplimit.training.metrics import Row, from_csv, to_csv
from deeplimit.training.recipe import Recipe
from deeplimit.training.recipe_file import read_recipe_file
from deeplimit.training.results import Cut, Profiles, Reference, RunResults
from deeplimit.training.typed_values import conform, from_plain, to_plain

Result = TypeVar("Result")

RECIPE, METRICS = "recipe.toml", "metrics.csv"
MODEL, CROPPED = "model.safetensors", "cropped.safetensors"
PROFILE, CROP = "profile.json", "crop.json"
REFERENCE, TRAJECTORIES = "reference.json", "trajectories.json"


@dataclass(frozen=True)
class RunFolder:
    """runs/NAME: recipe.toml, metrics.csv, checkpoint/, model.safetensors, and the results.

    Every file is written whole or not at all. Results that are not there yet are None; a damaged
    file is an InputError that says what to do.
    """

    path: Path
    recipe: Recipe

    @classmethod
    def create(
        cls, runs: str | Path, name: str | None, recipe: Recipe, class_names: Sequence[str] = ()
    ) -> "RunFolder":
        """A new folder in `runs`: NAME, or the first of NAME-2, NAME-3, … that does not exist.

        Without a name the data set's is taken. An existing run is never touched.

        Raises:
            InputError: the name is no folder's name, or the folder cannot be made or written to.
        """
        name = _name_of(recipe.data) if name is None else name
        if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
            raise InputError(f"the name {name!r} cannot be a folder's; give a plain one")
        path = _make_folder(Path(runs), name)
        try:
            write_text(path / RECIPE, recipe.to_toml(class_names))
        except RunError as error:
            path.rmdir()
            raise InputError(str(error)) from error
        return cls(path, recipe)

    @classmethod
    def open(cls, path: str | Path) -> "RunFolder":
        """An existing run.

        Raises:
            InputError: no such folder, no recipe.toml in it, or one of another version.
        """
        path = Path(path)
        if not path.is_dir():
            raise InputError(f"{path}: no such folder; expected one that `deeplimit train` wrote")
        if not (path / RECIPE).is_file():
            raise InputError(
                f"{path}: no {RECIPE} in it; expected a folder that `deeplimit train` wrote"
            )
        return cls(path, Recipe.from_toml(path / RECIPE))

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes, as recorded when the run was made."""
        path = self.path / RECIPE
        table = conform(dict, read_recipe_file(path).get("data", {}), f"{path}: data")
        names = table.get("class_names", [])
        return conform(tuple[str, ...], names, f"{path}: data.class_names")

    def model(self) -> Network:
        """The trained network, on the CPU and in evaluation mode."""
        if not (self.path / MODEL).exists():
            raise InputError(
                f"{self.path}: no {MODEL} yet; finish the run: deeplimit train --resume {self.path}"
            )
        return load(self.path / MODEL)

    def cropped(self) -> Network:
        """The network after the last cut."""
        if not (self.path / CROPPED).exists():
            raise InputError(
                f"{self.path}: no {CROPPED} yet; make a cut: deeplimit crop {self.path} --to auto"
            )
        return load(self.path / CROPPED)

    def write_model(self, model: Network) -> None:
        """Writes model.safetensors."""
        _save(model, self.path / MODEL)

    def write_cropped(self, model: Network) -> None:
        """Writes cropped.safetensors."""
        _save(model, self.path / CROPPED)

    def profiles(self) -> Profiles | None:
        """What `profile_run` measured."""
        return self._read(PROFILE, Profiles, f"deeplimit profile {self.path}")

    def write_profiles(self, profiles: Profiles) -> None:
        """Writes profile.json."""
        self._write(PROFILE, profiles)

    def picture(self) -> TrajectoryPicture | None:
        """The trajectories that `profile_run` projected."""
        return self._read(TRAJECTORIES, TrajectoryPicture, f"deeplimit profile {self.path}")

    def write_picture(self, picture: TrajectoryPicture) -> None:
        """Writes trajectories.json."""
        self._write(TRAJECTORIES, picture)

    def cut(self) -> Cut | None:
        """The last cut."""
        return self._read(CROP, Cut, f"deeplimit crop {self.path} --to auto")

    def write_cut(self, cut: Cut) -> None:
        """Writes crop.json."""
        self._write(CROP, cut)

    def reference(self) -> Reference | None:
        """The same network trained without stage cost."""
        return self._read(REFERENCE, Reference, "deeplimit demo")

    def write_reference(self, reference: Reference) -> None:
        """Writes reference.json."""
        self._write(REFERENCE, reference)

    def metrics(self) -> tuple[Row, ...]:
        """The rows of metrics.csv; none before the first epoch's end."""
        path = self.path / METRICS
        if not path.exists():
            return ()
        try:
            return from_csv(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, csv.Error) as error:
            raise InputError(
                f"{path}: damaged ({error}); delete it, then deeplimit train --resume {self.path} "
                "writes it again from the checkpoint"
            ) from error

    def write_metrics(self, rows: Sequence[Row]) -> None:
        """Writes metrics.csv, all rows of it."""
        write_text(self.path / METRICS, to_csv(rows))

    def results(self) -> RunResults:
        """All results that there are."""
        return RunResults(
            name=self.path.resolve().name,
            recipe=to_plain(self.recipe),
            class_names=self.class_names,
            metrics=self.metrics(),
            profiles=self.profiles(),
            picture=self.picture(),
            cut=self.cut(),
            reference=self.reference(),
        )

    def _read(self, name: str, kind: type[Result], remedy: str) -> Result | None:
        path = self.path / name
        if not path.exists():
            return None
        try:
            return from_plain(kind, json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:  # an InputError is a ValueError
            raise InputError(f"{path}: damaged ({error}); write it again: {remedy}") from error

    def _write(self, name: str, result: Any) -> None:
        text = json.dumps(to_plain(result), allow_nan=False, ensure_ascii=False)
        write_text(self.path / name, text + "\n")


def _name_of(data: str) -> str:
    """digits, hub:OWNER/NAME, npz:FOLDER/NAME.npz: the last part of it."""
    return re.sub(r"[^\w.-]+", "-", Path(data.rpartition(":")[2]).stem).strip(".") or "run"


def _make_folder(runs: Path, name: str) -> Path:
    """A folder that was not there before; mkdir itself is the test, so two runs never share one."""
    number = 1
    while True:
        path = runs / (name if number == 1 else f"{name}-{number}")
        try:
            runs.mkdir(parents=True, exist_ok=True)
            path.mkdir()
            return path
        except FileExistsError as error:
            if not runs.is_dir():
                raise _unusable(runs, error) from error
            number += 1
        except OSError as error:
            raise _unusable(path, error) from error


def _unusable(path: Path, error: OSError) -> InputError:
    reason = "a file is in the way" if isinstance(error, FileExistsError) else error.strerror
    return InputError(
        f"{path}: no run folder can be made there ({reason}); give another folder for the runs, or "
        "make this one writable"
    )


def _save(model: Network, path: Path) -> None:
    try:
        save(model, path)
    except (OSError, SafetensorError) as error:
        raise cannot_write(path, error) from error
