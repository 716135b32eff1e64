"""The folder of a run: what is in it, read and written."""

import csv
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args, get_type_hints

from deeplimit.errors import InputError, RunError
from deeplimit.files import write_text
from deeplimit.records import read_record, to_json
from deeplimit.training.new_folder import name_of, new_folder
from deeplimit.training.progress import Row, from_csv, to_csv
from deeplimit.training.recipe import Recipe, read_recipe
from deeplimit.training.run_files import (
    METRICS,
    RECIPE,
    RUN_FILES,
    SUFFIX,
    RunFiles,
    as_vouched,
    not_vouched_for,
    remedy,
)
from deeplimit.training.trust import FORMS, Named, is_run

if TYPE_CHECKING:
    from torch.nn import Module

    from deeplimit.control import TrajectoryPicture
    from deeplimit.data import DataSet, Standardisation
    from deeplimit.meanfield import ConvergenceCertificate
    from deeplimit.ode import DepthLimit
    from deeplimit.training.library_models import LoadedModel
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
    Module = DataSet = Standardisation = TrajectoryPicture = ConvergenceCertificate = Any
    DepthLimit = LoadedModel = Cut = Healing = MergedRuns = Profiles = Reference = Any
    Refinement = RunResults = Any


@dataclass(frozen=True)
class RunFolder:
    """runs/NAME: recipe.toml, metrics.csv, checkpoint/, the networks, and the results.

    Every file is written whole or not at all, and what is written in a `commit` appears together.
    Results that are not there yet are None; a file that is damaged, or not what run.json vouches
    for, is an InputError that says what to do.

    Attributes:
        path: the folder.
        recipe: of the run.
        class_names: the names of the classes, as recorded when the run was made.
        data: the run's data as its network sees them, where this process has loaded them.
        network: the trained network, where this process has just trained it.
    """

    path: Path
    recipe: Recipe
    class_names: tuple[str, ...] = field(default=(), compare=False)
    in_commit: bool = field(default=False, repr=False, compare=False)
    data: DataSet | None = field(default=None, repr=False, compare=False)
    network: Module | None = field(default=None, repr=False, compare=False)

    @property
    def files(self) -> RunFiles:
        """The files in it, with those that an open commit has written so far."""
        return RunFiles(self.path, self.in_commit)

    @classmethod
    def create(
        cls, runs: str | Path, name: str | None, recipe: Recipe, class_names: Sequence[str] = ()
    ) -> "RunFolder":
        """Makes a new folder in `runs`: NAME, or the first of NAME-2, NAME-3, … that is free.

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
        return cls(path, recipe, tuple(class_names))

    @classmethod
    def create_from(
        cls,
        runs: str | Path,
        name: str,
        recipe: Recipe,
        model: Module,
        epochs: int,
        class_names: Sequence[str] = (),
        fill: Callable[["RunFolder", Path], None] | None = None,
    ) -> "RunFolder":
        """Makes a new folder as `create` does, whose run starts from a network.

        That is start.safetensors or start/, and named in the recipe as it lies beside: the folder
        may be moved.

        Args:
            runs: as in `create`, and so are name, recipe and class_names.
            name: of the folder.
            recipe: of the run.
            model: the network.
            epochs: of the run.
            class_names: of the data.
            fill: writes what else belongs into the folder, before it appears at the path given.
        """
        from deeplimit.training.models import save_network
        from deeplimit.training.texts import reader_of

        recipe = replace(recipe.with_absolute_paths(), control="none")  # which starts from scratch

        def begin(path: Path, to: Path) -> None:
            with RunFiles(path).commit() as files:
                place = files.place("start")
                scale = cls(path, recipe).standardisation
                save_network(model, place, standardisation=scale, tokenizer=reader_of(recipe))
                file = Path("start" if place.is_dir() else f"start{SUFFIX}")
                if recipe.model is None:
                    own = replace(recipe, epochs=epochs, start=file)
                else:
                    spec = f"{'transformers:' if place.is_dir() else ''}{file}"
                    own = replace(recipe, epochs=epochs, model=spec, weights=None, new_head=False)
                if fill is not None:
                    fill(cls(path, own, in_commit=True), to)
                write_text(files.place(RECIPE), own.to_toml(class_names))

        return cls.open(new_folder(Path(runs), name, begin))

    @classmethod
    def open(cls, path: str | Path, *, trust: bool = False) -> "RunFolder":
        """Opens an existing run.

        Args:
            path: its folder.
            trust: whether code that its recipe names, a model module:function, may be run.

        Raises:
            InputError: no such folder, no recipe.toml in it, or one of another version.
        """
        path = Path(path)
        if not (path / RECIPE).is_file():
            what = f"no {RECIPE} in it" if path.is_dir() else "no such folder"
            raise InputError(f"{path}: {what}; expected a folder that `deeplimit train` wrote")
        try:
            recipe, class_names = read_recipe(path / RECIPE, trust=trust)
        except InputError as error:
            found = RunFiles(path).find(RECIPE)
            if found is None or found.state != "changed":
                raise
            raise InputError(f"{error}; it was damaged or changed since it was written") from error
        as_vouched(path / RECIPE)
        return cls(path, recipe, class_names)

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
    def standardisation(self) -> Standardisation | None:
        """What the run does to the samples before its network sees them; None for nothing."""
        mean, std = self.recipe.mean, self.recipe.std
        if mean is None or std is None:
            return None
        from deeplimit.data import Standardisation

        return Standardisation(mean, std)

    def model(self) -> Module:
        """Returns the trained network, on the CPU and in evaluation mode."""
        return self._network("model", "finish the run: deeplimit train --resume {}")

    def cropped(self) -> Module:
        """Returns the network after the last cut."""
        return self._network("cropped", "make a cut: deeplimit crop {} --to auto")

    def healed(self) -> Module:
        """Returns the network after the last cut that was healed."""
        return self._network("healed", "heal its cut: deeplimit heal {}")

    def write_model(self, model: Module) -> None:
        """Writes the network: model.safetensors, of transformers model/."""
        self._write_network("model", model)

    def write_cropped(self, model: Module, removed: Sequence[int] = ()) -> None:
        """Writes the network less the layers removed: cropped.safetensors or cropped/."""
        self._write_network("cropped", model, removed)

    def write_healed(self, model: Module, removed: Sequence[int] = ()) -> None:
        """Writes the healed network: healed.safetensors or healed/."""
        self._write_network("healed", model, removed)

    def _write_network(self, name: str, model: Module, removed: Sequence[int] = ()) -> None:
        from deeplimit.training.models import save_network
        from deeplimit.training.texts import reader_of

        more: Any = {"standardisation": self.standardisation}
        more["tokenizer"] = reader_of(self.recipe, self.files)
        with self.files.commit() as files:
            save_network(model, files.place(name), removed=removed, **more)

    def _network(self, name: str, missing: str) -> Module:
        from deeplimit.training.models import load_network

        found = self.files.find(name, name + SUFFIX)
        if found is None:
            raise InputError(f"{self.path}: no {name}{SUFFIX} yet; {missing.format(self.path)}")
        if found.refused:
            raise not_vouched_for(self.path / found.path.name, found)
        return self._as_said(load_network(found.path.with_name(name), self._untrained))

    def _untrained(self) -> Module:
        """The recipe's model, whatever its weights."""
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
        """Returns what `profile_run` measured: profile.json."""
        return cast("Profiles | None", self._read("profile"))

    def picture(self) -> TrajectoryPicture | None:
        """Returns the trajectories that `profile_run` projected: trajectories.json."""
        return cast("TrajectoryPicture | None", self._read("trajectories"))

    def cut(self) -> Cut | None:
        """Returns the last cut: crop.json."""
        return cast("Cut | None", self._read("crop"))

    def healing(self) -> Healing | None:
        """Returns how the last cut was healed; None where it was not, or another cut was."""
        return self._healing_of(self.cut())

    def _healing_of(self, cut: Cut | None) -> Healing | None:
        found: Healing | None = self._read("heal")
        return found if found and cut and found.removed == cut.removed else None

    def depth_limit(self) -> DepthLimit | None:
        """Returns what `deeplimit ode` measured: ode.json."""
        return cast("DepthLimit | None", self._read("ode"))

    def certificate(self) -> ConvergenceCertificate | None:
        """Returns what `certify_convergence` said of a training of this network."""
        return cast("ConvergenceCertificate | None", self._read("certificate"))

    def refinement(self) -> Refinement | None:
        """Returns how this run's network was made from another one's: refine.json."""
        return cast("Refinement | None", self._read("refine"))

    def merging(self) -> MergedRuns | None:
        """Returns of which networks this run's was made: merge.json."""
        return cast("MergedRuns | None", self._read("merge"))

    def reference(self) -> Reference | None:
        """Returns what the control of a cut reached: reference.json."""
        return cast("Reference | None", self._read("reference"))

    def _read(self, stem: str) -> Any:
        name = f"{stem}.json"
        found = self.files.find(name)
        if found is None:
            return None
        kind = result_kinds()[stem]
        result = read_record(kind, found.path, remedy(self.path, name))
        if found.refused:
            raise not_vouched_for(self.path / name, found)
        return result

    def write(self, result: Any) -> None:
        """Writes a result, of a type that `RunResults` holds, to the JSON file for it."""
        stem = next(stem for stem, kind in result_kinds().items() if kind is type(result))
        with self.files.commit() as files:
            write_text(files.place(f"{stem}.json"), to_json(result) + "\n")

    write_certificate = write  # which the docs say

    def metrics(self) -> tuple[Row, ...]:
        """Returns the rows of metrics.csv; none before the first epoch's end."""
        found = self.files.find(METRICS)
        if found is None:
            return ()
        path = self.path / METRICS
        try:
            rows = from_csv(found.path.read_text(encoding="utf-8"))
        except (OSError, ValueError, csv.Error) as error:
            what = remedy(self.path, METRICS)
            raise InputError(f"{path}: damaged ({error}); {what}") from error
        if found.refused:
            raise not_vouched_for(path, found)
        return rows

    def write_metrics(self, rows: Sequence[Row]) -> None:
        """Writes metrics.csv, all rows of it."""
        with self.files.commit() as files:
            write_text(files.place(METRICS), to_csv(rows))

    def results(self) -> RunResults:
        """Reads all results that there are."""
        from deeplimit.training.results import RunResults

        found = {f.result: self._read(s) for s, f in RUN_FILES.items() if f.result and s != "heal"}
        return RunResults(
            name=self.path.resolve().name,
            recipe=self.recipe.settings(),
            class_names=self.class_names,
            metrics=self.metrics(),
            healing=self._healing_of(found["cut"]),
            **found,
        )


@cache
def result_kinds() -> dict[str, type[Any]]:
    """Returns the types of the results that a run's JSON files hold, by their names."""
    from deeplimit.training.results import RunResults

    hints = get_type_hints(RunResults)
    return {stem: get_args(hints[f.result])[0] for stem, f in RUN_FILES.items() if f.result}


def load_named(
    spec: str,
    *,
    seed: int = 0,
    classes: int | None = None,
    new_head: bool = False,
    trust: bool = False,
    task: str = "IMAGE_CLASSIFICATION",
) -> LoadedModel:
    """Loads the model of a recipe as `load_model` does; code runs only if its mark says so.

    Raises:
        InputError: as `load_model`.
    """
    from deeplimit.training.library_models import LoadedModel
    from deeplimit.training.models import load_single

    if not is_run(spec):
        return load_single(spec, seed=seed, classes=classes, new_head=new_head, task=task)
    if not Path(spec).exists():
        raise InputError(f"{spec}: no such folder; the model is given as {FORMS}")
    run = RunFolder.open(spec, trust=trust or (isinstance(spec, Named) and spec.trust))
    model = run.model().train()
    return LoadedModel(spec, model, "trained", run=run.path, standardisation=run.standardisation)


def write_metrics(path: Path, rows: Sequence[Row]) -> None:
    """Writes metrics.csv into a folder while a training goes on, all rows of it."""
    RunFiles(path).forget(METRICS)
    write_text(path / METRICS, to_csv(rows))
