"""Networks of several runs as measures: read, told apart by name, scored on the data they share."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from deeplimit._anatomy import anatomy, chain_stacks
from deeplimit._anatomy.evaluation import device_of, evaluating, to_device
from deeplimit.control import SoftCrossEntropy
from deeplimit.data import DataSet
from deeplimit.errors import InputError
from deeplimit.meanfield import LayerwiseMeasure, align_streams
from deeplimit.network.storage import architecture_of
from deeplimit.training import RunFolder, load_model, loss_of, resume, run_data
from deeplimit.training.building import evaluation_batches, outside, reshaped
from deeplimit.training.models import of_transformers
from deeplimit.training.new_folder import check_beside
from deeplimit.training.results import Score

ALIGNED_ON = 256


@dataclass(frozen=True, eq=False)
class MeasuredRun:
    """A network and its measure.

    Attributes:
        name: what it is called: the run folder's name, told apart from others of that name.
        path: as the user gave it.
        model: in evaluation mode, on the CPU.
        measure: of the model.
        folder: its run folder; None for a model that comes from none.
    """

    name: str
    path: str
    model: nn.Module
    measure: LayerwiseMeasure
    folder: RunFolder | None


def measured(
    specs: Sequence[str | Path], seed: int = 0, *, trust: bool = False
) -> list[MeasuredRun]:
    """Loads the networks of run folders, or of models as `load_model` takes them.

    Raises:
        InputError: fewer than two, no such run or model, a network that is not a mean of particles,
            code that a run names and `trust` does not say may be run.
    """
    if len(specs) < 2:
        raise InputError(f"expected two runs or more, got {len(specs)}")
    paths = [str(spec) for spec in specs]
    short = [Path(path).name or path for path in paths]
    found = []
    for path, name in zip(paths, short, strict=True):
        loaded = load_model(path, seed=seed, trust=trust)
        model = loaded.model.eval()
        with blamed(path):
            measure = LayerwiseMeasure.of(model)
        folder = None if loaded.run is None else RunFolder.open(loaded.run, trust=trust)
        own = name if short.count(name) == 1 else path
        found.append(MeasuredRun(own, path, model, measure, folder))
    return found


@contextmanager
def blamed(*paths: str) -> Iterator[None]:
    """Makes an InputError say of which networks it is."""
    try:
        yield
    except InputError as error:
        names = (" and " if len(paths) == 2 else ", ").join(paths)
        raise InputError(f"{names}: {error}") from error


@dataclass(frozen=True, eq=False)
class SharedRuns:
    """Runs whose networks are measures, and the data that they share.

    Attributes:
        runs: at least two.
        folders: theirs.
        data: as the networks see them.
        loss: the first one's.
    """

    runs: list[MeasuredRun]
    folders: list[RunFolder]
    data: DataSet
    loss: SoftCrossEntropy

    @classmethod
    def open(
        cls, specs: Sequence[str | Path], *, trust: bool = False, stored: bool = False
    ) -> "SharedRuns":
        """Loads them; `stored` says that another network is going to be a run beside the first.

        Raises:
            InputError: as `measured`, a model that comes from no run, data that are not the same
                or seen differently, a network or a place that nothing can be stored of or in.
        """
        runs = measured(specs, trust=trust)
        for run in runs:
            if run.folder is None:
                raise InputError(
                    f"{run.path} is a model, not a run folder; its loss needs data: give folders "
                    "that `deeplimit train` wrote"
                )
        folders = [cast(RunFolder, run.folder) for run in runs]
        if stored:
            check_beside(folders[0].path)
            check_storable(runs[0].model)
        for other in folders[1:]:
            _check_same(folders[0], other)
        data = run_data(folders[0])
        return cls(runs, folders, data, loss_of(folders[0].recipe, data))

    @property
    def paths(self) -> tuple[str, ...]:
        """As the user gave them."""
        return tuple(run.path for run in self.runs)

    @property
    def names(self) -> tuple[str, ...]:
        """Returns what the networks are called."""
        return tuple(run.name for run in self.runs)

    def measures(self, *, align: bool) -> list[LayerwiseMeasure]:
        """Returns the networks' measures; aligned: all in the basis of the first one's stream."""
        first, *others = (run.measure for run in self.runs)
        if align:
            samples = self.data.train.take(min(ALIGNED_ON, len(self.data.train)))
            batch, _ = next(iter(evaluation_batches(samples)))
            others = [align_streams(first, other, batch) for other in others]
        return [first, *others]

    @torch.no_grad()
    def score(self, model: nn.Module) -> Score:
        """Measures loss and accuracy on test data."""
        structure, device = anatomy(model), device_of(model)
        total = right = count = 0.0
        with evaluating(model):
            for x, y in evaluation_batches(self.data.test):
                logits = structure.run(to_device(x, device)).cpu()
                total += float(self.loss(logits, y).double().sum())
                right += int((logits.argmax(-1) == y).sum())
                count += len(y)
        return Score(total / count, right / count)

    def average(self, weights: Sequence[float]) -> nn.Module:
        """Averages the networks' parameters, as `averaged`."""
        return averaged([run.model for run in self.runs], weights)


def _check_same(first: RunFolder, other: RunFolder) -> None:
    """Raises InputError where two runs are not of the same data, or see them differently."""
    both = f"{first.path} and {other.path}"
    if other.recipe.data != first.recipe.data:
        raise InputError(
            f"{both} were trained on different data, {first.recipe.data} and "
            f"{other.recipe.data}; expected runs on the same"
        )
    mine, theirs = run_data(first), run_data(other)
    same = torch.equal(mine.test.x, theirs.test.x) and torch.equal(mine.test.y, theirs.test.y)
    if theirs.class_names != mine.class_names or not same:
        raise InputError(
            f"{both} have different test samples of {first.recipe.data}; expected runs on the "
            "same: one data_dir, and for spirals one seed"
        )
    if other.standardisation != first.standardisation:
        raise InputError(
            f"{both} standardise their samples differently, so that their networks see "
            "different data; expected the same mean and std"
        )


@torch.no_grad()
def averaged(models: Sequence[nn.Module], weights: Sequence[float]) -> nn.Module:
    """Computes Σ_k λ_k θ_k, the naive way: as the neurons happen to be numbered.

    Raises:
        InputError: the networks are not of one shape, so that there is no such average.
    """
    states = [model.state_dict() for model in models]
    for state in states[1:]:
        if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in states[0].items()}:
            raise InputError("the networks differ in width or depth")
    steps = {stack.step for model in models for stack in chain_stacks(model)}
    if len(steps) > 1:
        raise InputError("the networks differ in their step size")
    made = copy.deepcopy(models[0])
    values = {}
    for name, value in states[0].items():
        if value.is_floating_point():
            mean = sum(w * s[name].double() for w, s in zip(weights, states, strict=True))
            value = cast(Tensor, mean).to(value.dtype)
        values[name] = value
    made.load_state_dict(values)
    return made.eval()


def check_storable(model: nn.Module) -> None:
    """Raises InputError unless a run folder can hold the model in another width and depth."""
    said = {} if (own := architecture_of(model)) is None else own.to_dict()
    if "hidden" not in said and not of_transformers(model):
        raise InputError(
            f"a run folder cannot store another width or depth of a {type(model).__name__}; work "
            "on it in Python: deeplimit.cot_geodesic, deeplimit.meanfield.merge"
        )


def _frame_of(model: nn.Module, like: RunFolder) -> Path | None:
    """Names what the network shares with the run's, so that training keeps it on their geodesics.

    None where its stem and head are a mean of others'.
    """
    recipe = like.recipe
    if recipe.model is not None or recipe.kind not in ("vector", "logit") or not recipe.hidden:
        return None
    mine, theirs = outside(model.state_dict()), outside(like.model().state_dict())
    alike = mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)
    return (recipe.frame or like.path) if alike else None


def run_of(
    model: nn.Module,
    like: RunFolder,
    name: str,
    fill: Callable[[RunFolder, Path], None] = lambda *_: None,
) -> RunFolder:
    """Makes a run folder beside another, whose network is this one; nothing is trained.

    Its recipe is the other run's with the shape of the network, which it starts from. What `fill`
    writes appears with it, as in `RunFolder.create_from`.

    Raises:
        InputError: a network that no run folder can hold, or a name that cannot be a folder's.
    """
    check_storable(model)
    recipe = like.recipe
    epochs = max(recipe.epochs, 1)  # until there is a start
    frame = _frame_of(model, like)
    recipe = replace(recipe, start=None, frame=frame, epochs=epochs, devices=1, strategy="auto")
    recipe = reshaped(recipe, model)
    runs, names = like.path.parent, like.class_names
    made = RunFolder.create_from(runs, name, recipe, model, 0, names, fill)
    return resume(made.path, quiet=True)
