"""Training a recipe from its start, or from where a run was stopped."""

from dataclasses import replace
from pathlib import Path

import torch
from lightning_fabric import Fabric

from deeplimit.data import DataSet
from deeplimit.errors import RunError
from deeplimit.training.building import check_fit, load_data
from deeplimit.training.checkpoint import load_checkpoint
from deeplimit.training.determinism import repeatable
from deeplimit.training.interruption import interruptible
from deeplimit.training.loop import Training
from deeplimit.training.processes import first_process_does, launch, place
from deeplimit.training.progress import observer
from deeplimit.training.recipe import Recipe
from deeplimit.training.run_folder import RunFolder
from deeplimit.training.threads import fitting_threads


def train(
    recipe: Recipe, *, runs: str | Path = Path("runs"), name: str | None = None, quiet: bool = False
) -> RunFolder:
    """Trains a network in a new run folder, runs/NAME; an existing one is never touched.

    With several devices the command of this process is run once more for each further one (or
    torchrun has started them); all processes return the same folder.

    Args:
        recipe: what to train.
        runs: the folder for the run folders.
        name: the run's name; the data set's without it. A name that is taken gets -2, -3, ….
        quiet: no progress on stderr.

    Raises:
        InputError: before anything is written: a recipe that does not go with the data or with this
            machine, data that cannot be read, a folder that cannot be made.
        RunError: a loss that is not finite, a full disk; the last good checkpoint is kept.
        KeyboardInterrupt: on Ctrl-C, with a message that says how to go on.
    """
    runs = Path(runs)
    recipe = place(recipe)
    data = load_data(recipe, runs)
    check_fit(recipe, data)
    fabric = launch(recipe)
    folder = first_process_does(
        fabric, lambda: RunFolder.create(runs, name, recipe, data.class_names)
    )
    return _fit(fabric, folder, data, quiet)


def resume(path: str | Path, *, quiet: bool = False) -> RunFolder:
    """Goes on with a run from its last good checkpoint, to the same result as an unbroken one.

    Args:
        path: the run folder.
        quiet: no progress on stderr.

    Raises:
        InputError: no run folder, one of another version, or one whose checkpoints are damaged.
        RunError, KeyboardInterrupt: as `train`.
    """
    folder = RunFolder.open(path)
    folder = replace(folder, recipe=place(folder.recipe))
    data = load_data(folder.recipe, folder.path.parent)
    check_fit(folder.recipe, data)
    load_checkpoint(folder.path)
    return _fit(launch(folder.recipe), folder, data, quiet)


def _fit(fabric: Fabric, folder: RunFolder, data: DataSet, quiet: bool) -> RunFolder:
    recipe = folder.recipe
    training = Training(fabric, recipe, data, folder)
    checkpoint = load_checkpoint(folder.path)
    if checkpoint is not None:
        training.restore(checkpoint)
    done = len(training.rows)
    quiet = quiet or not fabric.is_global_zero
    with (
        observer(recipe.epochs, training.steps_per_epoch, done, quiet) as seen,
        repeatable(fabric.device),
        fitting_threads(recipe),
        interruptible() as check,
    ):
        seen.start(f"{folder.path}: {_planned(recipe, done)}")
        try:
            while len(training.rows) < recipe.epochs:
                training.run_epoch(seen, check)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(_stopped(folder, training)) from None
        except torch.OutOfMemoryError as error:
            raise RunError(
                f"out of memory on {fabric.device} with batches of {recipe.batch_size}; train "
                "with a smaller batch size or on more devices"
            ) from error
    first_process_does(fabric, lambda: _finish(folder, training))
    return folder


def _finish(folder: RunFolder, training: Training) -> None:
    folder.write_metrics(training.rows)
    folder.write_model(training.network)


def _planned(recipe: Recipe, done: int) -> str:
    network = f"{recipe.kind} network of {recipe.horizon} layers on {recipe.data}"
    what = f"{network}, {recipe.epochs} epochs"
    if done >= recipe.epochs:
        return f"{what}: finished already, nothing to train"
    return what if done == 0 else f"{what}, going on after {done}"


def _stopped(folder: RunFolder, training: Training) -> str:
    done = len(training.rows)
    where = f"in epoch {done + 1}" if done < training.recipe.epochs else "after the last epoch"
    after = f"after epoch {done}" if done else "from the start"
    return f"stopped {where}; deeplimit train --resume {folder.path} goes on {after}"
