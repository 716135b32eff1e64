"""A short recovery of a cut network, with the full one as its teacher or without."""

import copy
import json
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Literal

from torch import nn

from deeplimit._anatomy import anatomy
from deeplimit._anatomy.checks import layer_numbers
from deeplimit._anatomy.evaluation import device_of, to_device
from deeplimit.control import crop
from deeplimit.control.distillation import check_teaching
from deeplimit.data import DataSet
from deeplimit.errors import InputError, several
from deeplimit.files import write_text
from deeplimit.records import read_record, to_plain
from deeplimit.training.building import (
    Fade,
    Start,
    Teaching,
    compared,
    evaluation_batches,
    run_data,
    tolerance_of,
)
from deeplimit.training.fit import fit, launched
from deeplimit.training.given_model import check_model
from deeplimit.training.processes import alone_in, place
from deeplimit.training.recipe import Recipe
from deeplimit.training.results import Healing, Parts, Plan
from deeplimit.training.run_files import alone
from deeplimit.training.run_folder import RunFolder

UNDERWAY, PLAN = "heal", "plan.json"
FADE = 0.45  # of the training; see benchmarks/results/pretrained_budget.json
GENTLER = 10  # how much smaller than the run's the learning rate is by default


def heal(
    model: nn.Module,
    data: DataSet,
    *,
    remove: Iterable[int] = (),
    fade: float = FADE,
    teacher: nn.Module | None = None,
    teacher_learns: bool = False,
    teacher_weight: float = 0.5,
    temperature: float = 2.0,
    recipe: Recipe | None = None,
    quiet: bool = True,
) -> nn.Module:
    """A copy of a network, cut while it is trained a little more, or before.

    The layers to be removed do not go at once: their step size s goes from 1 to 0 in the first part
    of the training (`Fading`), so that nothing jumps. A network that is cut already is fine-tuned.

    What is minimised is the recipe's cost J, and with a teacher (z̄ its logits, z the network's)

        (1 − w)·J + w·τ²·mean KL( softmax(z̄/τ) ‖ softmax(z/τ) )        (arXiv 1503.02531)

    Args:
        model: a classifier that `anatomy` can read; with `remove` before its cut, else what `crop`
            returned.
        data: as the network is to see them: `data.standardised()` where it does not do it itself.
        remove: the layers to fade out and cut, counted through all stages.
        fade: the part of the training in which they fade out; 0: they are cut before it.
        teacher: usually the network before the cut; it is left as it is.
        teacher_learns: whether a copy of the teacher learns beside, on the same batches, its own
            mean cross-entropy added to the cost: for a teacher that was trained on other data.
        teacher_weight: w, from 0 to 1.
        temperature: τ > 0.
        recipe: epochs, learning rate and all else of the training; by default one epoch of AdamW at
            3e-4 without stage cost. What it says of data and network is not read.
        quiet: no progress on stderr.

    Returns:
        The healed network, on the device and in the mode of the one given.

    Raises:
        InputError: settings out of range, or data, network and teacher that do not go together.
        RunError: the loss is not finite.
    """
    name = type(model).__name__
    if not isinstance(data, DataSet):
        raise InputError(
            f"data is {type(data).__name__}; expected a DataSet, by "
            "deeplimit.data.load_dataset('cifar10') or made of your own splits"
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise InputError(
            f"every parameter of this {name} is frozen; call requires_grad_() on what is to be "
            "trained"
        )
    gone = tuple(sorted(layer_numbers(remove)))
    anatomy(model).check_removable(gone)
    recipe = recipe or Recipe(
        data=data.name, model=name, epochs=1, learning_rate=3e-4, weight_decay=0.0, stage_cost=0.0
    )
    recipe = place(recipe)
    teaching = None
    if teacher is not None:
        check_teaching(teacher_weight, temperature)
        teaching = Teaching(teacher, teacher_weight, temperature, teacher_learns)
    sample = to_device(next(iter(evaluation_batches(data.train.take(1))))[0], device_of(model))
    for network in (model, teacher or model):
        check_model(network, sample, data, name, replace(recipe, data=data.name))
    fading = _fade(gone, fade)
    begun = copy.deepcopy(model) if fading else crop(model, remove=gone)
    start = Start(recipe, data, begun.cpu(), teaching, fading)
    healed = fit(launched(start), start, title=f"{name} on {data.name}", quiet=quiet).end()
    healed = crop(healed, remove=gone if fading else ()).to(device_of(model))
    return healed.train(model.training)


def _fade(layers: tuple[int, ...], part: float) -> Fade | None:
    if not 0 <= part <= 1:
        raise InputError(f"fade is {part}; expected a part of the training, from 0 to 1")
    return Fade(layers, part) if part and layers else None


def heal_run(
    folder: RunFolder,
    *,
    epochs: int = 1,
    learning_rate: float | None = None,
    teacher: Literal["full", "beside", "none"] = "full",
    teacher_weight: float = 0.5,
    temperature: float = 2.0,
    fade: float | None = None,
    quiet: bool = False,
) -> Healing:
    """Heals a run's cut by its own recipe; writes healed.safetensors (or healed/) and heal.json.

    While it goes on, RUN/heal holds its checkpoints; it is gone at the end.

    Args:
        folder: a run that was cut.
        epochs: passes over the training data.
        learning_rate: the largest of the one-cycle schedule; by default a tenth of the run's.
        teacher: "full", the network before the cut; "beside", the same while it learns too, on the
            same batches, for a network that was trained on other data than the run's; or "none".
        teacher_weight: w.
        temperature: τ.
        fade: the part of the training in which the full network's layers fade out, 0.45 by default;
            0: the cut one is trained, as a bridged one always is.
        quiet: no progress on stderr.

    Raises:
        InputError: settings out of range, a run without a cut, or a bridged one that is to fade.
        RunError, KeyboardInterrupt: as `train`.
    """
    check_healing(epochs, teacher_weight, temperature, fade or 0.0)
    cut = folder.cut()
    folder.cropped()  # says what to do where there is none
    if cut is None or not cut.removed:
        raise InputError(
            f"{folder.path}: its cut removed no layer, so there is nothing to heal; cut to fewer "
            f"layers: deeplimit crop {folder.path} --to K"
        )
    if cut.bridge is not None and fade:
        raise InputError(
            f"{folder.path}: its cut is bridged: what the layers did stands in other weights "
            "already, and they cannot fade out; leave fade out, or cut without bridge"
        )
    if fade is None:
        fade = FADE if cut.bridge is None else 0.0
    rate = folder.recipe.learning_rate / GENTLER if learning_rate is None else learning_rate
    weight = 0.0 if teacher == "none" else teacher_weight
    plan = Plan(cut.removed, teacher, weight, temperature, epochs, rate, fade)
    _recipe(folder, plan)
    data = run_data(folder)
    underway = folder.path / UNDERWAY
    with alone(folder.path):
        shutil.rmtree(underway, ignore_errors=True)
        underway.mkdir()
        write_text(underway / PLAN, json.dumps(to_plain(plan)) + "\n")
        return _heal(folder, plan, data, quiet=quiet)


def check_healing(epochs: int, teacher_weight: float, temperature: float, fade: float) -> None:
    """Raises InputError for settings of `heal_run` that are out of range."""
    if epochs < 1:
        raise InputError(f"epochs is {epochs}; expected at least 1")
    check_teaching(teacher_weight, temperature)
    _fade((), fade)


def resume_heal(
    run: RunFolder | str | Path, *, quiet: bool = False, trust: bool = False
) -> Healing:
    """Goes on with a healing that was stopped, to the same result as an unbroken one.

    Raises:
        InputError: none was stopped, the run was cut otherwise since, or its recipe names code
            and `trust` does not say that it may be run.
    """
    folder = run if isinstance(run, RunFolder) else RunFolder.open(run, trust=trust)
    path = folder.path
    file = path / UNDERWAY / PLAN
    if not file.is_file():
        raise InputError(f"{path}: no healing was stopped; start one: deeplimit heal {path}")
    plan = read_record(Plan, file, f"start again: deeplimit heal {path}")
    cut = folder.cut()
    if cut is None or cut.removed != plan.removed:
        raise InputError(
            f"{folder.path}: cut otherwise since its healing was stopped; start again: "
            f"deeplimit heal {path}"
        )
    with alone(path):
        return _heal(folder, plan, run_data(folder), quiet=quiet)


def _recipe(folder: RunFolder, plan: Plan) -> Recipe:
    """The run's own, shorter and gentler, in one process."""
    recipe = folder.recipe
    if recipe.gradient == "adjoint" and anatomy(folder.cropped()).horizon == 0:
        recipe = replace(recipe, gradient="backprop", evaluations=Recipe.evaluations, bits=0)
    rate = plan.learning_rate
    recipe = replace(recipe, epochs=plan.epochs, learning_rate=rate, cut_while_training=0)
    return alone_in("deeplimit heal", recipe)


def trained_and_cut(
    start: Start, place: Path, *, title: str, command: str, quiet: bool
) -> nn.Module:
    """Trains in a folder of its own, from its last checkpoint; less the layers that faded out."""
    fabric = launched(start)
    healed = fit(fabric, start, place, title=title, command=command, quiet=quiet).end().eval()
    return crop(healed, remove=start.fade.layers) if start.fade else healed


def _heal(folder: RunFolder, plan: Plan, data: DataSet, *, quiet: bool) -> Healing:
    recipe, cut = _recipe(folder, plan), folder.cut()
    full, cropped = folder.model(), folder.cropped()
    teaching = None
    if plan.teacher != "none":
        learns = plan.teacher == "beside"
        teaching = Teaching(full, plan.teacher_weight, plan.temperature, learns=learns)
    begun = copy.deepcopy(full if plan.fade else cropped)
    start = Start(recipe, data, begun, teaching, _fade(plan.removed, plan.fade))
    layers = f"{anatomy(cropped).horizon} of {several(anatomy(full).horizon, 'layer')}"
    healed = trained_and_cut(
        start,
        folder.path / UNDERWAY,
        title=f"{folder.path}: healing {layers} on {recipe.data}",
        command=f"deeplimit heal {folder.path} --resume",
        quiet=quiet,
    )
    asked = None if cut is None else cut.tolerance
    if cut is not None and cut.choice is not None and cut.choice.budget == "rise":
        asked = cut.choice.limit
    most, device = tolerance_of(folder.recipe, data, asked), device_of(healed)
    healing = Healing(
        **vars(plan),
        from_full=compared(recipe, data, full.to(device), healed, most=most),
        from_cropped=compared(recipe, data, cropped.to(device), healed, most=most),
        parts=Parts.of(data),
    )
    with folder.commit() as new:
        new.write_healed(healed, plan.removed)
        new.write(healing)
        new.files.drop(UNDERWAY)
    return healing
