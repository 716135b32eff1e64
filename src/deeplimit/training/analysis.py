"""What a trained network uses of its depth, and the cut that follows from it."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal

import torch

from deeplimit.control import (
    bridge_of,
    choose_cut,
    crop,
    layers_to_remove,
    picture_trajectories,
    turnpike_profile,
    verify_crop,
)
from deeplimit.control.verdict import check_tolerance, unchanged
from deeplimit.data import DataSet
from deeplimit.errors import InputError, several
from deeplimit.network import Anatomy, anatomy
from deeplimit.training.building import evaluation_batches, loss_of, run_data
from deeplimit.training.processes import device_type
from deeplimit.training.recipe import Recipe
from deeplimit.training.results import Cut, Parts, Profiles
from deeplimit.training.run_folder import RunFolder
from deeplimit.training.threads import fitting_threads

BRIDGED = 1024  # training samples, which a bridge is fitted on


def profile_run(folder: RunFolder, *, data: DataSet | None = None) -> Profiles:
    """Profiles a run's network on all three splits; writes profile.json and trajectories.json.

    The trajectories are those of test samples.

    Args:
        folder: a finished run.
        data: the run's data where it is loaded already.
    """
    data = data or run_data(folder)
    loss = loss_of(folder.recipe, data)
    model = folder.model().to(usable_device(folder.recipe))
    with fitting_threads(folder.recipe):
        train, validation, test = (
            turnpike_profile(model, evaluation_batches(split), loss)
            for split in (data.train, data.validation, data.test)
        )
        picture = picture_trajectories(model, evaluation_batches(data.test), loss)
    profiles = Profiles(train, validation, test)
    with folder.commit() as new:
        new.write_picture(picture)
        new.write_profiles(profiles)
    return profiles


def crop_run(
    folder: RunFolder,
    to: int | Literal["auto"] = "auto",
    *,
    accuracy: float | None = None,
    blocks: int | None = None,
    multiply_adds: float | None = None,
    latency: float | None = None,
    bridge: bool = False,
    data: DataSet | None = None,
) -> Cut:
    """Cuts a run's network; writes cropped.safetensors (or cropped/) and crop.json.

    What is left out is chosen on validation data, what that costs is measured on test data, with
    the loss that was trained. Of a network of one stage "auto" leaves out what the validation
    profile says can go (`removal`); of one with several stages, or under a budget, layers of any
    place (`choose_cut`).

    Args:
        folder: a finished run; it is profiled first if it has not been.
        to: how many layers to keep, the first so many; or "auto".
        accuracy: the fraction of accuracy that may be lost: with "auto" on validation data
            (`TurnpikeProfile.depth_within`), and on test data for the verdict. By default what the
            recipe says.
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
    model = folder.model()
    structure = anatomy(model)
    layers = structure.horizon
    if to != "auto" and not (least := _least(structure)) <= to <= layers:
        raise InputError(
            f"a cut to {several(to, 'layer')}; the network has {layers}: give {least} … {layers}, "
            "auto"
        )
    accuracy = check_tolerance(folder.recipe.points / 100 if accuracy is None else accuracy)
    data = data or run_data(folder)
    if to == "auto":
        profiles = folder.profiles() or profile_run(folder, data=data)
    choice = None
    model = model.to(usable_device(folder.recipe))
    if to == "auto" and (budget or structure.stages > 1):
        limit: dict[str, Any] = budget or {"accuracy": accuracy}
        with fitting_threads(folder.recipe):
            validation = evaluation_batches(data.validation)
            choice = choose_cut(model, profiles.validation, validation, **limit)
        removed = list(choice.removed)
    elif to == "auto":
        removed = _possible(structure, layers_to_remove(profiles.validation, accuracy))
    else:
        removed = list(range(to, layers))
    with fitting_threads(folder.recipe):
        fitted = (
            evaluation_batches(data.train.take(min(BRIDGED, len(data.train))))
            if bridge and removed
            else None
        )
        cropped = crop(model, remove=removed, bridge=fitted)
        report = verify_crop(
            model,
            cropped,
            evaluation_batches(data.test),
            loss_of(folder.recipe, data),
            tolerance=accuracy,
        )
    if not removed and report.verdict is not None:
        report = replace(report, verdict=unchanged(report.verdict))
    tolerance = accuracy if to == "auto" and not budget else None
    cut = Cut(tuple(removed), tolerance, report, choice, Parts.of(data), bridge_of(cropped))
    with folder.commit() as new:
        new.write_cropped(cropped, cut.removed)
        new.write_cut(cut)
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
