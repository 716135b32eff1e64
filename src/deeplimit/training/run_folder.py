"""The folder of a run: what is in it, read and written."""

import csv
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partialmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_type_hints

from deeplimit.data.registry import find_source
from deeplimit.errors import InputError, RunError
from deeplimit.files import check_name, check_runs, new_folder, write_text
from deeplimit.records import read_record, to_json
from deeplimit.training.progress import Row, from_csv, to_csv
from deeplimit.training.recipe import Recipe, read_recipe
from deeplimit.training.run_files import (
    METRICS,
    RECIPE,
    RUN_FILES,
    SUFFIX,
    RunFiles,
    as_vouched,
    elsewhere,
    remedy,
)
from deeplimit.training.specification import TEXTS, Named, check_single, is_run

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
    Module = DataSet = Standardisation = Profiles = TrajectoryPicture = Cut = Healing = Any
    DepthLimit = ConvergenceCertificate = Refinement = MergedRuns = Reference = RunResults = Any

Kind = TypeVar("Kind")


def _result(_: type[Kind], stem: str, what: str) -> "Callable[[RunFolder], Kind | None]":
    """The method that reads a result; its type is the checker's, at run time `result_kinds`."""

    def read(folder: "RunFolder") -> Any:
        return folder._read(stem)  # noqa: SLF001

    read.__name__, read.__doc__ = RUN_FILES[stem].result, f"Returns {what}: {stem}.json."
    return read


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
        may be moved. What else belongs into it `fill` writes, before it appears at the path given.
        """
        recipe = replace(recipe.with_absolute_paths(), control="none")  # which starts from scratch

        def begin(path: Path, to: Path) -> None:
            with cls(path, recipe).commit() as new:
                new.write_network("start", model)
                folder = new.files.place("start").is_dir()
                file = Path("start" if folder else f"start{SUFFIX}")
                if recipe.model is None:
                    own = replace(recipe, epochs=epochs, start=file)
                else:
                    spec = f"{'transformers:' if folder else ''}{file}"
                    own = replace(recipe, epochs=epochs, model=spec, weights=None, new_head=False)
                if fill is not None:
                    fill(replace(new, recipe=own), to)
                write_text(new.files.place(RECIPE), own.to_toml(class_names))

        return cls.open(new_folder(Path(runs), name, begin))

    @classmethod
    def open(cls, path: str | Path, *, trust: bool = False) -> "RunFolder":
        """Opens an existing run; code that its recipe names, module:function, runs only with trust.

        Raises:
            InputError: no such folder, no recipe.toml in it, or one of another version.
        """
        path = Path(path)
        check_run(path)
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
        """Makes all that is written into the folder that it yields appear together.

        At its end, or not at all; a commit inside another one is a part of that. Errors as of
        `RunFiles.commit`.
        """
        with self.files.commit() as files:
            yield replace(self, in_commit=files.open)

    @property
    def standardisation(self) -> Standardisation | None:
        """The standardisation of samples before the network sees them; None for none."""
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

    def write_network(self, name: str, model: Module, removed: Sequence[int] = ()) -> None:
        """Writes a network, less the layers removed: NAME.safetensors, of transformers NAME/."""
        from deeplimit.training.models import save_network

        scale, reader = self.standardisation, reader_of(self.recipe, self.files)
        with self.files.commit() as files:
            place = files.place(name)
            save_network(model, place, removed=removed, standardisation=scale, tokenizer=reader)

    write_model = partialmethod(write_network, "model")
    write_cropped = partialmethod(write_network, "cropped")
    write_healed = partialmethod(write_network, "healed")

    def _network(self, name: str, missing: str) -> Module:
        from deeplimit.training.models import load_network

        def untrained() -> Module:
            """The recipe's model, whatever its weights."""
            if recipe.model is None:
                raise InputError(f"{self.path / RECIPE}: no model in it, but its weights are one's")
            classes = len(self.class_names)
            return as_said(load_named(recipe.model, seed=recipe.seed, classes=classes).model)

        def as_said(model: Module) -> Module:
            """The model, to be read as the recipe says."""
            if recipe.stack is not None:
                from deeplimit._anatomy import anatomy

                anatomy(model, blocks=recipe.stack)
            return model

        recipe = self.recipe
        path = self.files.sound(name, name + SUFFIX)
        if path is None:
            raise InputError(f"{self.path}: no {name}{SUFFIX} yet; {missing.format(self.path)}")
        return as_said(load_network(path.with_name(name), untrained))

    # Each result is None where it is not there yet.
    profiles = _result(Profiles, "profile", "what `profile_run` measured")
    picture = _result(TrajectoryPicture, "trajectories", "the trajectories it projected")
    cut = _result(Cut, "crop", "the last cut")
    healing = _result(Healing, "heal", "how the last cut was healed; None for another cut's")
    depth_limit = _result(DepthLimit, "ode", "what `deeplimit ode` measured")
    certificate = _result(ConvergenceCertificate, "certificate", "what `certify_convergence` said")
    refinement = _result(Refinement, "refine", "how this network was made from another one's")
    merging = _result(MergedRuns, "merge", "of which networks this run's was made")
    reference = _result(Reference, "reference", "what the control of a cut reached")

    def _read(self, stem: str) -> Any:
        kind, name = result_kinds()[stem], f"{stem}.json"
        try:
            path = self.files.sound(name)
        except InputError:
            # A field that somebody misspelt is named, before it is said that the file was changed.
            read_record(kind, self.path / name, remedy(self.path, name))
            raise
        found = None if path is None else read_record(kind, path, remedy(self.path, name))
        if stem != "heal" or found is None:
            return found
        cut = self.cut()  # which another one may have come after
        return found if cut is not None and found.removed == cut.removed else None

    def write(self, result: Any) -> None:
        """Writes a result, of a type that `RunResults` holds, to the JSON file for it."""
        stem = next(stem for stem, kind in result_kinds().items() if kind is type(result))
        with self.files.commit() as files:
            write_text(files.place(f"{stem}.json"), to_json(result) + "\n")

    write_certificate = write  # which the docs say

    def metrics(self) -> tuple[Row, ...]:
        """Returns the rows of metrics.csv; none before the first epoch's end."""
        path = self.files.sound(METRICS)
        try:
            return () if path is None else from_csv(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, csv.Error) as error:
            what = f"{self.path / METRICS}: damaged ({error})"
            raise InputError(f"{what}; {remedy(self.path, METRICS)}") from error

    def write_metrics(self, rows: Sequence[Row]) -> None:
        """Writes metrics.csv, all rows of it."""
        with self.files.commit() as files:
            write_text(files.place(METRICS), to_csv(rows))

    def results(self) -> RunResults:
        """Reads all results that there are."""
        from deeplimit.training.results import RunResults

        found = {f.result: self._read(stem) for stem, f in RUN_FILES.items() if f.result}
        return RunResults(
            name=self.path.resolve().name,
            recipe=self.recipe.settings(),
            class_names=self.class_names,
            metrics=self.metrics(),
            **found,
        )


def reader_of(recipe: Recipe, run: RunFiles | None = None) -> str | None:
    """The folder, or the hub's name, of the model whose tokenizer reads a recipe's texts.

    It is the run's own, once there is one, so that the folder which it came from may go.
    """
    if not recipe.data.startswith(TEXTS):
        return None
    own = None if run is None else run.find("model")
    if own is not None and own.path.is_dir():
        return str(own.path)
    kind, _, name = (recipe.model or "").partition(":")
    if kind != "transformers":
        found = Path(recipe.model or "") / "model"  # of a run
        return str(as_vouched(found)) if found.is_dir() else None
    return str(as_vouched(Path(name))) if Path(name).is_dir() else name


@cache
def result_kinds() -> dict[str, type[Any]]:
    """Returns the types of the results that a run's JSON files hold, by their names."""
    from deeplimit.training.results import RunResults

    hints = get_type_hints(RunResults)
    return {stem: get_args(hints[f.result])[0] for stem, f in RUN_FILES.items() if f.result}


def name_of(data: str) -> str:
    """digits, hub:OWNER/NAME, npz:FOLDER/NAME.npz: the last part of it."""
    return re.sub(r"[^\w.-]+", "-", Path(data.rpartition(":")[2]).stem).strip(".") or "run"


def check_beside(run: Path) -> None:
    """Raises InputError where nothing can be written beside a run; before long work."""
    check_runs(run.resolve().parent, elsewhere(run))


def check_run(folder: Path) -> None:
    """Raises InputError where a folder is no run's."""
    if not (folder / RECIPE).is_file():
        what = f"no {RECIPE} in it" if folder.is_dir() else "no such folder"
        raise InputError(f"{folder}: {what}; expected a folder that `deeplimit train` wrote")


def check_spec(spec: str, *, trust: bool = False) -> None:
    """Refuses a model's name that nothing stands behind, as far as files tell; none is loaded.

    Raises:
        InputError: no such run folder, file, module or library, or no such model in it.
    """
    check_single(spec)
    if is_run(spec):
        RunFolder.open(spec, trust=trust)


def check_recipe(recipe: Recipe, runs: Path, name: str | None) -> None:
    """Raises InputError where data, model, weights or folder of a run cannot be there."""
    find_source(recipe.data, recipe.data_dir)
    if recipe.model is not None:
        check_spec(recipe.model, trust=getattr(recipe.model, "trust", False))
    if name is not None:
        check_name(name)
    check_runs(runs)


def load_named(spec: str, **asked: Any) -> "LoadedModel":
    """Loads the model of a recipe as `load_model` does; code runs only if its mark says so."""
    from deeplimit.training.library_models import LoadedModel
    from deeplimit.training.models import load_single

    check_single(spec)
    if not is_run(spec):
        return load_single(spec, **asked)
    run = RunFolder.open(spec, trust=isinstance(spec, Named) and spec.trust)
    scale = run.standardisation
    return LoadedModel(spec, run.model().train(), "trained", run.path, standardisation=scale)


def write_metrics(path: Path, rows: Sequence[Row]) -> None:
    """Writes metrics.csv into a folder while a training goes on, all rows of it."""
    RunFiles(path).forget(METRICS)
    write_text(path / METRICS, to_csv(rows))
