"""Models of transformers, torchvision and timm, by name; nothing is downloaded."""

import json
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deeplimit.data import Standardisation
from deeplimit.errors import InputError
from deeplimit.memory import require
from deeplimit.training.loaded_model import LoadedModel, meant, told
from deeplimit.training.typed_values import conform

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
LARGEST_DEPTH = 10_000  # layers in a config; of more a network would be built until the memory ends
UNTRAINED = "random, untrained"

# With the head whose loss is its training's, where the model has one of these.
TASKS = ("IMAGE_CLASSIFICATION", "SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM", "CAUSAL_LM")
COPIES = 3  # of the parameters: themselves, their gradients, and the gradients compared with


def transformers_model(
    name: str, classes: int | None = None, *, new_head: bool = False
) -> LoadedModel:
    """A model type with its default config, a config.json, or a folder, on disk or cached.

    Args:
        name: which.
        classes: asks for a classifier of images into so many classes, in 32 bits; what is untrained
            gets a head for them.
        new_head: a trained head for another number of classes is replaced too.

    Raises:
        InputError: transformers is not installed, there is no such config, it cannot be built, or
            it is no classifier of images into so many classes.
    """
    hf = _library("transformers", "pip install 'deeplimit[hub]'")
    spec = f"transformers:{name}"
    with quiet(hf):
        config, folder = _config(hf, name)
        folder = folder if folder is not None and _has_weights(folder) else None
        if classes is None:
            kind = _model_class(hf, config)
        else:
            kind = _classifier_class(hf, config, spec)
            if folder is not None and not new_head:
                _check_head(config, kind, classes, spec)
            config.num_labels = classes
        build, weights = partial(kind, config), UNTRAINED
        if folder is not None:
            how = {"config": config, "ignore_mismatched_sizes": new_head, "local_files_only": True}
            build, weights = partial(kind.from_pretrained, folder, **how), "trained"
        model = _built(spec, build, partial(kind, config))
        model = model if classes is None else model.float()
        scale = None if folder is None else _standardisation(folder)
        return LoadedModel(spec, model, weights, standardisation=scale)


def torchvision_model(
    name: str, classes: int | None = None, *, new_head: bool = False
) -> LoadedModel:
    """An untrained model of torchvision; with `classes`, its head is for so many.

    Raises:
        InputError: torchvision cannot be imported, or has no such model.
    """
    models = _library("torchvision.models", "install the one that goes with your torch")
    if name not in models.list_models():
        raise InputError(f"torchvision has no model {name!r}{meant(name, models.list_models())}")
    head = {} if classes is None else {"num_classes": classes}
    spec, build = f"torchvision:{name}", partial(models.get_model, name, weights=None, **head)
    return LoadedModel(spec, _built(spec, build, build), UNTRAINED, input_shape=(3, 224, 224))


def timm_model(name: str, classes: int | None = None, *, new_head: bool = False) -> LoadedModel:
    """An untrained model of timm; with `classes`, its head is for so many.

    Raises:
        InputError: timm cannot be imported, or has no such model.
    """
    timm = _library("timm", "install the one that goes with your torch")
    if not timm.is_model(name):
        raise InputError(f"timm has no model {name!r}{meant(name, timm.list_models())}")
    head = {} if classes is None else {"num_classes": classes}
    spec, build = f"timm:{name}", partial(timm.create_model, name, pretrained=False, **head)
    model = _built(spec, build, build)
    settings: Any = getattr(model, "default_cfg", {})
    shape = tuple(settings.get("input_size", (3, 224, 224)))
    return LoadedModel(spec, model, UNTRAINED, input_shape=shape)


LIBRARIES: dict[str, Callable[..., LoadedModel]] = {
    "transformers": transformers_model,
    "torchvision": torchvision_model,
    "timm": timm_model,
}


def _library(name: str, remedy: str) -> Any:
    """Imported only now: these are not among what deeplimit needs."""
    try:
        return pkgutil.resolve_name(f"{name}:")
    except (ImportError, RuntimeError, OSError) as error:  # a build for another torch: the latter
        package = name.partition(".")[0]
        raise InputError(f"{package} cannot be imported ({told(error)}); {remedy}") from error


@contextmanager
def quiet(hf: Any) -> Iterator[None]:
    """Without the library's bars and remarks."""
    log = hf.utils.logging
    level, bar = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bar:
            log.enable_progress_bar()


def _config(hf: Any, name: str) -> tuple[Any, Path | None]:
    """The config, and the folder that may have weights beside it."""
    path = Path(name)
    if name in hf.CONFIG_MAPPING:
        return hf.AutoConfig.for_model(name), None
    if not path.exists():
        try:
            path = Path(hf.utils.cached_file(name, CONFIG, local_files_only=True)).parent
        except (OSError, ValueError) as error:
            raise InputError(
                f"transformers:{name}: no file or folder of that name, no model type"
                f"{meant(name, hf.CONFIG_MAPPING)}, and nothing in the hub's cache; fetch it first "
                f"(hf download {name}), or give a config.json"
            ) from error
    try:
        # Without an answer it asks at the terminal whether to run the folder's code.
        config = hf.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        _check_config(config)
    except Exception as error:  # transformers raises what the values lead it to
        raise InputError(
            f"{path}: no config of transformers ({told(error)}); expected a config.json with a "
            "model_type, or a folder that has one"
        ) from error
    return config, path if path.is_dir() else None


def _check_config(config: Any) -> None:
    """Before it is built: names that can be looked up, and no more layers than can be."""
    conform(tuple[str, ...] | None, config.architectures, "architectures")
    for name, value in config.to_dict().items():
        counts = value if isinstance(value, list | tuple) else [value]
        if "layer" in name or "depth" in name:
            for count in counts:
                if isinstance(count, int) and count > LARGEST_DEPTH:
                    raise InputError(f"{name} is {count:g}; expected at most {LARGEST_DEPTH}")


def _has_weights(folder: Path) -> bool:
    return any(any(folder.glob(form)) for form in ("*.safetensors", "pytorch_model*.bin"))


def _model_class(hf: Any, config: Any) -> Any:
    """The config's own class, or the first of its family that comes with a loss."""
    for name in config.architectures or ():
        kind = getattr(hf, name, None)
        if isinstance(kind, type) and issubclass(kind, hf.PreTrainedModel):
            return kind
    mappings = [getattr(hf, f"MODEL_FOR_{task}_MAPPING") for task in TASKS]
    for mapping in [*mappings, hf.MODEL_MAPPING]:
        found = mapping.get(type(config), None)
        if found is not None:
            return found[0] if isinstance(found, tuple) else found
    raise InputError(
        f"{type(config).__name__} belongs to no model of transformers that can be built by itself; "
        "give a model type such as gpt2 or vit"
    )


def _classifier_class(hf: Any, config: Any, spec: str) -> Any:
    """The config's own class where it classifies images, else that of its family which does."""
    for name in config.architectures or ():
        if "ForImageClassification" in name and hasattr(hf, name):
            return getattr(hf, name)
    found = hf.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING.get(type(config), None)
    if found is None:
        raise InputError(
            f"{spec} classifies no images: transformers has no such model for "
            f"{type(config).__name__}; give one for images, such as vit or dinov2. Other models "
            "are profiled and cut from Python: deeplimit.turnpike_profile, deeplimit.crop"
        )
    return found[0] if isinstance(found, tuple) else found


def _check_head(config: Any, kind: Any, classes: int, spec: str) -> None:
    """A head that was trained must be for the data's classes."""
    if kind.__name__ in (config.architectures or ()) and config.num_labels != classes:
        raise InputError(
            f"{spec} tells {config.num_labels} classes apart, the data has {classes}; give "
            "other data, or --new-head in deeplimit train to put a new head in its place"
        )


def _standardisation(folder: Path) -> Standardisation | None:
    """What the preprocessor_config.json beside the weights says, if there is one."""
    try:
        said = json.loads((folder / PREPROCESSOR).read_text(encoding="utf-8"))
        if not said.get("do_normalize", True):
            return None
        mean, std = (tuple(map(float, said[name])) for name in ("image_mean", "image_std"))
        return Standardisation(mean, std)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _built(spec: str, build: Callable[[], nn.Module], outline: Callable[[], nn.Module]) -> Any:
    """The model in training mode, if this machine has the memory for it.

    Raises:
        InputError: it has not, or the model cannot be built.
    """
    try:
        with torch.device("meta"):
            count = sum(p.numel() for p in outline().parameters())
        require(
            COPIES * 4 * count,
            f"{spec} has {count / 1e9:.1f} billion parameters",
            "that is with two copies of their gradients; give a smaller config",
        )
        return build().train()
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"{spec} cannot be built: {told(error)}; a function of yours that returns the model "
            "can be given as module:function"
        ) from error
