"""Networks of several runs as measures: read, told apart by name, scored on the data they share."""

import copy
from collections.abc import Callable, Iterable, Sequence
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
from deeplimit.meanfield import LayerwiseMeasure
from deeplimit.network.storage import architecture_of
from deeplimit.training import RunFolder, load_model, resume, run_data
from deeplimit.training.building import evaluation_batches, outside, reshaped
from deeplimit.training.models import of_transformers
from deeplimit.training.results import Score

ALIGNED_ON = 256
Batches = Iterable[tuple[Tensor, Tensor]]


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
    """The networks of run folders, or of models as `load_model` takes them.

    Raises:
        InputError: fewer than two, no such run or model, a network that is not a mean of particles,
            code that a run names and `trust` does not say may be run.
    """
    if len(specs) < 2:
        raise InputError(f"expected two runs or more, got {len(specs)}")
    found = []
    for spec, name in zip(specs, names_of(specs), strict=True):
        loaded = load_model(str(spec), seed=seed, trust=trust)
        model = loaded.model.eval()
        try:
            measure = LayerwiseMeasure.of(model)
        except InputError as error:
            raise InputError(f"{spec}: {error}") from error
        folder = None if loaded.run is None else RunFolder.open(loaded.run, trust=trust)
        found.append(MeasuredRun(name, str(spec), model, measure, folder))
    return found


def names_of(specs: Sequence[str | Path]) -> list[str]:
    """The last parts of paths, whole paths where these are the same."""
    short = [Path(str(spec)).name or str(spec) for spec in specs]
    pairs = zip(short, specs, strict=True)
    return [name if short.count(name) == 1 else str(spec) for name, spec in pairs]


def folders_of(runs: Sequence[MeasuredRun]) -> list[RunFolder]:
    """The run folders.

    Raises:
        InputError: a model that comes from none.
    """
    for run in runs:
        if run.folder is None:
            raise InputError(
                f"{run.path} is a model, not a run folder; its loss needs data: give folders that "
                "`deeplimit train` wrote"
            )
    return [cast(RunFolder, run.folder) for run in runs]


def shared_data(folders: Sequence[RunFolder]) -> DataSet:
    """The data of all runs.

    Raises:
        InputError: they are not the same, or the runs see them differently.
    """
    first, *others = folders
    data = run_data(first)
    for other in others:
        both = f"{first.path} and {other.path}"
        if other.recipe.data != first.recipe.data:
            raise InputError(
                f"{both} were trained on different data, {first.recipe.data} and "
                f"{other.recipe.data}; expected runs on the same"
            )
        theirs = run_data(other)
        if theirs.class_names != data.class_names or not _same(data, theirs):
            raise InputError(
                f"{both} have different test samples of {first.recipe.data}; expected runs on the "
                "same: one data_dir, and for spirals one seed"
            )
        if other.standardisation != first.standardisation:
            raise InputError(
                f"{both} standardise their samples differently, so that their networks see "
                "different data; expected the same mean and std"
            )
    return data


def _same(a: DataSet, b: DataSet) -> bool:
    return torch.equal(a.test.x, b.test.x) and torch.equal(a.test.y, b.test.y)


def alignment_batch(data: DataSet) -> Tensor:
    """Training samples on which the basis of two streams is found."""
    count = min(ALIGNED_ON, len(data.train))
    x, _ = next(iter(evaluation_batches(data.train.take(count))))
    return x


@torch.no_grad()
def score(model: nn.Module, batches: Batches, loss: SoftCrossEntropy) -> Score:
    """Loss and accuracy over all samples."""
    structure, device = anatomy(model), device_of(model)
    total = right = count = 0.0
    with evaluating(model):
        for x, y in batches:
            logits = structure.run(to_device(x, device)).cpu()
            total += float(loss(logits, y).double().sum())
            right += int((logits.argmax(-1) == y).sum())
            count += len(y)
    return Score(total / count, right / count)


@torch.no_grad()
def averaged(models: Sequence[nn.Module], weights: Sequence[float]) -> nn.Module:
    """Σ_k λ_k θ_k, parameter by parameter, as the neurons happen to be numbered; the naive way.

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
    """What the network shares with the run's: healed or refined it then stays on their geodesics.

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
    fill: Callable[[RunFolder, Path], None] = lambda folder, path: None,
) -> RunFolder:
    """A new run folder beside another, whose network is this one; nothing is trained.

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
