"""Profile, cut, and the control of a cut: what is measured once a network is trained."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from lightning_fabric import Fabric
from torch import nn

from deeplimit._anatomy import Anatomy, anatomy
from deeplimit.control import (
    CutChoice,
    SoftCrossEntropy,
    bridge_of,
    choose_cut,
    crop,
    layers_to_remove,
    picture_trajectories,
    turnpike_profile,
    verify_crop,
)
from deeplimit.control.verdict import unchanged
from deeplimit.data import DataSet
from deeplimit.errors import InputError, RunError, several
from deeplimit.terminal import tell
from deeplimit.training.building import (
    evaluation_batches,
    loss_of,
    measure_of,
    prepare,
    run_data,
    tolerance_of,
)
from deeplimit.training.companions import together
from deeplimit.training.determinism import fitting_threads
from deeplimit.training.fit import launched, train_in
from deeplimit.training.processes import device_type, first_process_does, launch
from deeplimit.training.recipe import Recipe
from deeplimit.training.results import Cut, Parts, Profiles, Reference
from deeplimit.training.run_files import RECIPE, alone
from deeplimit.training.run_folder import RunFolder
from deeplimit.training.texts import WindowLoss

BRIDGED = 1024  # training samples, which a bridge is fitted on


def profile_run(folder: RunFolder, *, data: DataSet | None = None) -> Profiles:
    """Profiles a run's network on all three splits; writes profile.json and trajectories.json.

    The trajectories are those of test samples.

    Args:
        folder: a finished run.
        data: the run's data where it is loaded already.
    """
    return _profile(folder, folder.network or folder.model(), data or run_data(folder))


def _profile(folder: RunFolder, model: nn.Module, data: DataSet) -> Profiles:
    loss, picture = measure_of(folder.recipe, data), None
    model = model.to(usable_device(folder.recipe))
    with fitting_threads(folder.recipe):
        train, validation, test = (
            turnpike_profile(model, evaluation_batches(split), loss)
            for split in (data.train, data.validation, data.test)
        )
        if isinstance(loss, SoftCrossEntropy):  # tokens are too many classes to be drawn
            picture = picture_trajectories(model, evaluation_batches(data.test), loss)
    profiles = Profiles(train, validation, test)
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
    data: DataSet | None = None,
) -> Cut:
    """Cuts a run's network; writes cropped.safetensors (or cropped/) and crop.json.

    What is left out is chosen on validation data, what that costs is measured on test data, with
    the loss that was trained. Of a network of one stage "auto" leaves out what the validation
    profile says can go (`layers_to_remove`); of one with several stages, of a language model, or
    under a budget, layers of any place (`choose_cut`).

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
    model = folder.network or folder.model()
    structure = anatomy(model)
    layers = structure.horizon
    if to != "auto" and not (least := _least(structure)) <= to <= layers:
        raise InputError(
            f"a cut to {several(to, 'layer')}; the network has {layers}: give {least} … {layers}, "
            "auto"
        )
    data = data or run_data(folder)
    if (accuracy if data.vocabulary else rise) is not None:
        of, give = ("accuracy", "rise, nats") if data.vocabulary else ("rise", "accuracy, points")
        raise InputError(f"{of} given, which is not what {data.name} measures; give {give}")
    most = tolerance_of(folder.recipe, data, rise if data.vocabulary else accuracy)
    if to != "auto":
        return _cut(folder, model, data, range(to, layers), most, bridge=bridge)
    profiles = folder.profiles() or _profile(folder, model, data)
    return _cut_automatically(folder, model, data, profiles, most, budget, bridge=bridge)


def _cut_automatically(
    folder: RunFolder,
    model: nn.Module,
    data: DataSet,
    profiles: Profiles,
    most: float,
    budget: dict[str, Any],
    *,
    bridge: bool = False,
) -> Cut:
    """Cuts what the profiles say, within a tolerance or a budget."""
    structure, choice = anatomy(model), None
    if budget or structure.stages > 1 or data.vocabulary:
        with fitting_threads(folder.recipe):
            validation = evaluation_batches(data.validation)
            model = model.to(usable_device(folder.recipe))
            limit = budget or {"rise" if data.vocabulary else "accuracy": most}
            loss = WindowLoss() if data.vocabulary else None
            choice = choose_cut(model, profiles.validation, validation, loss=loss, **limit)
        removed = list(choice.removed)
    else:
        removed = _possible(structure, layers_to_remove(profiles.validation, most))
    tolerance = None if budget or data.vocabulary else most
    return _cut(folder, model, data, removed, most, tolerance, choice, bridge=bridge)


def _cut(
    folder: RunFolder,
    model: nn.Module,
    data: DataSet,
    removed: Iterable[int],
    most: float,
    tolerance: float | None = None,
    choice: CutChoice | None = None,
    *,
    bridge: bool = False,
) -> Cut:
    """Takes layers out, measures what that costs, writes both."""
    gone = tuple(removed)
    model = model.to(usable_device(folder.recipe))
    with fitting_threads(folder.recipe):
        fitted = None
        if bridge and gone:
            fitted = evaluation_batches(data.train.take(min(BRIDGED, len(data.train))))
        cropped = crop(model, remove=gone, bridge=fitted)
        loss, test = measure_of(folder.recipe, data), evaluation_batches(data.test)
        report = verify_crop(model, cropped, test, loss, tolerance=most)
    if not gone and report.verdict is not None:
        report = replace(report, verdict=unchanged(report.verdict))
    cut = Cut(gone, tolerance, report, choice, Parts.of(data), bridge_of(cropped))
    with folder.commit() as new:
        new.write_cropped(cropped, gone)
        new.write(cut)
    return cut


def _possible(structure: Anatomy, removed: Iterable[int]) -> list[int]:
    """Less the layers that a model cannot do without; of a model with blocks one at least stays."""
    possible = [n for n in removed if structure.layers[n].removable]
    try:
        structure.check_removable(possible)
    except InputError:
        return possible[1:]
    return possible


def _least(structure: Anatomy) -> int:
    """How many of the first layers have to stay when all behind them go."""
    layers = structure.horizon
    for least in range(layers):
        try:
            structure.check_removable(range(least, layers))
        except InputError:
            continue
        return least
    return layers


def usable_device(recipe: Recipe) -> torch.device:
    """The recipe's device where this machine has it, else the CPU."""
    usable = device_type(recipe) == "cpu" or torch.cuda.is_available()
    return torch.device(device_type(recipe) if usable else "cpu")


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
    with alone(folder.path):
        _complete(folder, quiet=quiet)


def _complete(folder: RunFolder, *, quiet: bool) -> None:
    fabric = launch(folder.recipe)
    if folder.recipe.control == "none" and not fabric.is_global_zero:
        return

    def measure() -> Cut | None:
        """Profiles and cuts; returns the cut if there is a control of it to train."""
        profiles, cut = folder.profiles(), folder.cut()
        if profiles is None or cut is None:
            model, data = folder.network or folder.model(), run_data(folder)
            with folder.commit() as new:
                profiles = profiles or _profile(new, model, data)
                most = tolerance_of(folder.recipe, data)
                cut = _cut_automatically(new, model, data, profiles, most, {})
        if folder.recipe.control == "none":
            return None
        reference = folder.reference()
        return None if reference is not None and reference.is_of(cut) else cut

    try:
        if folder.recipe.control == "none":
            measure()
            return
        with together(f"deeplimit train --resume {folder.path} goes on"):
            cut = first_process_does(fabric, measure)
            if cut is not None:
                _train_control(fabric, folder, cut, quiet=quiet)
    except KeyboardInterrupt as stop:
        going_on = f"stopped after the training; deeplimit train --resume {folder.path} goes on"
        stop.args = (str(stop) or going_on,)
        raise


def _train_control(fabric: Fabric, folder: RunFolder, cut: Cut, *, quiet: bool) -> None:
    """Trains both networks without stage cost; writes reference.json."""
    say = tell if not quiet and fabric.is_global_zero else _nothing
    if not cut.removed:
        say("Control: no layer was removed, so there is nothing to compare")
        return
    plain = replace(folder.recipe, stage_cost=0.0, stage_cost_layers=None, control="none")
    title = f"Control: the same network without stage cost, {several(plain.horizon, 'layer')}"
    full = _train_beside(folder, plain, "without-stage-cost", title, quiet=quiet)
    depth, small = first_process_does(fabric, lambda: _depth_of(folder.cropped())), None
    if 0 in depth:
        say("Control: a stage of the cut has no layer, so no such network is trained")
    else:
        small = _train_beside(
            folder,
            replace(plain, depth=depth),
            f"plain-{'-'.join(map(str, depth))}",
            "Control: a network of the cut's depth without stage cost, "
            f"{several(sum(depth), 'layer')}",
            quiet=quiet,
        )
    first_process_does(fabric, lambda: _compare(folder, cut.removed, full, small))


def _train_beside(
    of: RunFolder, recipe: Recipe, suffix: str, title: str, *, quiet: bool
) -> RunFolder:
    """The run of a recipe of the control, begun now or gone on with."""
    own = of.path if of.path.name not in ("", "..") else of.path.resolve()
    place, start = own.with_name(f"{own.name}-{suffix}"), prepare(recipe, run_data(of))
    fabric = launched(start)

    def folder_of_it() -> RunFolder:
        begun = _begun(recipe, place, of)
        names = start.data.class_names
        return begun or RunFolder.create(place.parent, place.name, recipe, names)

    folder = first_process_does(fabric, folder_of_it)
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
    data, device = run_data(folder), usable_device(folder.recipe)
    loss, test = loss_of(folder.recipe, data), evaluation_batches(data.test)
    with fitting_threads(folder.recipe):
        model = (full.network or full.model()).to(device)
        pairs = [(model, crop(model, remove=removed))]
        if small is not None:
            pairs.append(((small.network or small.model()).to(device), folder.cropped()))
        tolerance = folder.recipe.points / 100
        reports = [verify_crop(*pair, test, loss, tolerance=tolerance) for pair in pairs]
        reference = Reference(
            turnpike_profile(model, test, loss),
            reports[0],
            reports[1] if small is not None else None,
            removed,
        )
    folder.write(reference)


def _depth_of(cropped: Any) -> tuple[int, ...]:
    depths: tuple[int, ...] = cropped.architecture.depths
    return depths


def _nothing(_: str) -> None:
    """Says nothing."""
