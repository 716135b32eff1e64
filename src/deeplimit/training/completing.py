"""What follows a training: profile, cut, and the control that the recipe asks for."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_fabric import Fabric

from deeplimit.control import crop, turnpike_profile, verify_crop
from deeplimit.data import DataSet
from deeplimit.errors import InputError, RunError, several
from deeplimit.terminal import tell
from deeplimit.training.analysis import crop_run, profile_run, usable_device
from deeplimit.training.building import evaluation_batches, loss_of, prepare, run_data
from deeplimit.training.companions import together
from deeplimit.training.fit import launched, train_in
from deeplimit.training.lock import alone
from deeplimit.training.processes import first_process_does, launch
from deeplimit.training.recipe import Recipe
from deeplimit.training.results import Reference
from deeplimit.training.run_folder import RECIPE, RunFolder
from deeplimit.training.threads import fitting_threads


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
        _complete(folder, quiet)


def _complete(folder: RunFolder, quiet: bool) -> None:
    fabric = launch(folder.recipe)
    if folder.recipe.control == "none" and not fabric.is_global_zero:
        return
    data: DataSet | None = None

    def measure() -> bool:
        """Profile and cut; whether there is a control to train."""
        nonlocal data
        with folder.commit() as new:
            if new.profiles() is None or new.cut() is None:
                data = run_data(folder)
                if new.profiles() is None:
                    profile_run(new, data=data)
                crop_run(new, "auto", data=data)
            reference, cut = new.reference(), new.cut()
        known = reference is not None and cut is not None and reference.is_of(cut)
        return folder.recipe.control != "none" and not known

    try:
        if folder.recipe.control == "none":
            measure()
            return
        with together(f"deeplimit train --resume {folder.path} goes on"):
            if first_process_does(fabric, measure):
                _train_control(fabric, folder, data or run_data(folder), quiet)
    except KeyboardInterrupt as stop:
        going_on = f"stopped after the training; deeplimit train --resume {folder.path} goes on"
        stop.args = (str(stop) or going_on,)
        raise


def _train_control(fabric: Fabric, folder: RunFolder, data: DataSet, quiet: bool) -> None:
    """Trains both networks without stage cost; writes reference.json."""

    def shape() -> tuple[tuple[int, ...], tuple[int, ...]]:
        cropped: Any = folder.cropped()
        cut = folder.cut()
        return () if cut is None else cut.removed, cropped.architecture.depths

    removed, depth = first_process_does(fabric, shape)
    say = not quiet and fabric.is_global_zero
    if not removed:
        _tell(say, "Control: no layer was removed, so there is nothing to compare")
        return
    plain = replace(folder.recipe, stage_cost=0.0, stage_cost_layers=None, control="none")
    own = folder.path if folder.path.name not in ("", "..") else folder.path.resolve()
    full = _trained(
        plain,
        own.with_name(f"{own.name}-without-stage-cost"),
        folder,
        data,
        f"Control: the same network without stage cost, {several(plain.horizon, 'layer')}",
        quiet,
    )
    small = None
    if 0 in depth:
        _tell(say, "Control: a stage of the cut has no layer, so no such network is trained")
    else:
        small = _trained(
            replace(plain, depth=depth),
            own.with_name(f"{own.name}-plain-{'-'.join(map(str, depth))}"),
            folder,
            data,
            "Control: a network of the cut's depth without stage cost, "
            f"{several(sum(depth), 'layer')}",
            quiet,
        )
    first_process_does(fabric, lambda: _compare(folder, removed, full, small, data))


def _trained(
    recipe: Recipe, place: Path, of: RunFolder, data: DataSet, title: str, quiet: bool
) -> RunFolder:
    """The run of a recipe of the control, begun now or gone on with."""
    start = prepare(recipe, data)
    fabric = launched(start)
    folder = first_process_does(
        fabric,
        lambda: (
            _begun(recipe, place, of)
            or RunFolder.create(place.parent, place.name, recipe, data.class_names)
        ),
    )
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
    folder: RunFolder,
    removed: tuple[int, ...],
    full: RunFolder,
    small: RunFolder | None,
    data: DataSet,
) -> None:
    """Measures the control on test data; writes reference.json."""
    device, loss = usable_device(folder.recipe), loss_of(folder.recipe, data)
    with fitting_threads(folder.recipe):
        model = full.model().to(device)
        test = evaluation_batches(data.test)
        tolerance = folder.recipe.points / 100
        pairs = [(model, crop(model, remove=removed))]
        if small is not None:
            pairs.append((small.model().to(device), folder.cropped()))
        reports = [verify_crop(*pair, test, loss, tolerance=tolerance) for pair in pairs]
        reference = Reference(
            turnpike_profile(model, test, loss),
            reports[0],
            reports[1] if small is not None else None,
            removed,
        )
    folder.write_reference(reference)


def _tell(aloud: bool, message: str) -> None:
    if aloud:
        tell(message)
