"""A short recovery of a cut network, with the full one as its teacher, or on the way to the cut."""

import copy
import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

from torch import nn

from deeplimit._anatomy import anatomy
from deeplimit._anatomy.checks import layer_numbers
from deeplimit._anatomy.evaluation import device_of, to_device
from deeplimit.control import Distillation, StageCost, crop
from deeplimit.control.distillation import check_teaching
from deeplimit.data import DataSet
from deeplimit.errors import InputError, several
from deeplimit.files import remove, write_text
from deeplimit.records import read_record, to_plain
from deeplimit.training import building
from deeplimit.training.analysis import HEALED, allowed, chosen, write_cut
from deeplimit.training.building import Fade, Start, compared, evaluation_batches, run_data
from deeplimit.training.fit import fit, launched
from deeplimit.training.given_model import check_model
from deeplimit.training.processes import alone_in, place, usable_device
from deeplimit.training.recipe import Recipe
from deeplimit.training.results import Cut, Healing, Parts, Plan, Tried
from deeplimit.training.run_files import alone
from deeplimit.training.run_folder import RunFolder

UNDERWAY, PLAN = "heal", "plan.json"
SEARCH, SETTINGS = "search", "settings.json"
FADE = 0.45  # of the training; see benchmarks/results/pretrained_budget.json
GENTLER = 10  # how much smaller than the run's the learning rate is by default
WEIGHT, TEMPERATURE = 0.5, 2.0  # of the teacher


def heal(
    model: nn.Module,
    data: DataSet,
    *,
    remove: Iterable[int] = (),
    fade: float = FADE,
    teacher: nn.Module | None = None,
    teacher_learns: bool = False,
    teacher_weight: float = WEIGHT,
    temperature: float = TEMPERATURE,
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
    if not isinstance(data, DataSet):  # such as the loader that everything else takes
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
    objective = _taught(teacher, teacher_weight, temperature, learns=teacher_learns)
    sample = to_device(next(iter(evaluation_batches(data.train.take(1))))[0], device_of(model))
    for network in (model, teacher or model):
        check_model(network, sample, data, name, replace(recipe, data=data.name))
    fading = _fade(gone, fade)
    begun = copy.deepcopy(model) if fading else crop(model, remove=gone)
    start = Start(recipe, data, begun.cpu(), objective, fading)
    healed = _trained_and_cut(start, None, title=f"{name} on {data.name}", quiet=quiet)
    return healed.to(device_of(model)).train(model.training)


def _taught(
    teacher: nn.Module | None,
    weight: float = WEIGHT,
    temperature: float = TEMPERATURE,
    *,
    learns: bool = False,
) -> Callable[..., StageCost]:
    """The objective of a training with a teacher, or without."""
    if teacher is None:
        return StageCost
    check_teaching(weight, temperature)
    return partial(
        Distillation,
        teacher=teacher,
        teacher_weight=weight,
        temperature=temperature,
        learns=learns,
    )


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
    teacher_weight: float = WEIGHT,
    temperature: float = TEMPERATURE,
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
    run_data(folder)  # read, or refused, before anything is written
    with alone(folder.path):
        _begin(folder.path / UNDERWAY / PLAN, json.dumps(to_plain(plan)) + "\n")
        return _heal(folder, plan, cut, quiet=quiet)


def _begin(file: Path, settings: str) -> None:
    """Empties the folder in which a training is going on, and writes its settings there."""
    remove(file.parent)
    file.parent.mkdir()
    write_text(file, settings)


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
        return _heal(folder, plan, cut, quiet=quiet)


def _recipe(folder: RunFolder, plan: Plan) -> Recipe:
    """The run's own, shorter and gentler, in one process."""
    recipe = folder.recipe
    if recipe.gradient == "adjoint" and anatomy(folder.cropped()).horizon == 0:
        recipe = replace(recipe, gradient="backprop", evaluations=Recipe.evaluations, bits=0)
    return _gentle("deeplimit heal", recipe, plan.epochs, plan.learning_rate)


def _gentle(verb: str, recipe: Recipe, epochs: int, learning_rate: float) -> Recipe:
    changed = replace(recipe, epochs=epochs, learning_rate=learning_rate, cut_while_training=0)
    return alone_in(verb, changed)


def _trained_and_cut(
    start: Start, place: Path | None, *, title: str, command: str = "", quiet: bool
) -> nn.Module:
    """Trains, in a folder from its last checkpoint; less the layers that faded out."""
    fabric = launched(start)
    healed = fit(fabric, start, place, title=title, command=command, quiet=quiet).end().eval()
    return crop(healed, remove=start.fade.layers) if start.fade else healed


def _heal(folder: RunFolder, plan: Plan, cut: Cut, *, quiet: bool) -> Healing:
    recipe, data = _recipe(folder, plan), run_data(folder)
    full, cropped = folder.model(), folder.cropped()
    teacher, learns = None if plan.teacher == "none" else full, plan.teacher == "beside"
    objective = _taught(teacher, plan.teacher_weight, plan.temperature, learns=learns)
    begun = copy.deepcopy(full if plan.fade else cropped)
    start = Start(recipe, data, begun, objective, _fade(plan.removed, plan.fade))
    layers = f"{anatomy(cropped).horizon} of {several(anatomy(full).horizon, 'layer')}"
    healed = _trained_and_cut(
        start,
        folder.path / UNDERWAY,
        title=f"{folder.path}: healing {layers} on {recipe.data}",
        command=f"deeplimit heal {folder.path} --resume",
        quiet=quiet,
    )
    by_rise = cut.choice is not None and cut.choice.budget == "rise"
    asked = cut.choice.limit if cut.choice is not None and by_rise else cut.tolerance
    most, device = building.tolerance_of(folder.recipe, data, asked), device_of(healed)
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


def search_run(
    folder: RunFolder,
    *,
    epochs: int = 1,
    accuracy: float | None = None,
    rise: float | None = None,
    quiet: bool = False,
) -> Cut:
    """Cuts a run's network to the smallest depth that is kept, healing it on the way down.

    From the last network that was kept layers are chosen by their number (`choose_cut`). They fade
    out while it trains as in `heal_run`, with the full network as its teacher. What is left is
    judged against the full network on validation data (`verify_crop`). The depths are a bisection:
    half of the layers, half of these, … while the verdict is "kept", then between the last that was
    and the first that was not. Of N layers that takes 1 + log₂ N trainings at most, of ever smaller
    networks, and one layer at a time up to N. It counts on no depth being kept below one that was
    not. What is found is judged on test data, once.

    Writes cropped.safetensors (or cropped/), the healed network, and crop.json with the path. While
    it goes on RUN/search holds the checkpoints of every depth. Called again with the same settings
    it goes on from there, to the same result as an unbroken one.

    Args:
        folder: a finished run.
        epochs: passes over the training data at each depth.
        accuracy: the fraction of accuracy that may be lost; by default what the recipe says.
        rise: the same of a language model, in place of accuracy: nats a token.
        quiet: no progress on stderr.

    Raises:
        InputError: settings out of range, or a run that is not finished.
        RunError, KeyboardInterrupt: as `train`.
    """
    check_healing(epochs, WEIGHT, TEMPERATURE, FADE)
    own = folder.recipe
    recipe = _gentle("deeplimit crop --search", own, epochs, own.learning_rate / GENTLER)
    full, data = folder.model(), run_data(folder)
    most = allowed(own, data, accuracy=accuracy, rise=rise)
    settings = json.dumps({"epochs": epochs, "allowed": most}) + "\n"
    file, removed, current, path = folder.path / SEARCH / SETTINGS, set[int](), full, list[Tried]()
    with alone(folder.path):
        if not file.is_file() or file.read_text() != settings:
            _begin(file, settings)
        horizon, fixed = anatomy(full).horizon, len(anatomy(full).fixed)
        low, high = max(fixed, 1) - 1, horizon
        while high - low > 1:
            depth = (low + high) // 2
            current = current.to(usable_device(recipe))
            gone = chosen(current, recipe, data, blocks=depth).removed
            begun = copy.deepcopy(current).cpu()
            start = Start(recipe, data, begun, _taught(full), Fade(gone, FADE))
            under = file.with_name(str(depth))
            under.mkdir(exist_ok=True)
            smaller = _trained_and_cut(
                start,
                under,
                title=f"{folder.path}: depth {depth} of {several(horizon, 'layer')}",
                command="the same command",
                quiet=quiet,
            )
            full = full.to(device_of(smaller))
            report = compared(recipe, data, full, smaller, most=most, split=data.validation)
            left = [n for n in range(horizon) if n not in removed]
            more = removed.union(left[i] for i in gone)
            path.append(Tried(tuple(sorted(more)), report))
            match report.verdict and report.verdict.word:
                case "kept":
                    removed, current, high = more, smaller, depth
                case "nothing learnt":  # by the full network, so by no other
                    break
                case _:
                    low = depth
        report = compared(recipe, data, full, current, most=most)
        tolerance = None if data.vocabulary else most
        gone = tuple(sorted(removed))
        cut = Cut(gone, tolerance, report, None, Parts.of(data), search=tuple(path))
        with folder.commit() as new:
            cut = write_cut(new, cut, current)
            new.files.drop(*HEALED, SEARCH)
    return cut
