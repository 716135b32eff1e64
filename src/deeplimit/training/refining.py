"""A run's network made deeper, in a run folder of its own, and trained on from there."""

from dataclasses import replace
from pathlib import Path

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from deeplimit.control.verifying import CropResult
from deeplimit.data import DataSet
from deeplimit.errors import InputError
from deeplimit.network.storage import architecture_of
from deeplimit.ode import refine
from deeplimit.training.building import (
    compared,
    freeze_frame,
    loss_of,
    reshaped,
    run_data,
    training_batches,
)
from deeplimit.training.checkpoint import (
    Checkpoint,
    capture,
    load_checkpoint,
    restore,
    save_checkpoint,
)
from deeplimit.training.fit import resume
from deeplimit.training.loop import build_optimizer
from deeplimit.training.models import of_transformers
from deeplimit.training.new_folder import check_beside
from deeplimit.training.processes import alone_in
from deeplimit.training.recipe import Recipe
from deeplimit.training.results import Refinement
from deeplimit.training.run_folder import RunFolder


def refine_run(
    folder: RunFolder,
    factor: int = 2,
    *,
    epochs: int = 0,
    learning_rate: float | None = None,
    name: str | None = None,
    quiet: bool = False,
) -> RunFolder:
    """Refines a run's network into a new run folder beside it, and trains on from there.

    The new recipe is the run's own with the deeper network, its step, and where it starts from. The
    training has a fresh one-cycle schedule; where the run has a checkpoint the optimiser's state is
    carried along as by `refine`. It starts from a checkpoint after 0 epochs, so that `resume`, or
    deeplimit train --resume, goes on with it wherever it was stopped.

    Args:
        folder: a finished run, of a network of deeplimit's own or of transformers.
        factor: m.
        epochs: passes over the training data; 0: none.
        learning_rate: the largest of the schedule; by default the run's.
        name: the new run folder's; by default the run's with -xm behind it.
        quiet: no progress on stderr.

    Returns:
        The new run; its `refinement()` has the figures on test data.

    Raises:
        InputError: a network that cannot be refined or stored, settings out of range, a run that is
            not finished.
        RunError, KeyboardInterrupt: as `train`.
    """
    recipe = _recipe(folder.recipe, epochs, learning_rate)
    check_beside(folder.path)
    model = folder.model()
    if architecture_of(model) is None and not of_transformers(model):
        raise InputError(
            f"a run folder cannot store another depth of a {type(model).__name__}; refine it in "
            "Python: deeplimit.refine"
        )
    data = run_data(folder)
    optimizer = _optimiser_of(folder, model) if epochs else None
    deeper = refine(model, factor, optimizer=optimizer)
    name = f"{folder.path.resolve().name}-x{factor}" if name is None else name
    refinement = Refinement(
        source=str(folder.path.resolve()),
        factor=factor,
        report=_compared(recipe, data, model, deeper),
        epochs=epochs,
        learning_rate=recipe.learning_rate,
        carried=optimizer is not None,
    )
    shaped = reshaped(recipe, deeper)
    rate = folder.recipe.learning_rate

    def fill(made: RunFolder, _: Path) -> None:
        if optimizer is not None:
            save_checkpoint(made.path, _beginning(made.recipe, data, deeper, optimizer, rate))
        made.write(refinement)

    names = folder.class_names
    made = RunFolder.create_from(folder.path.parent, name, shaped, deeper, epochs, names, fill)
    made = resume(made.path, quiet=quiet)
    if epochs:
        trained = _compared(recipe, data, model, made.model())
        made.write(replace(refinement, trained=trained))
    return made


def _recipe(recipe: Recipe, epochs: int, learning_rate: float | None) -> Recipe:
    """The run's own with other settings, checked before anything is written; in one process."""
    if epochs < 0:
        raise InputError(f"epochs is {epochs}; expected at least 0")
    if learning_rate is not None and not epochs:
        raise InputError(
            f"the learning rate is {learning_rate:g}, but nothing is trained: give epochs, or "
            "leave the learning rate out"
        )
    rate = recipe.learning_rate if learning_rate is None else learning_rate
    # A network of our own needs an epoch unless there is a start, which is not written yet.
    epochs = max(epochs, 1)
    changed = replace(recipe, epochs=epochs, learning_rate=rate, start=None)
    return alone_in("deeplimit refine", changed)


def _optimiser_of(folder: RunFolder, model: nn.Module) -> Optimizer | None:
    """The optimiser as of the run's last checkpoint, for its network; None without one."""
    checkpoint = load_checkpoint(folder.path)
    if checkpoint is None:
        return None
    freeze_frame(folder.recipe, model)
    optimizer = build_optimizer(folder.recipe, model)
    schedule = OneCycleLR(optimizer, max_lr=folder.recipe.learning_rate, total_steps=1)
    restore(checkpoint, model, optimizer, schedule)
    return optimizer


def _beginning(
    recipe: Recipe, data: DataSet, model: nn.Module, optimizer: Optimizer, before: float
) -> Checkpoint:
    """A checkpoint after 0 epochs: the optimiser carried along, under a schedule of its own."""
    rates = [group["max_lr"] * recipe.learning_rate / before for group in optimizer.param_groups]
    steps = recipe.epochs * len(training_batches(recipe, data, 0))
    schedule = OneCycleLR(optimizer, max_lr=rates, total_steps=steps)
    weights, state = capture(model, optimizer)
    return Checkpoint(weights, state, schedule.state_dict(), 0, [])


def _compared(recipe: Recipe, data: DataSet, before: nn.Module, after: nn.Module) -> CropResult:
    """By accuracy, of tokens too."""
    loss, most = loss_of(recipe, data), recipe.points / 100
    return compared(recipe, data, before, after, most=most, loss=loss)
