"""What a trained network uses of its depth, and the cut that follows from it."""

from typing import Literal, cast

import torch

from deeplimit.control import (
    crop,
    picture_trajectories,
    removal,
    turnpike_profile,
    verify_crop,
)
from deeplimit.control.turnpike import ACCURACY_TOLERANCE
from deeplimit.data import DataSet
from deeplimit.errors import InputError
from deeplimit.training.building import Network, evaluation_batches, load_data, loss_of
from deeplimit.training.processes import device_type
from deeplimit.training.recipe import Recipe
from deeplimit.training.results import Cut, Profiles
from deeplimit.training.run_folder import RunFolder
from deeplimit.training.threads import fitting_threads


def profile_run(folder: RunFolder, *, data: DataSet | None = None) -> Profiles:
    """Profiles a run's network on all three splits; writes profile.json and trajectories.json.

    The trajectories are those of test samples.

    Args:
        folder: a finished run.
        data: the run's data where it is loaded already.
    """
    data = data or load_data(folder.recipe, folder.path.parent)
    loss = loss_of(folder.recipe, data)
    model = folder.model().to(_device(folder.recipe))
    with fitting_threads(folder.recipe):
        train, validation, test = (
            turnpike_profile(model, evaluation_batches(split), loss)
            for split in (data.train, data.validation, data.test)
        )
        picture = picture_trajectories(model, evaluation_batches(data.test), loss)
    profiles = Profiles(train, validation, test)
    folder.write_picture(picture)
    folder.write_profiles(profiles)
    return profiles


def crop_run(
    folder: RunFolder,
    to: int | Literal["auto"] = "auto",
    *,
    accuracy: float = ACCURACY_TOLERANCE,
    data: DataSet | None = None,
) -> Cut:
    """Cuts a run's network; writes cropped.safetensors and crop.json.

    What is left out is chosen on the validation profile, what that costs is measured on test data,
    with the loss that was trained.

    Args:
        folder: a finished run; it is profiled first if it has not been.
        to: how many layers to keep, or "auto": what the validation profile says can go.
        accuracy: with "auto", the fraction of accuracy that may be lost on validation data
            (`TurnpikeProfile.depth_within`).
        data: the run's data where it is loaded already.

    Raises:
        InputError: a depth that the network does not have, a tolerance outside 0 … 1, or a run that
            is not finished.
    """
    model = folder.model()
    layers = folder.recipe.horizon
    if to != "auto" and not 0 <= to <= layers:
        raise InputError(f"a cut to {to} layers; the network has {layers}: give 0 … {layers}, auto")
    if not 0 <= accuracy <= 1:
        raise InputError(
            f"{100 * accuracy:g} points of accuracy may be lost; give 0 … 100 points (in Python, "
            "accuracy = 0 … 1)"
        )
    data = data or load_data(folder.recipe, folder.path.parent)
    if to == "auto":
        profiles = folder.profiles() or profile_run(folder, data=data)
        removed = removal(profiles.validation, accuracy)
    else:
        removed = range(to, layers)
    model = model.to(_device(folder.recipe))
    cropped = crop(model, remove=removed)
    with fitting_threads(folder.recipe):
        report = verify_crop(
            model, cropped, evaluation_batches(data.test), loss_of(folder.recipe, data)
        )
    cut = Cut(tuple(removed), accuracy if to == "auto" else None, report)
    folder.write_cropped(cast(Network, cropped))
    folder.write_cut(cut)
    return cut


def _device(recipe: Recipe) -> torch.device:
    """The recipe's device where this machine has it, else the CPU."""
    usable = device_type(recipe) == "cpu" or torch.cuda.is_available()
    return torch.device(device_type(recipe) if usable else "cpu")
