"""Networks in a run folder: each kind is saved so that as little as possible is needed to load it.

NAME.safetensors  a network of deeplimit's own, with its architecture: `deeplimit.network.load`
NAME/             a model of transformers, by save_pretrained: plain transformers loads it
NAME.safetensors  any other model: its weights; what to load them into says the run's recipe
"""

import json
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from deeplimit._anatomy import anatomy
from deeplimit.data import Standardisation
from deeplimit.errors import InputError, describe_error
from deeplimit.files import whole
from deeplimit.network.storage import architecture_of, file_errors, load, save, write_weights
from deeplimit.network.weights import read_safetensors
from deeplimit.ode import untie
from deeplimit.reading import parse_json
from deeplimit.records import coerce
from deeplimit.training.library_models import quiet, transformers_model
from deeplimit.training.preprocessor import PREPROCESSOR, preprocessor
from deeplimit.training.run_folder import SUFFIX

REMOVED = "deeplimit.removed"


def save_network(
    model: nn.Module,
    place: Path,
    *,
    removed: Sequence[int] = (),
    standardisation: Standardisation | None = None,
) -> None:
    """Writes a network to `place`.safetensors or the folder `place`, whole or not at all.

    Between the removal of an old folder and the appearance of the new one there is none.

    Args:
        model: any network.
        place: a path without suffix.
        removed: the layers of the run's model that it lacks.
        standardisation: of its inputs, written beside a model of transformers as its
            preprocessor_config.json.

    Raises:
        RunError: the disk is full or cannot be written to.
    """
    if architecture_of(model) is not None:
        save(model, _file(place))
    elif of_transformers(model):
        _save_folder(model, place, standardisation)
    else:
        write_weights(model, _file(place), {REMOVED: json.dumps(list(removed))})


def load_network(place: Path, rebuild: Callable[[], nn.Module]) -> nn.Module:
    """What `save_network` wrote, on the CPU and in evaluation mode.

    Args:
        place: a path without suffix, at which there is a network.
        rebuild: makes the run's model again, whatever its weights; called where only weights were
            saved.

    Raises:
        InputError: it is damaged, or does not fit the model.
    """
    if place.is_dir():
        return transformers_model(str(place.resolve())).model.eval()
    path = _file(place)
    weights, metadata = read_safetensors(path, "train again, or put the file back")
    if REMOVED not in metadata:
        return load(path)
    model = rebuild()
    try:
        removed = coerce(tuple[int, ...], parse_json(metadata[REMOVED]), REMOVED)
        if removed:
            model = anatomy(model).without(set(removed))
        model.load_state_dict(weights)
    except Exception as error:  # a layer that is not there, another shape, damaged metadata
        raise InputError(
            f"{path}: not the weights of the model in recipe.toml ({describe_error(error)}); give "
            f"the "
            "run its own model back, or train again"
        ) from error
    return model.eval()


def _file(place: Path) -> Path:
    return place.with_name(place.name + SUFFIX)


def of_transformers(model: nn.Module) -> bool:
    """Of a class that plain transformers has; a user's subclass is not."""
    return type(model).__module__.startswith("transformers.") and hasattr(model, "save_pretrained")


def _save_folder(model: Any, place: Path, standardisation: Standardisation | None) -> None:
    if len([*model.parameters()]) < len([*model.named_parameters(remove_duplicate=False)]):
        model = untie(model)  # transformers writes no file in which layers share parameters
    with whole(place, folder=True) as aside:
        with quiet(import_module("transformers")), file_errors():
            model.save_pretrained(aside)
        if standardisation is not None:
            (aside / PREPROCESSOR).write_text(json.dumps(preprocessor(standardisation), indent=2))
