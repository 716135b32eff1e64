"""Networks of several runs as measures: read, told apart by name, scored on the data they share."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deeplimit._anatomy import anatomy, chain_stacks
from deeplimit._anatomy.evaluation import device_of, evaluating, to_device
from deeplimit.control import SoftCrossEntropy
from deeplimit.data import DataSet
from deeplimit.errors import InputError, refuse
from deeplimit.meanfield import LayerwiseMeasure, align_streams
from deeplimit.meanfield.geodesic import FramePolicy
from deeplimit.network.storage import architecture_of
from deeplimit.training import RunFolder, load_model, loss_of, resume, run_data
from deeplimit.training.building import evaluation_batches, outside, reshaped
from deeplimit.training.models import of_transformers
from deeplimit.training.results import Score
from deeplimit.training.run_folder import check_beside

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
    """Loads the networks of run folders, or of models as `load_model` takes them."""
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
    """Runs whose networks are measures, two at least, and the data that they share.

    Attributes:
        measures: of all networks, aligned in the basis of the first one's stream if asked for.
        data: as the networks see them.
        loss: the first one's.
        frame: what becomes of stems, heads and norms.
    """

    runs: list[MeasuredRun]
    folders: list[RunFolder]
    names: tuple[str, ...]
    paths: tuple[str, ...]
    measures: list[LayerwiseMeasure]
    data: DataSet
    loss: SoftCrossEntropy
    frame: FramePolicy

    @classmethod
    def open(
        cls,
        specs: Sequence[str | Path],
        frame: FramePolicy | None,
        *,
        align: bool = False,
        trust: bool = False,
        stored: bool = False,
    ) -> "SharedRuns":
        """Loads them; `stored` says that another network is going to be a run beside the first."""
        if align and frame == "equal":
            raise InputError(
                "align turns the second network's stem and head, and others', which then differ "
                'from the first\'s; give the frame "interpolate" with it'
            )
        runs = measured(specs, trust=trust)
        folders = [run.folder for run in runs if run.folder is not None]
        for run in runs:
            if run.folder is None:
                raise InputError(
                    f"{run.path} is a model, not a run folder; its loss needs data: give folders "
                    "that `deeplimit train` wrote"
                )
        if stored:
            check_beside(folders[0].path)
            check_storable(runs[0].model)
        for other in folders[1:]:
            refuse(f"{folders[0].path} and {other.path}", _differences(folders[0], other))
        data = run_data(folders[0])
        paths, measures = tuple(run.path for run in runs), [run.measure for run in runs]
        if align:
            samples = data.train.take(min(ALIGNED_ON, len(data.train)))
            batch, _ = next(iter(evaluation_batches(samples)))
            with blamed(*paths):
                measures[1:] = [align_streams(measures[0], m, batch) for m in measures[1:]]
        names, loss = tuple(run.name for run in runs), loss_of(folders[0].recipe, data)
        frame = frame or ("interpolate" if align else "equal")
        return cls(runs, folders, names, paths, measures, data, loss, frame)

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


def _differences(first: RunFolder, other: RunFolder) -> Iterator[str]:
    """Says why two runs are not of the same data, or see them differently."""
    mine, theirs = first.recipe.data, other.recipe.data
    if theirs != mine:
        yield f"trained on different data, {mine} and {theirs}; expected runs on the same"
    ours, others = run_data(first), run_data(other)
    same = torch.equal(ours.test.x, others.test.x) and torch.equal(ours.test.y, others.test.y)
    if others.class_names != ours.class_names or not same:
        yield (
            f"different test samples of {mine}; expected runs on the same: one data_dir, and for "
            "spirals one seed"
        )
    if other.standardisation != first.standardisation:
        yield (
            "samples standardised differently, so that the networks see different data; expected "
            "the same mean and std"
        )


@torch.no_grad()
def averaged(models: Sequence[nn.Module], weights: Sequence[float]) -> nn.Module:
    """Computes Σ_k λ_k θ_k, the naive way: as the neurons happen to be numbered."""
    states = [model.state_dict() for model in models]
    for state in states[1:]:
        if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in states[0].items()}:
            raise InputError("the networks differ in width or depth")
    steps = {stack.step for model in models for stack in chain_stacks(model)}
    if len(steps) > 1:
        raise InputError("the networks differ in their step size")
    made, values = copy.deepcopy(models[0]), dict(states[0])
    for name, value in values.items():
        if value.is_floating_point():
            mean: Any = sum(w * s[name].double() for w, s in zip(weights, states, strict=True))
            values[name] = mean.to(value.dtype)
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
    """Names the run whose stem and head the network has, which training then keeps; or none."""
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
    """
    check_storable(model)
    recipe = like.recipe
    epochs = max(recipe.epochs, 1)  # until there is a start
    frame = _frame_of(model, like)
    recipe = replace(recipe, start=None, frame=frame, epochs=epochs, devices=1, strategy="auto")
    runs, recipe = like.path.parent, reshaped(recipe, model)
    made = RunFolder.create_from(runs, name, recipe, model, 0, like.class_names, fill)
    return resume(made.path, quiet=True)
