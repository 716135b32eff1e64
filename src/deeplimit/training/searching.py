"""The smallest depth at which a network keeps its answers, when it is healed on the way down."""

import copy
import json
import shutil
from dataclasses import replace

from torch import nn

from deeplimit._anatomy import anatomy
from deeplimit._anatomy.evaluation import device_of
from deeplimit.control import choose_cut, turnpike_profile
from deeplimit.data import DataSet
from deeplimit.errors import several
from deeplimit.files import write_text
from deeplimit.training.analysis import HEALED, allowed, usable_device, write_cut
from deeplimit.training.building import (
    Fade,
    Start,
    Teaching,
    compared,
    evaluation_batches,
    measure_of,
    run_data,
)
from deeplimit.training.healing import FADE, GENTLER, check_healing, trained_and_cut
from deeplimit.training.processes import alone_in, fitting_threads
from deeplimit.training.recipe import Recipe
from deeplimit.training.results import Cut, Parts, Tried
from deeplimit.training.run_files import alone
from deeplimit.training.run_folder import RunFolder

UNDERWAY, SETTINGS = "search", "settings.json"
WEIGHT, TEMPERATURE = 0.5, 2.0  # of the teacher, as by default in `heal_run`


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
    rate = own.learning_rate / GENTLER
    gentle = replace(own, epochs=epochs, learning_rate=rate, cut_while_training=0)
    recipe = alone_in("deeplimit crop --search", gentle)
    full, data = folder.model(), run_data(folder)
    most = allowed(own, data, accuracy=accuracy, rise=rise)
    settings = json.dumps({"epochs": epochs, "allowed": most}) + "\n"
    place = folder.path / UNDERWAY
    with alone(folder.path):
        if not (place / SETTINGS).is_file() or (place / SETTINGS).read_text() != settings:
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            write_text(place / SETTINGS, settings)
        horizon, fixed = anatomy(full).horizon, len(anatomy(full).fixed)
        kept, current, path = tuple(range(horizon)), full, list[Tried]()
        low, high = max(fixed, 1) - 1, horizon
        while high - low > 1:
            depth = (low + high) // 2
            gone = _chosen(current, recipe, data, depth)
            begun = copy.deepcopy(current).cpu()
            teaching, fade = Teaching(full, WEIGHT, TEMPERATURE), Fade(gone, FADE)
            start = Start(recipe, data, begun, teaching, fade)
            under = place / str(depth)
            under.mkdir(exist_ok=True)
            smaller = trained_and_cut(
                start,
                under,
                title=f"{folder.path}: depth {depth} of {several(horizon, 'layer')}",
                command="the same command",
                quiet=quiet,
            )
            full = full.to(device_of(smaller))
            report = compared(recipe, data, full, smaller, most=most, split=data.validation)
            left = tuple(n for i, n in enumerate(kept) if i not in gone)
            removed = tuple(n for n in range(horizon) if n not in left)
            path.append(Tried(removed, report))
            match report.verdict and report.verdict.word:
                case "kept":
                    kept, current, high = left, smaller, depth
                case "nothing learnt":  # by the full network, so by no other
                    break
                case _:
                    low = depth
        removed = tuple(n for n in range(horizon) if n not in kept)
        report = compared(recipe, data, full, current, most=most)
        tolerance = None if data.vocabulary else most
        cut = Cut(removed, tolerance, report, None, Parts.of(data), search=tuple(path))
        with folder.commit() as new:
            cut = write_cut(new, cut, current)
            new.files.drop(*HEALED, UNDERWAY)
    return cut


def _chosen(model: nn.Module, recipe: Recipe, data: DataSet, depth: int) -> tuple[int, ...]:
    """The layers that go where so many are to be kept."""
    model, validation = model.to(usable_device(recipe)), evaluation_batches(data.validation)
    loss = measure_of(recipe, data)
    with fitting_threads(recipe):
        profile = turnpike_profile(model, validation, loss)
        other = loss if data.vocabulary else None
        return choose_cut(model, profile, validation, loss=other, blocks=depth).removed
