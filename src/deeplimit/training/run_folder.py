"""The folder of a run: what is in it, read and written."""

import csv
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from deeplimit.control import TrajectoryPicture
from deeplimit.data import Standardisation
from deeplimit.errors import InputError, RunError
from deeplimit.files import write_text
from deeplimit.meanfield import ConvergenceCertificate
from deeplimit.ode import DepthLimit
from deeplimit.training.metrics import Row, from_csv, to_csv
from deeplimit.training.recipe import Recipe
from deeplimit.training.recipe_file import read_recipe_file
from deeplimit.training.results import (
    Cut,
    Healing,
    MergedRuns,
    Profiles,
    Reference,
    Refinement,
    RunResults,
)
from deeplimit.training.saved_models import SUFFIX, is_saved, load_network, save_network
from deeplimit.training.typed_values import conform, read_record, to_plain

Result = TypeVar("Result")

RECIPE, METRICS = "recipe.toml", "metrics.csv"
MODEL, CROPPED, HEALED = "model", "cropped", "healed"  # a folder or a .safetensors file
PROFILE, CROP, HEAL = "profile.json", "crop.json", "heal.json"
START, REFINE, MERGE = "start", "refine.json", "merge.json"
REFERENCE, TRAJECTORIES = "reference.json", "trajectories.json"
DEPTH_LIMIT, CERTIFICATE = "ode.json", "certificate.json"


@dataclass(frozen=True)
class RunFolder:
    """runs/NAME: recipe.toml, metrics.csv, checkpoint/, the networks, and the results.

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

        Without a name the data set's is taken. An existing run is never touched. The paths in its
        recipe.toml are absolute.

        Raises:
            InputError: the name is no folder's name, or the folder cannot be made or written to.
        """
        path = make_folder(Path(runs), _name_of(recipe.data) if name is None else name)
        try:
            write_text(path / RECIPE, recipe.rooted().to_toml(class_names))
        except RunError as error:
            path.rmdir()
            raise InputError(str(error)) from error
        return cls(path, recipe)

    @classmethod
    @contextmanager
    def create_from(
        cls,
        runs: str | Path,
        name: str,
        recipe: Recipe,
        model: nn.Module,
        epochs: int,
        class_names: Sequence[str] = (),
    ) -> Iterator["RunFolder"]:
        """A new folder, as `create` makes one, whose run starts from a network.

        That is start.safetensors or start/, and named in the recipe. recipe.toml, which makes a run
        of the folder, is written when the with statement is left, after all that belongs to it; if
        something fails before, no folder is left.
        """
        recipe = replace(recipe.rooted(), control="none")  # which starts from scratch
        path = make_folder(Path(runs), name)
        try:
            place = path.resolve() / START
            save_network(model, place, standardisation=cls(path, recipe).standardisation)
            file = place if place.is_dir() else place.with_name(START + SUFFIX)
            if recipe.model is None:
                recipe = replace(recipe, epochs=epochs, start=file)
                own = replace(recipe, start=Path(file.name))
            else:
                kind = "transformers:" if file.is_dir() else ""
                recipe = replace(recipe, epochs=epochs, model=f"{kind}{file}", weights=None)
                recipe = replace(recipe, new_head=False)
                own = replace(recipe, model=f"{kind}{file.name}")
            yield cls(path, recipe)
            # The recipe names it as it lies beside: the folder may be moved.
            write_text(path / RECIPE, own.to_toml(class_names))
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)
            raise

    @classmethod
    def open(cls, path: str | Path, *, trust: bool = False) -> "RunFolder":
        """An existing run.

        Args:
            path: its folder.
            trust: whether code that its recipe names, a model module:function, may be run.

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
        return cls(path, Recipe.from_toml(path / RECIPE, trust=trust))

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes, as recorded when the run was made."""
        path = self.path / RECIPE
        table = conform(dict, read_recipe_file(path).get("data", {}), f"{path}: data")
        names = table.get("class_names", [])
        return conform(tuple[str, ...], names, f"{path}: data.class_names")

    @property
    def standardisation(self) -> Standardisation | None:
        """What the run does to the samples before its network sees them; None for nothing."""
        mean, std = self.recipe.mean, self.recipe.std
        return None if mean is None or std is None else Standardisation(mean, std)

    def model(self) -> nn.Module:
        """The trained network, on the CPU and in evaluation mode."""
        return self._network(MODEL, "finish the run: deeplimit train --resume {}")

    def cropped(self) -> nn.Module:
        """The network after the last cut."""
        return self._network(CROPPED, "make a cut: deeplimit crop {} --to auto")

    def healed(self) -> nn.Module:
        """The network after the last cut that was healed."""
        return self._network(HEALED, "heal its cut: deeplimit heal {}")

    def write_model(self, model: nn.Module) -> None:
        """Writes the network: model.safetensors, of transformers model/."""
        save_network(model, self.path / MODEL, standardisation=self.standardisation)

    def write_cropped(self, model: nn.Module, removed: Sequence[int] = ()) -> None:
        """Writes the network less the layers removed: cropped.safetensors or cropped/."""
        scale = self.standardisation
        save_network(model, self.path / CROPPED, removed=removed, standardisation=scale)

    def write_healed(self, model: nn.Module, removed: Sequence[int] = ()) -> None:
        """Writes the healed network: healed.safetensors or healed/."""
        scale = self.standardisation
        save_network(model, self.path / HEALED, removed=removed, standardisation=scale)

    def _network(self, name: str, remedy: str) -> nn.Module:
        if not is_saved(self.path / name):
            raise InputError(f"{self.path}: no {name}{SUFFIX} yet; {remedy.format(self.path)}")
        return load_network(self.path / name, self._untrained)

    def _untrained(self) -> nn.Module:
        """The recipe's model, whatever its weights."""
        from deeplimit.training.model_spec import load_model  # which reads run folders itself

        recipe = self.recipe
        if recipe.model is None:
            raise InputError(f"{self.path / RECIPE}: no model in it, but its weights are one's")
        classes = len(self.class_names)
        return load_model(recipe.model, seed=recipe.seed, classes=classes).model

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

    def healing(self) -> Healing | None:
        """How the last cut was healed; None where it was not, or another cut was."""
        found = self._read(HEAL, Healing, f"deeplimit heal {self.path}")
        cut = self.cut()
        return found if found and cut and found.removed == cut.removed else None

    def write_healing(self, healing: Healing) -> None:
        """Writes heal.json."""
        self._write(HEAL, healing)

    def depth_limit(self) -> DepthLimit | None:
        """What `deeplimit ode` measured."""
        return self._read(DEPTH_LIMIT, DepthLimit, f"deeplimit ode {self.path}")

    def write_depth_limit(self, limit: DepthLimit) -> None:
        """Writes ode.json."""
        self._write(DEPTH_LIMIT, limit)

    def certificate(self) -> ConvergenceCertificate | None:
        """What `convergence_certificate` said of a training of this network."""
        return self._read(CERTIFICATE, ConvergenceCertificate, "RunFolder.write_certificate")

    def write_certificate(self, certificate: ConvergenceCertificate) -> None:
        """Writes certificate.json; the page has a section on it from then on."""
        self._write(CERTIFICATE, certificate)

    def refinement(self) -> Refinement | None:
        """How this run's network was made from another one's."""
        return self._read(REFINE, Refinement, "deeplimit refine")

    def write_refinement(self, refinement: Refinement) -> None:
        """Writes refine.json."""
        self._write(REFINE, refinement)

    def merging(self) -> MergedRuns | None:
        """Of which networks this run's was made."""
        return self._read(MERGE, MergedRuns, "deeplimit merge")

    def write_merging(self, merging: MergedRuns) -> None:
        """Writes merge.json."""
        self._write(MERGE, merging)

    def reference(self) -> Reference | None:
        """What the control of a cut reached: networks trained without stage cost."""
        return self._read(REFERENCE, Reference, f"deeplimit train --resume {self.path}")

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
        write_metrics(self.path, rows)

    def results(self) -> RunResults:
        """All results that there are."""
        return RunResults(
            name=self.path.resolve().name,
            recipe=self.recipe.settings(),
            class_names=self.class_names,
            metrics=self.metrics(),
            profiles=self.profiles(),
            picture=self.picture(),
            cut=self.cut(),
            healing=self.healing(),
            refinement=self.refinement(),
            merging=self.merging(),
            reference=self.reference(),
            depth_limit=self.depth_limit(),
            certificate=self.certificate(),
        )

    def _read(self, name: str, kind: type[Result], remedy: str) -> Result | None:
        path = self.path / name
        return read_record(kind, path, f"write it again: {remedy}") if path.exists() else None

    def _write(self, name: str, result: Any) -> None:
        text = json.dumps(to_plain(result), allow_nan=False, ensure_ascii=False)
        write_text(self.path / name, text + "\n")


def write_metrics(path: Path, rows: Sequence[Row]) -> None:
    """Writes metrics.csv into a folder, all rows of it."""
    write_text(path / METRICS, to_csv(rows))


def _name_of(data: str) -> str:
    """digits, hub:OWNER/NAME, npz:FOLDER/NAME.npz: the last part of it."""
    return re.sub(r"[^\w.-]+", "-", Path(data.rpartition(":")[2]).stem).strip(".") or "run"


def make_folder(runs: Path, name: str) -> Path:
    """A folder that was not there before; mkdir itself is the test, so two runs never share one.

    Raises:
        InputError: the name is no folder's name, or the folder cannot be made.
    """
    if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise InputError(f"the name {name!r} cannot be a folder's; give a plain one")
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
