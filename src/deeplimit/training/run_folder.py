"""The folder of a run: what is in it, read and written."""

import csv
import json
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deeplimit.errors import InputError, RunError
from deeplimit.files import write_text
from deeplimit.records import coerce, read_record, to_plain
from deeplimit.training.files import METRICS, RunFiles, not_vouched_for
from deeplimit.training.metrics import Row, from_csv, to_csv
from deeplimit.training.new_folder import name_of, new_folder
from deeplimit.training.recipe import Recipe
from deeplimit.training.recipe_file import read_recipe_file
from deeplimit.training.remedies import remedy

if TYPE_CHECKING:
    from torch.nn import Module

    from deeplimit.control import TrajectoryPicture
    from deeplimit.data import Standardisation
    from deeplimit.meanfield import ConvergenceCertificate
    from deeplimit.ode import DepthLimit
    from deeplimit.training.results import (
        Cut,
        Healing,
        MergedRuns,
        Profiles,
        Reference,
        Refinement,
        RunResults,
    )
else:  # a folder is opened, and refused, without torch
    Module = Standardisation = TrajectoryPicture = ConvergenceCertificate = DepthLimit = Any
    Cut = Healing = MergedRuns = Profiles = Reference = Refinement = RunResults = Any

SUFFIX = ".safetensors"

RECIPE = "recipe.toml"
MODEL, CROPPED, HEALED = "model", "cropped", "healed"  # a folder or a .safetensors file
PROFILE, CROP, HEAL = "profile.json", "crop.json", "heal.json"
START, REFINE, MERGE = "start", "refine.json", "merge.json"
REFERENCE, TRAJECTORIES = "reference.json", "trajectories.json"
DEPTH_LIMIT, CERTIFICATE = "ode.json", "certificate.json"


@dataclass(frozen=True)
class RunFolder:
    """runs/NAME: recipe.toml, metrics.csv, checkpoint/, the networks, and the results.

    Every file is written whole or not at all, and what is written in a `commit` appears together.
    Results that are not there yet are None; a file that is damaged, or not what run.json vouches
    for, is an InputError that says what to do.
    """

    path: Path
    recipe: Recipe
    in_commit: bool = field(default=False, repr=False, compare=False)

    @property
    def files(self) -> RunFiles:
        """The files in it, with those that an open commit has written so far."""
        return RunFiles(self.path, self.in_commit)

    @classmethod
    def create(
        cls, runs: str | Path, name: str | None, recipe: Recipe, class_names: Sequence[str] = ()
    ) -> "RunFolder":
        """A new folder in `runs`: NAME, or the first of NAME-2, NAME-3, … that does not exist.

        Without a name the data set's is taken. An existing run is never touched. The paths in its
        recipe.toml are absolute. The folder appears with its recipe in it.

        Raises:
            InputError: the name is no folder's name, or the folder cannot be made or written to.
        """
        text = recipe.with_absolute_paths().to_toml(class_names)

        def fill(path: Path, _: Path) -> None:
            with RunFiles(path).commit() as files:
                write_text(files.place(RECIPE), text)

        try:
            path = new_folder(Path(runs), name_of(recipe.data) if name is None else name, fill)
        except RunError as error:
            raise InputError(str(error)) from error
        return cls(path, recipe)

    @classmethod
    def create_from(
        cls,
        runs: str | Path,
        name: str,
        recipe: Recipe,
        model: Module,
        epochs: int,
        class_names: Sequence[str] = (),
        fill: Callable[["RunFolder", Path], None] = lambda folder, path: None,
    ) -> "RunFolder":
        """A new folder, as `create` makes one, whose run starts from a network.

        That is start.safetensors or start/, and named in the recipe as it lies beside: the folder
        may be moved.

        Args:
            runs: as in `create`.
            name: as in `create`.
            recipe: as in `create`.
            model: the network.
            epochs: of the run.
            class_names: as in `create`.
            fill: writes what else belongs into the folder, before it appears at the path given.
        """
        from deeplimit.training.saved_models import save_network

        recipe = replace(recipe.with_absolute_paths(), control="none")  # which starts from scratch

        def begin(path: Path, to: Path) -> None:
            with RunFiles(path).commit() as files:
                place = files.place(START)
                save_network(model, place, standardisation=cls(path, recipe).standardisation)
                file = Path(START if place.is_dir() else START + SUFFIX)
                if recipe.model is None:
                    own = replace(recipe, epochs=epochs, start=file)
                else:
                    kind = "transformers:" if place.is_dir() else ""
                    own = replace(recipe, epochs=epochs, model=f"{kind}{file}", weights=None)
                    own = replace(own, new_head=False)
                fill(cls(path, own, in_commit=True), to)
                write_text(files.place(RECIPE), own.to_toml(class_names))

        return cls.open(new_folder(Path(runs), name, begin))

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
        try:
            recipe = Recipe.from_toml(path / RECIPE, trust=trust)
        except InputError as error:
            found = RunFiles(path).find(RECIPE)
            if found is None or found.state != "changed":
                raise
            raise InputError(f"{error}; it was damaged or changed since it was written") from error
        as_vouched(path / RECIPE)
        return cls(path, recipe)

    @contextmanager
    def commit(self) -> Iterator["RunFolder"]:
        """What is written in the with statement, into the folder that it yields, appears together.

        At its end, or not at all; a commit inside another one is a part of that.

        Raises:
            RunError: the disk is full or cannot be written to; the run is as before.
        """
        with self.files.commit() as files:
            yield replace(self, in_commit=files.open)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes, as recorded when the run was made."""
        path = self.path / RECIPE
        table = coerce(dict, read_recipe_file(path).get("data", {}), f"{path}: data")
        names = table.get("class_names", [])
        return coerce(tuple[str, ...], names, f"{path}: data.class_names")

    @property
    def standardisation(self) -> Standardisation | None:
        """What the run does to the samples before its network sees them; None for nothing."""
        mean, std = self.recipe.mean, self.recipe.std
        if mean is None or std is None:
            return None
        from deeplimit.data import Standardisation

        return Standardisation(mean, std)

    def model(self) -> Module:
        """The trained network, on the CPU and in evaluation mode."""
        return self._network(MODEL, "finish the run: deeplimit train --resume {}")

    def cropped(self) -> Module:
        """The network after the last cut."""
        return self._network(CROPPED, "make a cut: deeplimit crop {} --to auto")

    def healed(self) -> Module:
        """The network after the last cut that was healed."""
        return self._network(HEALED, "heal its cut: deeplimit heal {}")

    def write_model(self, model: Module) -> None:
        """Writes the network: model.safetensors, of transformers model/."""
        self._write_network(MODEL, model)

    def write_cropped(self, model: Module, removed: Sequence[int] = ()) -> None:
        """Writes the network less the layers removed: cropped.safetensors or cropped/."""
        self._write_network(CROPPED, model, removed)

    def write_healed(self, model: Module, removed: Sequence[int] = ()) -> None:
        """Writes the healed network: healed.safetensors or healed/."""
        self._write_network(HEALED, model, removed)

    def _write_network(self, name: str, model: Module, removed: Sequence[int] = ()) -> None:
        from deeplimit.training.saved_models import save_network

        scale = self.standardisation
        with self.files.commit() as files:
            save_network(model, files.place(name), removed=removed, standardisation=scale)

    def _network(self, name: str, missing: str) -> Module:
        from deeplimit.training.saved_models import load_network

        found = self.files.find(name, name + SUFFIX)
        if found is None:
            raise InputError(f"{self.path}: no {name}{SUFFIX} yet; {missing.format(self.path)}")
        if found.refused:
            raise not_vouched_for(found.path, found, self._remedy(name))
        return self._as_said(load_network(found.path.with_name(name), self._untrained))

    def _remedy(self, name: str) -> str:
        return remedy(self.path, name)

    def _untrained(self) -> Module:
        """The recipe's model, whatever its weights."""
        from deeplimit.training.model_spec import load_named  # which reads run folders itself

        recipe = self.recipe
        if recipe.model is None:
            raise InputError(f"{self.path / RECIPE}: no model in it, but its weights are one's")
        classes = len(self.class_names)
        return self._as_said(load_named(recipe.model, seed=recipe.seed, classes=classes).model)

    def _as_said(self, model: Module) -> Module:
        """The model, to be read as the recipe says."""
        if self.recipe.stack is not None:
            from deeplimit._anatomy import anatomy

            anatomy(model, blocks=self.recipe.stack)
        return model

    def profiles(self) -> Profiles | None:
        """What `profile_run` measured."""
        return self._read(PROFILE, "Profiles")

    def write_profiles(self, profiles: Profiles) -> None:
        """Writes profile.json."""
        self._write(PROFILE, profiles)

    def picture(self) -> TrajectoryPicture | None:
        """The trajectories that `profile_run` projected."""
        return self._read(TRAJECTORIES, "TrajectoryPicture")

    def write_picture(self, picture: TrajectoryPicture) -> None:
        """Writes trajectories.json."""
        self._write(TRAJECTORIES, picture)

    def cut(self) -> Cut | None:
        """The last cut."""
        return self._read(CROP, "Cut")

    def write_cut(self, cut: Cut) -> None:
        """Writes crop.json."""
        self._write(CROP, cut)

    def healing(self) -> Healing | None:
        """How the last cut was healed; None where it was not, or another cut was."""
        found = self._read(HEAL, "Healing")
        cut = self.cut()
        return found if found and cut and found.removed == cut.removed else None

    def write_healing(self, healing: Healing) -> None:
        """Writes heal.json."""
        self._write(HEAL, healing)

    def depth_limit(self) -> DepthLimit | None:
        """What `deeplimit ode` measured."""
        return self._read(DEPTH_LIMIT, "DepthLimit")

    def write_depth_limit(self, limit: DepthLimit) -> None:
        """Writes ode.json."""
        self._write(DEPTH_LIMIT, limit)

    def certificate(self) -> ConvergenceCertificate | None:
        """What `certify_convergence` said of a training of this network."""
        return self._read(CERTIFICATE, "ConvergenceCertificate")

    def write_certificate(self, certificate: ConvergenceCertificate) -> None:
        """Writes certificate.json; the page has a section on it from then on."""
        self._write(CERTIFICATE, certificate)

    def refinement(self) -> Refinement | None:
        """How this run's network was made from another one's."""
        return self._read(REFINE, "Refinement")

    def write_refinement(self, refinement: Refinement) -> None:
        """Writes refine.json."""
        self._write(REFINE, refinement)

    def merging(self) -> MergedRuns | None:
        """Of which networks this run's was made."""
        return self._read(MERGE, "MergedRuns")

    def write_merging(self, merging: MergedRuns) -> None:
        """Writes merge.json."""
        self._write(MERGE, merging)

    def reference(self) -> Reference | None:
        """What the control of a cut reached: networks trained without stage cost."""
        return self._read(REFERENCE, "Reference")

    def write_reference(self, reference: Reference) -> None:
        """Writes reference.json."""
        self._write(REFERENCE, reference)

    def metrics(self) -> tuple[Row, ...]:
        """The rows of metrics.csv; none before the first epoch's end."""
        found = self.files.find(METRICS)
        if found is None:
            return ()
        try:
            rows = from_csv(found.path.read_text(encoding="utf-8"))
        except (OSError, ValueError, csv.Error) as error:
            path = self.path / METRICS
            raise InputError(f"{path}: damaged ({error}); {self._remedy(METRICS)}") from error
        if found.refused:
            raise not_vouched_for(self.path / METRICS, found, self._remedy(METRICS))
        return rows

    def write_metrics(self, rows: Sequence[Row]) -> None:
        """Writes metrics.csv, all rows of it."""
        with self.files.commit() as files:
            write_text(files.place(METRICS), to_csv(rows))

    def results(self) -> RunResults:
        """All results that there are."""
        from deeplimit.training.results import RunResults

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

    def _read(self, name: str, kind: str) -> Any:
        found = self.files.find(name)
        if found is None:
            return None
        record = pkgutil.resolve_name(f"deeplimit.training.results:{kind}")
        result: Any = read_record(record, found.path, self._remedy(name))
        if found.refused:
            raise not_vouched_for(self.path / name, found, self._remedy(name))
        return result

    def _write(self, name: str, result: Any) -> None:
        text = json.dumps(to_plain(result), allow_nan=False, ensure_ascii=False)
        with self.files.commit() as files:
            write_text(files.place(name), text + "\n")


def as_vouched(path: Path) -> Path:
    """Where a file or a folder lies that may be a run's.

    Raises:
        InputError: it is, and not the one that run.json vouches for.
    """
    found = RunFiles(path.parent).find(path.name) if (path.parent / RECIPE).is_file() else None
    if found is not None and found.state == "changed":
        raise not_vouched_for(path, found, remedy(path.parent, path.name))
    return path if found is None else found.path


def write_metrics(path: Path, rows: Sequence[Row]) -> None:
    """Writes metrics.csv into a folder while a training goes on, all rows of it."""
    RunFiles(path).forget(METRICS)
    write_text(path / METRICS, to_csv(rows))
