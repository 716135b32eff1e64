"""A model named on the command line: a run folder, a function of the user's, or a library's model.

runs/digits                 the network of a run, with its data and its loss
net:build                   what `build` in net.py returns
transformers:vit            a model type with its default config, a config.json, a folder, or a
                            name on the hub whose files are in the cache
torchvision:resnet50        untrained
timm:vit_small_patch16_224  untrained
network.safetensors         a network that deeplimit saved, or published weights of a CIFAR ResNet
"""

import os
import pkgutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deeplimit.errors import InputError, describe_error, did_you_mean
from deeplimit.network import CifarResNet, load
from deeplimit.training.library_models import LIBRARIES
from deeplimit.training.loaded_model import LoadedModel
from deeplimit.training.recipe import check_seed
from deeplimit.training.run_folder import RunFolder, as_vouched
from deeplimit.training.trust import Named, check_code

FORMS = (
    "a run folder, module:function, transformers:NAME, torchvision:NAME, timm:NAME or a "
    ".safetensors file of a network"
)


def load_model(
    spec: str,
    *,
    seed: int = 0,
    classes: int | None = None,
    new_head: bool = False,
    trust: bool = False,
) -> LoadedModel:
    """The model that a specification names; nothing is downloaded.

    A function that is given as `spec` is called; one that a run's recipe.toml names is not, unless
    `trust` says so (docs/trust.md).

    Args:
        spec: one of the forms above.
        seed: of the parameters that are drawn here; torch's own random state is left as it was.
        classes: asks a library for a classifier of images with so many classes.
        new_head: of a trained model of transformers with another number of classes.
        trust: whether code that a run folder names may be run.

    Raises:
        InputError: no such model, a seed out of range, a library that is not installed, a function
            that fails or returns something else, or code that is not trusted.
    """
    return load_named(Named.typed(spec), seed=seed, classes=classes, new_head=new_head, trust=trust)


def load_named(
    spec: str,
    *,
    seed: int = 0,
    classes: int | None = None,
    new_head: bool = False,
    trust: bool = False,
) -> LoadedModel:
    """The same for a recipe's model, whose code runs only if its mark says so (`Named`)."""
    check_seed(seed)
    source, colon, name = spec.partition(":")
    if source not in LIBRARIES and spec.endswith(".safetensors"):
        return _of_file(Path(spec))
    if not colon or Path(spec).is_dir():
        return _of_run(spec, trust or (isinstance(spec, Named) and spec.trust))
    if not source or not name:
        raise InputError(f"the model is {spec!r}; expected {FORMS}")
    with torch.random.fork_rng(devices=[]):
        module = None if source in LIBRARIES else _imported(spec, source, name)
        if source == "transformers" and Path(name).is_dir():
            name = str(as_vouched(Path(name)))
        torch.manual_seed(seed)  # only now: a module may draw numbers while it is imported
        if module is not None:
            return _of_function(spec, module, name)
        return LIBRARIES[source](name, classes, new_head=new_head)


def is_run(spec: str) -> bool:
    """Whether a specification is the path of a run folder, there or not."""
    return Path(spec).is_dir() or not (":" in spec or spec.endswith(".safetensors"))


def _of_file(path: Path) -> LoadedModel:
    """One of our networks by itself."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; the model is given as {FORMS}")
    path = as_vouched(path)
    try:
        model = load(path)
    except InputError as error:
        try:
            model = CifarResNet.from_weights(path)
        except InputError:
            raise error from None
    return LoadedModel(str(path), model.train(), "trained")


def _of_run(spec: str, trust: bool) -> LoadedModel:
    if not Path(spec).exists():
        raise InputError(f"{spec}: no such folder; the model is given as {FORMS}")
    run = RunFolder.open(spec, trust=trust)
    model = run.model().train()
    return LoadedModel(spec, model, "trained", run=run.path, standardisation=run.standardisation)


def _of_function(spec: str, module: Any, name: str) -> LoadedModel:
    """What the user's function returns: a model, (model, batch) or (model, batch, loss_of)."""
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


def _imported(spec: str, name: str, function: str) -> Any:
    """The user's module; the current folder is looked through as by `python -m`."""
    if not all(part.isidentifier() for part in name.split(".")):
        raise InputError(f"{spec!r} names no module and function; expected {FORMS}")
    check_code(spec, name)
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return pkgutil.resolve_name(f"{name}:")
    except Exception as error:
        missing = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
        if missing is None or not f"{name}.".startswith(f"{missing}."):
            raise InputError(f"{name} cannot be imported: {describe_error(error)}") from error
        remedy = did_you_mean(name, LIBRARIES) or f"; expected {FORMS}"
        if name.endswith(".py"):
            remedy = f"; leave out .py: {name.removesuffix('.py')}:{function}"
        raise InputError(
            f"no module {name!r}, neither in this folder nor installed{remedy}"
        ) from error
