"""Training a recipe from its start, from where a run was stopped, or with its network deeper."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from lightning_fabric import Fabric
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from deeplimit._anatomy import anatomy
from deeplimit._anatomy.evaluation import evaluating
from deeplimit.control import StageCost, crop
from deeplimit.data import DataSet
from deeplimit.errors import InputError, RunError, several
from deeplimit.interruption import interruptible
from deeplimit.ode import refine
from deeplimit.training import building, checkpoint, processes
from deeplimit.training.building import Start
from deeplimit.training.companions import together
from deeplimit.training.loop import Training, build_optimizer, depth_due
from deeplimit.training.models import keeps_any_depth
from deeplimit.training.processes import first_process_does
from deeplimit.training.progress import observer
from deeplimit.training.recipe import Recipe
from deeplimit.training.results import Refinement
from deeplimit.training.run_files import alone
from deeplimit.training.run_folder import RunFolder, check_beside


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
    recipe = processes.place(recipe)
    start = building.prepare(recipe, building.load_data(recipe, runs))
    fabric = launched(start)
    folder = first_process_does(
        fabric, lambda: RunFolder.create(runs, name, start.recipe, start.data.class_names)
    )
    return train_in(fabric, start, folder, quiet=quiet, then=then)


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
    recipe = processes.place(folder.recipe)
    with alone(folder.path):
        start = building.prepare(recipe, building.load_data(recipe, folder.path.parent))
        checkpoint.load_checkpoint(folder.path)  # or refused, before processes are started
        return train_in(launched(start), start, folder, quiet=quiet, then=then)


def launched(start: Start) -> Fabric:
    """The processes of a training, as `launch` starts them.

    Some parameter may have no gradient: of layers that fade to nothing, of parts of a given model.
    """
    recipe, unused = start.recipe, start.fade is not None
    if processes.shared(recipe) and not unused and recipe.model is not None:
        with evaluating(start.model) as model, torch.enable_grad():
            x, y = next(iter(building.evaluation_batches(start.data.train.take(1))))
            cost, _ = StageCost(model, building.loss_of(recipe, start.data), weight=0.0)(x, y)
            learnt = [p for p in model.parameters() if p.requires_grad]
            unused = None in torch.autograd.grad(cost, learnt, allow_unused=True)
    return processes.launch(recipe, unused=unused)


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
    last = None if folder is None else checkpoint.load_checkpoint(folder)
    layers = last.rows[-1].get("layers") if last and last.rows else None
    if layers is not None:  # the others went before
        start = replace(start, model=crop(start.model, int(layers)))
    training = Training(fabric, start, folder)
    if last is not None:
        training.restore(last)
    done = len(training.rows)
    told = {"quiet": quiet or not fabric.is_global_zero, "text": bool(start.data.vocabulary)}
    with (
        observer(recipe.epochs, training.steps_per_epoch, done, **told) as seen,
        processes.repeatable(fabric.device),
        processes.fitting_threads(recipe),
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
                    layers = anatomy(training.network).horizon
                    gone = f"the first {depth} layers are as good as all {layers}"
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
    then: Callable[[RunFolder], object] | None = None,
) -> RunFolder:
    """Trains in a run folder that there is, from its last good checkpoint; writes the network.

    The run has, then, what this process has of it: its data, and the first one the whole network.
    `going_on` is the run folder whose resumption goes on with this; by default this one. `then` is
    called with the trained run, before another process may write into it.

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

    with alone(folder.path):
        with together(f"{command} goes on"):
            if recipe.epochs:
                training = fit(
                    fabric, start, folder.path, title=title, command=command, quiet=quiet
                )
                network, rows = training.end(), training.rows
            first_process_does(fabric, finish)
        whole = network.eval() if fabric.is_global_zero else None
        folder = replace(folder, data=start.data, network=whole)
        if then is not None:
            then(folder)
    return folder


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
    recipe = _deeper_recipe(folder.recipe, epochs, learning_rate)
    check_beside(folder.path)
    model = folder.model()
    if not keeps_any_depth(model):
        raise InputError(
            f"a run folder cannot store another depth of a {type(model).__name__}; refine it in "
            "Python: deeplimit.refine"
        )
    data = building.run_data(folder)
    optimizer = _optimiser_of(folder, model) if epochs else None
    deeper = refine(model, factor, optimizer=optimizer)
    # By accuracy, of tokens too.
    most, loss = recipe.points / 100, building.loss_of(recipe, data)
    judged = partial(building.compared, recipe, data, model, most=most, loss=loss)
    name = f"{folder.path.resolve().name}-x{factor}" if name is None else name
    refinement = Refinement(
        source=str(folder.path.resolve()),
        factor=factor,
        report=judged(deeper),
        epochs=epochs,
        learning_rate=recipe.learning_rate,
        carried=optimizer is not None,
    )
    shaped, rate = building.reshaped(recipe, deeper), folder.recipe.learning_rate

    def fill(made: RunFolder, _: Path) -> None:
        if optimizer is not None:
            begun = _beginning(made.recipe, data, deeper, optimizer, rate)
            checkpoint.save_checkpoint(made.path, begun)
        made.write(refinement)

    names = folder.class_names
    made = RunFolder.create_from(folder.path.parent, name, shaped, deeper, epochs, names, fill)
    made = resume(made.path, quiet=quiet)
    if epochs:
        made.write(replace(refinement, trained=judged(made.model())))
    return made


def _deeper_recipe(recipe: Recipe, epochs: int, learning_rate: float | None) -> Recipe:
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
    # More evaluations than epochs, after which the run's was to be cut, are never made here.
    cutting = recipe.cut_while_training if recipe.cut_while_training <= epochs else 0
    changed = replace(
        recipe, epochs=epochs, learning_rate=rate, start=None, cut_while_training=cutting
    )
    return processes.alone_in("deeplimit refine", changed)


def _optimiser_of(folder: RunFolder, model: nn.Module) -> Optimizer | None:
    """The optimiser as of the run's last checkpoint, for its network; None without one."""
    last = checkpoint.load_checkpoint(folder.path)
    if last is None:
        return None
    building.freeze_frame(folder.recipe, model)
    optimizer = build_optimizer(folder.recipe, model)
    schedule = OneCycleLR(optimizer, max_lr=folder.recipe.learning_rate, total_steps=1)
    checkpoint.restore(last, model, optimizer, schedule)
    return optimizer


def _beginning(
    recipe: Recipe, data: DataSet, model: nn.Module, optimizer: Optimizer, before: float
) -> checkpoint.Checkpoint:
    """A checkpoint after 0 epochs: the optimiser carried along, under a schedule of its own."""
    rates = [group["max_lr"] * recipe.learning_rate / before for group in optimizer.param_groups]
    steps = recipe.epochs * len(building.training_batches(recipe, data, 0))
    schedule = OneCycleLR(optimizer, max_lr=rates, total_steps=steps)
    weights, state = checkpoint.capture(model, optimizer)
    return checkpoint.Checkpoint(weights, state, schedule.state_dict(), 0, [])
