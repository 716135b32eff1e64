"""A model by its specification, and networks as a run folder keeps them.

net:build                   what `build` in net.py returns
transformers:vit            a model type with its default config, a config.json, a folder, or a
                            name on the hub whose files are in the cache
torchvision:resnet50        untrained
timm:vit_small_patch16_224  untrained
network.safetensors         a network that deeplimit saved, or published weights of a CIFAR ResNet

A run folder keeps each kind so that as little as possible is needed to load it:

NAME.safetensors  a network of deeplimit's own, with its architecture: `deeplimit.network.load`
NAME/             a model of transformers, by save_pretrained: plain transformers loads it
NAME.safetensors  any other model: its weights; the run's recipe names the model they belong to
"""

import json
import os
import pkgutil
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deeplimit._anatomy import anatomy
from deeplimit.data import Standardisation
from deeplimit.errors import InputError, describe_error, did_you_mean
from deeplimit.files import whole
from deeplimit.network import CifarResNet, load
from deeplimit.network.storage import architecture_of, file_errors, save, write_weights
from deeplimit.network.weights import read_safetensors
from deeplimit.ode import untie
from deeplimit.reading import parse_json
from deeplimit.records import coerce
from deeplimit.training import library_models
from deeplimit.training.library_models import IMAGES, LoadedModel, transformers_model
from deeplimit.training.run_files import SUFFIX, as_vouched
from deeplimit.training.specification import LIBRARIES, check_code

REMOVED = "deeplimit.removed"


def load_single(
    spec: str,
    *,
    seed: int = 0,
    classes: int | None = None,
    new_head: bool = False,
    task: str = IMAGES,
) -> LoadedModel:
    """Loads the model of a specification that `check_single` has seen, but for a run folder's."""
    source, _, name = spec.partition(":")
    if source not in LIBRARIES and spec.endswith(SUFFIX):
        return _of_file(as_vouched(Path(spec)))
    with torch.random.fork_rng(devices=[]):
        module = None if source in LIBRARIES else _imported(spec, source)
        torch.manual_seed(seed)  # only now: a module may draw numbers while it is imported
        if module is not None:
            return _of_function(spec, module, name)
        if source != "transformers":
            return library_models.other_model(source, name, classes)
        name = str(as_vouched(Path(name))) if Path(name).is_dir() else name
        return transformers_model(name, classes, new_head=new_head, task=task)


def _of_file(path: Path) -> LoadedModel:
    """One of our networks by itself."""
    try:
        model = load(path)
    except InputError as error:
        try:
            model = CifarResNet.from_weights(path)
        except InputError:
            raise error from None
    return LoadedModel(str(path), model.train(), "trained")


def _of_function(spec: str, module: Any, name: str) -> LoadedModel:
    """Calls the user's function for a model, (model, batch) or (model, batch, loss_of)."""
    found = getattr(module, name, None)
    if not callable(found):
        if found is not None:
            raise InputError(f"{spec} is of type {type(found).__name__}; expected a function")
        source = module.__name__
        raise InputError(f"{source} has no function {name!r}{did_you_mean(name, vars(module))}")
    try:
        made = found() if not isinstance(found, nn.Module) else found
    except Exception as error:
        raise InputError(f"{spec} raised {describe_error(error)}") from error
    parts: tuple[Any, ...] = made if isinstance(made, tuple) else (made,)
    model, batch, loss_of = (*parts, None, None, None)[:3]
    if (
        not isinstance(model, nn.Module)
        or len(parts) > 3
        or not (loss_of is None or callable(loss_of))
    ):
        given = ", ".join(type(part).__name__ for part in parts)
        raise InputError(
            f"{spec} returned {f'({given})' if isinstance(made, tuple) else given}; expected a "
            "model, (model, batch) or (model, batch, loss_of), with loss_of(model, batch) a scalar"
        )
    return LoadedModel(spec, model, "as the function returned them", None, batch, loss_of)


def _imported(spec: str, name: str) -> Any:
    """The user's module; the current folder is looked through as by `python -m`."""
    check_code(spec, name)
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return pkgutil.resolve_name(f"{name}:")
    except Exception as error:
        raise InputError(f"{name} cannot be imported: {describe_error(error)}") from error


def save_network(
    model: nn.Module,
    place: Path,
    *,
    removed: Sequence[int] = (),
    standardisation: Standardisation | None = None,
    tokenizer: str | None = None,
) -> None:
    """Writes any network to `place`.safetensors or the folder `place`, whole or not at all.

    Of a model of transformers the standardisation of its inputs and the tokenizer in a folder are
    written beside it; of one that is not ours to build, which layers of the run's it lacks.
    """
    if architecture_of(model) is not None:
        save(model, _file(place))
    elif of_transformers(model):
        _save_folder(model, place, standardisation, tokenizer)
    else:
        write_weights(model, _file(place), {REMOVED: json.dumps(list(removed))})


def load_network(place: Path, rebuild: Callable[[], nn.Module]) -> nn.Module:
    """Loads what `save_network` wrote, on the CPU and in evaluation mode.

    Where only weights were saved `rebuild` makes the run's model again, whatever its weights.

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
            "the run its own model back, or train again"
        ) from error
    return model.eval()


def _file(place: Path) -> Path:
    return place.with_name(place.name + SUFFIX)


def keeps_any_depth(model: nn.Module) -> bool:
    """Says whether a run folder can store the model with another number of layers."""
    return architecture_of(model) is not None or of_transformers(model)


def of_transformers(model: nn.Module) -> bool:
    """Of a class that plain transformers has; a user's subclass is not."""
    return type(model).__module__.startswith("transformers.") and hasattr(model, "save_pretrained")


def _save_folder(
    model: Any, place: Path, standardisation: Standardisation | None, tokenizer: str | None
) -> None:
    if len([*model.parameters()]) < len([*model.named_parameters(remove_duplicate=False)]):
        model = untie(model)  # transformers writes no file in which layers share parameters
    with whole(place, folder=True) as aside:
        with library_models.quiet(hf := import_module("transformers")), file_errors():
            model.save_pretrained(aside)
            if tokenizer is not None:
                where: Any = {"local_files_only": True, "trust_remote_code": False}
                hf.AutoTokenizer.from_pretrained(tokenizer, **where).save_pretrained(aside)
        if standardisation is not None:
            said = json.dumps(library_models.preprocessor(standardisation), indent=2)
            (aside / library_models.PREPROCESSOR).write_text(said)
