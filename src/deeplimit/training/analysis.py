"""Profile, cut, and the control of a cut: what is measured once a network is trained."""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

from lightning_fabric import Fabric
from torch import nn

from deeplimit import control
from deeplimit._anatomy import Anatomy, anatomy
from deeplimit.control.depth_table import least_depth, removable
from deeplimit.control.verdict import unchanged
from deeplimit.data import DataSet
from deeplimit.errors import InputError, RunError, several
from deeplimit.terminal import tell
from deeplimit.training import building
from deeplimit.training.building import compared, evaluation_batches, run_data
from deeplimit.training.companions import together
from deeplimit.training.fit import launched, train_in
from deeplimit.training.processes import (
    first_process_does,
    fitting_threads,
    launch,
    usable_device,
)
from deeplimit.training.recipe import Recipe
from deeplimit.training.results import Cut, Parts, Profiles, Reference
from deeplimit.training.run_files import RECIPE, SUFFIX, alone
from deeplimit.training.run_folder import RunFolder

HEALED = ("healed", f"healed{SUFFIX}", "heal.json")
BRIDGED = 1024  # training samples, which a bridge is fitted on


def profile_run(folder: RunFolder, *, data: DataSet | None = None) -> Profiles:
    """Profiles a run's network on all three splits; writes profile.json and trajectories.json.

    The profile of test data says what each depth costs, and which one validation data recommend,
    within what the recipe says may be lost. The trajectories are those of test samples.

    Args:
        folder: a finished run.
        data: the run's data where it is loaded already.
    """
    data, recipe, picture = data or run_data(folder), folder.recipe, None
    model = (folder.network or folder.model()).to(usable_device(recipe))
    loss, most = building.measure_of(recipe, data), building.tolerance_of(recipe, data)
    with fitting_threads(recipe):
        train, validation = (
            control.turnpike_profile(model, evaluation_batches(split), loss)
            for split in (data.train, data.validation)
        )
        depth = validation.depth_within(**{"rise" if data.vocabulary else "accuracy": most})
        test = control.every_depth(model, evaluation_batches(data.test), loss, recommended=depth)
        if isinstance(loss, control.SoftCrossEntropy):  # tokens are too many classes to be drawn
            picture = control.picture_trajectories(model, evaluation_batches(data.test), loss)
        norms = control.control_norms(model) if recipe.control_cost else None
    profiles = Profiles(train, validation, test, norms)
    with folder.commit() as new:
        if picture is not None:
            new.write(picture)
        new.write(profiles)
    return profiles


def crop_run(
    folder: RunFolder,
    to: int | Literal["auto"] = "auto",
    *,
    accuracy: float | None = None,
    rise: float | None = None,
    blocks: int | None = None,
    multiply_adds: float | None = None,
    latency: float | None = None,
    bridge: bool = False,
    confidence: float | None = None,
    data: DataSet | None = None,
) -> Cut:
    """Cuts a run's network; writes cropped.safetensors (or cropped/) and crop.json.

    What is left out is chosen on validation data, what that costs is measured on test data, with
    the loss that was trained. Of a network of one stage "auto" leaves out what the validation
    profile says can go (`layers_to_remove`), and layers that are exactly the identity; of one with
    several stages, of a language model, or under a budget, layers of any place (`choose_cut`).

    Args:
        folder: a finished run; it is profiled first if it has not been.
        to: how many layers to keep, the first so many; or "auto".
        accuracy: the fraction of accuracy that may be lost: with "auto" on validation data
            (`TurnpikeProfile.depth_within`), and on test data for the verdict. By default what the
            recipe says.
        rise: the same of a language model, in place of accuracy: nats a token by which its loss may
            rise.
        blocks: with "auto", how many layers to keep, of any place.
        multiply_adds: with "auto", the fraction of the multiply-adds that is kept at most.
        latency: with "auto", the fraction of the latency that is kept at most.
        bridge: whether what the removed layers did is fitted on training data and folded into what
            stands before them (`crop`).
        confidence: with "auto", with which no more is lost than `accuracy`, or `rise`, allows
            (`choose_cut`). By default what the recipe says, if anything.
        data: the run's data where it is loaded already.

    Raises:
        InputError: a depth that the network does not have, a tolerance of half the accuracy or
            more, a budget that cannot be met, several of these, or a run that is not finished.
    """
    given = {"blocks": blocks, "multiply_adds": multiply_adds, "latency": latency}
    budget = {name: value for name, value in given.items() if value is not None}
    if budget and to != "auto":
        raise InputError(
            f"a cut to {several(to, 'layer')} and a budget of {', '.join(budget)}; give one"
        )
    if confidence is not None and (budget or to != "auto"):
        raise InputError(
            f"confidence {confidence:g} given, which is that of a loss allowed; leave it out, or "
            "leave out the depth or budget"
        )
    model = folder.network or folder.model()
    structure = anatomy(model)
    layers = structure.horizon
    if to != "auto" and not (least := least_depth(structure)) <= to <= layers:
        raise InputError(
            f"a cut to {several(to, 'layer')}; the network has {layers}: give {least} … {layers}, "
            "auto"
        )
    data, recipe = data or run_data(folder), folder.recipe
    most = allowed(recipe, data, accuracy=accuracy, rise=rise)
    choice = tolerance = fitted = None
    model = model.to(usable_device(recipe))
    if to != "auto":
        removed = tuple(range(to, layers))
    else:
        folder = replace(folder, network=model)
        profiles = folder.profiles() or profile_run(folder, data=data)
        confidence = recipe.confidence if confidence is None else confidence
        if budget or structure.stages > 1 or data.vocabulary or confidence is not None:
            quality = {"rise" if data.vocabulary else "accuracy": most, "confidence": confidence}
            limit: dict[str, Any] = budget or quality
            choice = chosen(model, recipe, data, profiles.validation, **limit)
            removed = choice.removed
        else:
            tail = control.layers_to_remove(profiles.validation, most)
            removed = _possible(structure, sorted({*tail, *control.vanished(model)}))
            if not removable(structure, removed):  # not all together with those of the middle
                removed = _possible(structure, tail)
        tolerance = None if budget or data.vocabulary else most
    if bridge and removed:
        fitted = evaluation_batches(data.train.take(min(BRIDGED, len(data.train))))
    with fitting_threads(recipe):
        cropped = control.crop(model, remove=removed, bridge=fitted)
    report = compared(recipe, data, model, cropped, most=most)
    cut = Cut(removed, tolerance, report, choice, Parts.of(data), control.bridge_of(cropped))
    with folder.commit() as new:
        cut = write_cut(new, cut, cropped)
        if new.healing() is None:  # of another cut
            new.files.drop(*HEALED)
    return cut


def chosen(
    model: nn.Module,
    recipe: Recipe,
    data: DataSet,
    profile: control.TurnpikeProfile | None = None,
    **limit: Any,
) -> control.CutChoice:
    """The cut of layers from any place that validation data choose within a limit."""
    loss, validation = building.measure_of(recipe, data), evaluation_batches(data.validation)
    with fitting_threads(recipe):
        profile = profile or control.turnpike_profile(model, validation, loss)
        tokens = loss if data.vocabulary else None
        return control.choose_cut(model, profile, validation, loss=tokens, **limit)


def allowed(recipe: Recipe, data: DataSet, *, accuracy: float | None, rise: float | None) -> float:
    """Returns what a cut may lose; InputError where another measure than the data's is limited."""
    if (accuracy if data.vocabulary else rise) is not None:
        told, of, give = ("rise", "its accuracy", "points")
        if data.vocabulary:
            told, of, give = ("points", "its loss", "rise, in nats a token")
        raise InputError(f"{told} given, but {data.name} is measured by {of}; give {give}")
    return building.tolerance_of(recipe, data, rise if data.vocabulary else accuracy)


def write_cut(new: RunFolder, cut: Cut, cropped: nn.Module) -> Cut:
    """Writes a cut and its network; where no layer went it is certain that nothing is lost."""
    verdict = cut.report.verdict
    if not cut.removed and verdict is not None:
        cut = replace(cut, report=replace(cut.report, verdict=unchanged(verdict)))
    new.write_cropped(cropped, cut.removed)
    new.write(cut)
    return cut


def _possible(structure: Anatomy, removed: Iterable[int]) -> tuple[int, ...]:
    """Less the layers that a model cannot do without; of a model with blocks one at least stays."""
    possible = tuple(n for n in removed if structure.layers[n].removable)
    return possible if removable(structure, possible) else possible[1:]


def complete(folder: RunFolder, *, quiet: bool = False) -> None:
    """Does for a trained run what was not done yet: profile, automatic cut, and its control.

    The control is two networks trained by the same recipe without stage cost, each in a run folder
    of its own beside the run's: NAME-without-stage-cost, as deep as the run's and cut alike, and
    NAME-plain-K, as deep as the cut. What they reach is the run's reference.json. A control that
    was stopped goes on where it was, to the same result; that of another cut is measured anew, with
    what is there of it.

    Args:
        folder: a run, trained; every process of its training calls this.
        quiet: no progress on stderr.

    Raises:
        RunError, KeyboardInterrupt: as `train`.
    """
    recipe, path = folder.recipe, folder.path

    def measure() -> Cut | None:
        """Profiles and cuts; returns the cut if there is a control of it to train."""
        profiles, cut = folder.profiles(), folder.cut()
        if profiles is None or cut is None:
            network, data = folder.network or folder.model(), run_data(folder)
            with replace(folder, network=network, data=data).commit() as new:
                if profiles is None:
                    profile_run(new)
                cut = cut or crop_run(new)
        if recipe.control == "none":
            return None
        reference = folder.reference()
        return None if reference is not None and reference.is_of(cut) else cut

    with alone(path):
        fabric = launch(recipe)
        if recipe.control == "none" and not fabric.is_global_zero:
            return
        try:
            if recipe.control == "none":
                measure()
                return
            with together(f"deeplimit train --resume {path} goes on"):
                cut = first_process_does(fabric, measure)
                if cut is not None:
                    _train_control(fabric, folder, cut, quiet=quiet)
        except KeyboardInterrupt as stop:
            going_on = f"stopped after the training; deeplimit train --resume {path} goes on"
            stop.args = (str(stop) or going_on,)
            raise


def _train_control(fabric: Fabric, folder: RunFolder, cut: Cut, *, quiet: bool) -> None:
    """Trains both networks without stage cost; writes reference.json."""
    speaks = not quiet and fabric.is_global_zero
    if not cut.removed:
        if speaks:
            tell("Control: no layer was removed, so there is nothing to compare")
        return
    plain = replace(folder.recipe, stage_cost=0.0, stage_cost_layers=None, control="none")
    title = f"Control: the same network without stage cost, {several(plain.horizon, 'layer')}"
    full, small = _train_beside(folder, plain, "without-stage-cost", title, quiet=quiet), None
    depth = first_process_does(fabric, lambda: cast(Any, folder.cropped()).architecture.depths)
    if 0 not in depth:
        layers = several(sum(depth), "layer")
        title = f"Control: a network of the cut's depth without stage cost, {layers}"
        suffix = f"plain-{'-'.join(map(str, depth))}"
        small = _train_beside(folder, replace(plain, depth=depth), suffix, title, quiet=quiet)
    elif speaks:
        tell("Control: a stage of the cut has no layer, so no such network is trained")
    first_process_does(fabric, lambda: _compare(folder, cut.removed, full, small))


def _train_beside(
    of: RunFolder, recipe: Recipe, suffix: str, title: str, *, quiet: bool
) -> RunFolder:
    """The run of a recipe of the control, begun now or gone on with."""
    own = of.path if of.path.name not in ("", "..") else of.path.resolve()
    place, start = own.with_name(f"{own.name}-{suffix}"), building.prepare(recipe, run_data(of))
    fabric = launched(start)
    made = partial(RunFolder.create, place.parent, place.name, recipe, start.data.class_names)
    folder = first_process_does(fabric, lambda: _begun(recipe, place, of) or made())
    title = f"{title} ({folder.path})"
    try:
        return train_in(fabric, start, folder, title=title, going_on=of.path, quiet=quiet)
    except RunError as error:
        done = f"of the run itself deeplimit report {of.path} writes the page"
        raise RunError(f"{folder.path}: {error}; {done}") from error


def _begun(recipe: Recipe, place: Path, of: RunFolder) -> RunFolder | None:
    """The run that a stopped control left: of this recipe, and younger than the run that it is of.

    An older one may be of a run that is gone, whose data were others.
    """
    born = (of.path / RECIPE).stat().st_mtime_ns
    found = None
    for path in (place, *sorted(place.parent.glob(f"{place.name}-[0-9]*"))):
        try:
            folder = RunFolder.open(path)
        except InputError:
            continue
        younger = (path / RECIPE).stat().st_mtime_ns >= born
        if younger and folder.recipe.with_absolute_paths() == recipe.with_absolute_paths():
            found = folder
    return found


def _compare(
    folder: RunFolder, removed: tuple[int, ...], full: RunFolder, small: RunFolder | None
) -> None:
    """Measures the control on test data; writes reference.json."""
    recipe, data, device = folder.recipe, run_data(folder), usable_device(folder.recipe)
    model, other = (full.network or full.model()).to(device), None
    report = compared(recipe, data, model, control.crop(model, remove=removed))
    if small is not None:
        plain = (small.network or small.model()).to(device)
        other = compared(recipe, data, plain, folder.cropped())
    with fitting_threads(recipe):
        profile = control.turnpike_profile(
            model, evaluation_batches(data.test), building.loss_of(recipe, data)
        )
    reference = Reference(profile, report, other, removed)
    folder.write(reference)
