"""Training a recipe from its start, or from where a run was stopped."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from lightning_fabric import Fabric

from deeplimit._anatomy.evaluation import evaluating
from deeplimit.control import StageCost, crop
from deeplimit.errors import RunError, several
from deeplimit.interruption import interruptible
from deeplimit.training.building import Start, evaluation_batches, load_data, loss_of, prepare
from deeplimit.training.checkpoint import load_checkpoint
from deeplimit.training.companions import together
from deeplimit.training.loop import Training, depth_due
from deeplimit.training.processes import (
    first_process_does,
    fitting_threads,
    launch,
    place,
    repeatable,
    shared,
)
from deeplimit.training.progress import observer
from deeplimit.training.recipe import Recipe
from deeplimit.training.run_files import alone
from deeplimit.training.run_folder import RunFolder


def train(
    recipe: Recipe,
    *,
    runs: str | Path = Path("runs"),
    name: str | None = None,
    quiet: bool = False,
    then: Callable[[RunFolder], object] | None = None,
) -> RunFolder:
    """Trains a network in a new run folder, runs/NAME; an existing one is never touched.

    With 0 epochs a model that is given is taken as it is: the folder is that of a finished run.

    With several devices the command of this process is run once more for each further one (or
    torchrun has started them); all processes return the same folder.

    Args:
        recipe: what to train.
        runs: the folder for the run folders.
        name: the run's name; the data set's without it. A name that is taken gets -2, -3, ….
        quiet: no progress on stderr.
        then: is called with the trained run, before another process may write into it.

    Raises:
        InputError: before anything is written: a recipe that does not go with the data or with this
            machine, data that cannot be read, a folder that cannot be made.
        RunError: a loss that is not finite, a full disk; the last good checkpoint is kept.
        KeyboardInterrupt: on Ctrl-C, of the command line on SIGTERM too, with a message that says
            how to go on.
    """
    runs = Path(runs)
    recipe = place(recipe)
    start = prepare(recipe, load_data(recipe, runs))
    fabric = launched(start)
    folder = first_process_does(
        fabric, lambda: RunFolder.create(runs, name, start.recipe, start.data.class_names)
    )
    with alone(folder.path):
        return _trained(fabric, start, folder, then, quiet=quiet)


def resume(
    path: str | Path,
    *,
    quiet: bool = False,
    trust: bool = False,
    then: Callable[[RunFolder], object] | None = None,
) -> RunFolder:
    """Goes on with a run from its last good checkpoint, to the same result as an unbroken one.

    Args:
        path: the run folder.
        quiet: no progress on stderr.
        trust: whether code that its recipe names may be run.
        then: as of `train`.

    Raises:
        InputError: no run folder, one of another version, one whose checkpoints are damaged, or
            one that names code that is not trusted.
        RunError, KeyboardInterrupt: as `train`.
    """
    folder = RunFolder.open(path, trust=trust)
    folder = replace(folder, recipe=place(folder.recipe))
    with alone(folder.path):
        start = prepare(folder.recipe, load_data(folder.recipe, folder.path.parent))
        load_checkpoint(folder.path)
        return _trained(launched(start), start, folder, then, quiet=quiet)


def _trained(
    fabric: Fabric,
    start: Start,
    folder: RunFolder,
    then: Callable[[RunFolder], object] | None,
    *,
    quiet: bool,
) -> RunFolder:
    folder = train_in(fabric, start, folder, quiet=quiet)
    if then is not None:
        then(folder)
    return folder


def launched(start: Start) -> Fabric:
    """The processes of a training, as `launch` starts them.

    Some parameter may have no gradient: of layers that fade to nothing, of parts of a given model.
    """
    recipe, unused = start.recipe, start.fade is not None
    if shared(recipe) and not unused and recipe.model is not None:
        with evaluating(start.model) as model, torch.enable_grad():
            x, y = next(iter(evaluation_batches(start.data.train.take(1))))
            cost, _ = StageCost(model, loss_of(recipe, start.data), weight=0.0)(x, y)
            learnt = [p for p in model.parameters() if p.requires_grad]
            unused = None in torch.autograd.grad(cost, learnt, allow_unused=True)
    return launch(recipe, unused=unused)


def fit(
    fabric: Fabric,
    start: Start,
    folder: Path | None = None,
    *,
    title: str = "",
    command: str = "",
    until: int | None = None,
    quiet: bool = False,
) -> Training:
    """Trains to the end, from a folder's last good checkpoint where it has one.

    Without a folder nothing is written. `command` is what to call to go on once it was stopped;
    with `until` it stops after so many epochs, with the schedule of all.

    Raises:
        RunError, KeyboardInterrupt: as `train`.
    """
    recipe = start.recipe
    checkpoint = None if folder is None else load_checkpoint(folder)
    layers = checkpoint.rows[-1].get("layers") if checkpoint and checkpoint.rows else None
    if layers is not None:  # the others went before
        start = replace(start, model=crop(start.model, int(layers)))
    training = Training(fabric, start, folder)
    if checkpoint is not None:
        training.restore(checkpoint)
    done = len(training.rows)
    told = {"quiet": quiet or not fabric.is_global_zero, "text": bool(start.data.vocabulary)}
    with (
        observer(recipe.epochs, training.steps_per_epoch, done, **told) as seen,
        repeatable(fabric.device),
        fitting_threads(recipe),
        interruptible() as check,
    ):
        epochs = several(recipe.epochs, "epoch")
        if done >= recipe.epochs:
            epochs = f"{epochs}: finished already, nothing to train"
        elif done:
            epochs = f"{epochs}, going on after {done}"
        seen.start(f"{title}, {epochs}")
        try:
            while (now := len(training.rows)) < (recipe.epochs if until is None else until):
                if (depth := depth_due(recipe, training.rows)) is not None:
                    gone = f"the first {depth} layers are as good as all {training.layers}"
                    seen.start(f"after epoch {now} the network is cut: {gone}")
                    training = training.shortened(depth)
                try:
                    training.run_epoch(seen, check)
                except RuntimeError:
                    check()  # the others were stopped by the same signal, and so is this process
                    raise
        except KeyboardInterrupt as stop:
            done = len(training.rows)
            where = "after the last epoch" if done >= recipe.epochs else f"in epoch {done + 1}"
            after = f"after epoch {done}" if done else "from the start"
            stop.args = (f"stopped {where}{f'; {command} goes on {after}' if command else ''}",)
            raise
        except torch.OutOfMemoryError as error:
            raise RunError(
                f"out of memory on {fabric.device} with batches of {recipe.batch_size}; train "
                "with a smaller batch size or on more devices"
            ) from error
    return training


def train_in(
    fabric: Fabric,
    start: Start,
    folder: RunFolder,
    *,
    title: str = "",
    going_on: Path | None = None,
    quiet: bool = False,
) -> RunFolder:
    """Trains in a run folder that there is, from its last good checkpoint; writes the network.

    The run has, then, what this process has of it: its data, and the first one the whole network.
    `going_on` is the run folder whose resumption goes on with this; by default this one.

    Raises:
        RunError, KeyboardInterrupt: as `train`.
    """
    recipe, network, rows = start.recipe, start.model, None
    folder = replace(folder, recipe=recipe)
    command = f"deeplimit train --resume {going_on or folder.path}"
    layers = f"{recipe.kind} network of {several(recipe.horizon, 'layer')}"
    title = title or f"{folder.path}: {recipe.model or layers} on {recipe.data}"

    def finish() -> None:
        with folder.commit() as new:
            new.write_metrics(rows or ())
            new.write_model(network)

    with together(f"{command} goes on"), alone(folder.path):
        if recipe.epochs:
            training = fit(fabric, start, folder.path, title=title, command=command, quiet=quiet)
            network, rows = training.end(), training.rows
        first_process_does(fabric, finish)
    whole = network.eval() if fabric.is_global_zero else None
    return replace(folder, data=start.data, network=whole)
