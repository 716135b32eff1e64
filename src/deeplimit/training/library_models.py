"""Models of transformers, torchvision and timm, by name, and how their images are standardised.

Nothing is downloaded.
"""

import json
import math
import pkgutil
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deeplimit.data import Standardisation
from deeplimit.errors import InputError, describe_error, did_you_mean
from deeplimit.gradient.accuracy import LossOf
from deeplimit.memory import require
from deeplimit.reading import read_json, reading
from deeplimit.records import coerce
from deeplimit.training.specification import LIBRARIES, no_such_type

CONFIG = "config.json"
REMEDY = "expected a config.json with a model_type, or a folder that has one"
LARGEST_DEPTH = 10_000  # layers in a config; of more a network would be built until the memory ends
UNTRAINED = "random, untrained"
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")

# With the head whose loss is its training's, where the model has one of these.
TASKS = ("IMAGE_CLASSIFICATION", "SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM", "CAUSAL_LM")
IMAGES = "IMAGE_CLASSIFICATION"
# What the classes that do a task are called, what those lack that do not, and which do.
DOES = {
    IMAGES: (r"ForImageClassification", "classifies no images", "vit or dinov2"),
    "SEQUENCE_CLASSIFICATION": (
        r"ForSequenceClassification",
        "classifies no texts",
        "bert or distilbert",
    ),
    "CAUSAL_LM": (r"ForCausalLM|LMHead", "does not predict the next token", "llama or gpt2"),
}
PREPROCESSOR = "preprocessor_config.json"
FLAGS = {"rescale_offset": False, "do_rescale": True, "do_normalize": True}
READ = (*FLAGS, "image_mean", "image_std", "rescale_factor")
ALIKE = 0.9  # a name so near to one of these is that one, misspelt; do_resize is not
CORRECT = "correct the file; or delete it, and give --mean and --std where they are not the data's"
COPIES = 3  # of the parameters: themselves, their gradients, and the gradients compared with


@dataclass(frozen=True)
class LoadedModel:
    """A model that a specification names, and what is known of it.

    Attributes:
        spec: as the user gave it.
        model: on the CPU; in training mode, except that what a user's function returns is left as
            it is.
        weights: where its parameters come from, in words.
        run: path of the run folder that it is the network of.
        batch: what a user's function returned beside it: a tensor, a dict of keyword arguments, or
            (inputs, targets).
        loss_of: likewise: loss_of(model, batch) → a scalar.
        input_shape: of one sample, where a library says it.
        standardisation: of its inputs, where what it was trained with is known.
    """

    spec: str
    model: nn.Module
    weights: str
    run: Path | None = None
    batch: Any = None
    loss_of: LossOf | None = None
    input_shape: tuple[int, ...] | None = None
    standardisation: Standardisation | None = None


def transformers_model(
    name: str, classes: int | None = None, *, new_head: bool = False, task: str = IMAGES
) -> LoadedModel:
    """A model type with its default config, a config.json, or a folder, on disk or cached.

    With `classes` it is one for the task, in 32 bits, with so many of them: what is untrained gets
    a head for them; a trained head for another number is replaced where `new_head` says so.

    Raises:
        InputError: transformers is not installed, there is no such config, it cannot be built or
            names code, the weights are not all there, the preprocessor_config.json is damaged, or
            it is no model for the task with so many classes.
    """
    hf = _library("transformers")
    spec = f"transformers:{name}"
    with quiet(hf):
        config, folder = _config(hf, name)
        asked = None if classes is None else task
        kind = _class_of(hf, config, spec, asked, trained=folder is not None)
        if classes is not None and task != "CAUSAL_LM":
            of_this_class = kind.__name__ in (config.architectures or ())
            if folder and not new_head and of_this_class and config.num_labels != classes:
                raise InputError(
                    f"{spec} tells {config.num_labels} classes apart, the data has {classes}; give "
                    "other data, or --new-head in deeplimit train to put a new head in its place"
                )
            config.num_labels = classes
        build, weights = partial(kind, config), UNTRAINED
        if folder is not None:
            build, weights = partial(_trained, kind, folder, config, new_head=new_head), "trained"
        model = _built(spec, build, partial(kind, config))
        model = model if classes is None else model.float()
        scale = None
        if folder is not None and model.main_input_name == "pixel_values":
            scale = standardisation_beside(folder, getattr(config, "num_channels", 3))
        return LoadedModel(spec, model, weights, standardisation=scale)


def other_model(source: str, name: str, classes: int | None = None) -> LoadedModel:
    """An untrained model of torchvision or timm; with `classes`, its head is for so many.

    Raises:
        InputError: the library cannot be imported, or has no such model.
    """
    library = _library("timm" if source == "timm" else "torchvision.models")
    if source == "timm":
        known, make = library.is_model(name), partial(library.create_model, pretrained=False)
    else:
        known, make = name in library.list_models(), partial(library.get_model, weights=None)
    if not known:
        near = did_you_mean(name, library.list_models())
        raise InputError(f"{source} has no model {name!r}{near}")
    spec = f"{source}:{name}"
    build = partial(make, name, **({} if classes is None else {"num_classes": classes}))
    model = _built(spec, build, build)
    settings: Any = getattr(model, "default_cfg", {})
    shape = tuple(settings.get("input_size", (3, 224, 224)))
    return LoadedModel(spec, model, UNTRAINED, input_shape=shape)


def _library(name: str) -> Any:
    """Imported only now: these are not among what deeplimit needs."""
    try:
        return pkgutil.resolve_name(f"{name}:")
    except (ImportError, RuntimeError, OSError) as error:  # a build for another torch: the latter
        package = name.partition(".")[0]
        raise InputError(
            f"{package} cannot be imported ({describe_error(error)}); {LIBRARIES[package]}"
        ) from error


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
    """The config, and the folder with weights beside it."""
    path = Path(name)
    if name in hf.CONFIG_MAPPING and not (path / CONFIG).is_file():
        return hf.AutoConfig.for_model(name), None
    if not path.exists():
        try:
            path = Path(hf.utils.cached_file(name, CONFIG, local_files_only=True)).parent
        except (OSError, ValueError) as error:
            raise no_such_type(name, hf.CONFIG_MAPPING) from error
    file = path / CONFIG if path.is_dir() else path
    with reading(file, "no config of transformers", REMEDY):
        _check_code(hf, file, json.loads(file.read_text(encoding="utf-8")))
        config = hf.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        _check_config(file, config)
    return config, path if any(file for form in WEIGHTS for file in path.glob(form)) else None


def _check_code(hf: Any, path: Path, said: Any) -> None:
    """Refuses a config.json that names code: a model's own, or a kernel of the hub's."""
    if not isinstance(said, dict):
        raise InputError(f"{path} holds a {type(said).__name__}; {REMEDY}")
    if "auto_map" in said and said.get("model_type") not in hf.CONFIG_MAPPING:
        raise InputError(
            f"{path} names code beside it (auto_map), which is never run; write a function that "
            "returns the model, and give it as module:function"
        )
    for name, value in _fields(said):
        if name.endswith(("attn_implementation", "experts_implementation")) and "/" in str(value):
            raise InputError(
                f"{path}: {name} is {value!r}, code of the hub, which is never run; leave it out"
            )


def _fields(said: Any) -> Iterator[tuple[str, Any]]:
    """The fields of an object and of the objects in it."""
    for name, value in said.items() if isinstance(said, dict) else ():
        yield name, value
        yield from _fields(value)


def _check_config(path: Path, config: Any) -> None:
    """Before it is built: names that can be looked up, and no more layers than can be."""
    coerce(tuple[str, ...] | None, config.architectures, f"{path}: architectures")
    for name, value in config.to_dict().items():
        counts = value if isinstance(value, list | tuple) else [value]
        counts = [n for n in counts if isinstance(n, int) and n > LARGEST_DEPTH]
        if counts and ("layer" in name or "depth" in name):
            raise InputError(f"{path}: {name} is {counts[0]:g}; expected at most {LARGEST_DEPTH}")


def _trained(kind: Any, folder: Path, config: Any, *, new_head: bool) -> Any:
    """The model with the weights in a folder; those of another class may lack its head."""
    model, found = kind.from_pretrained(
        folder,
        config=config,
        ignore_mismatched_sizes=new_head,
        local_files_only=True,
        weights_only=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    if kind.__name__ in (config.architectures or ()):
        layers = {re.sub(r"\d+", "*", name) for name in model.state_dict()}
        extra = (n for n in found["unexpected_keys"] if re.sub(r"\d+", "*", n) in layers)
        for what, names in (("no", found["missing_keys"]), ("too many weights, such as", extra)):
            first = min(names, default=None)
            if first is not None:
                raise InputError(
                    f"{folder}: {what} {first} among its weights, by what its {CONFIG} says; the "
                    "folder is damaged, or its files are not of one model: fetch it again"
                )
    return model


def _class_of(hf: Any, config: Any, spec: str, task: str | None, *, trained: bool) -> Any:
    """The config's own class where it does the task, else that of its family which does.

    Without a task it is the config's own, else the first of its family that comes with a loss.
    """
    named, lacks, such = ("", "", "") if task is None else DOES[task]
    for name in config.architectures or ():
        found = getattr(hf, name, None) if re.search(named, name) else None
        if isinstance(found, type) and issubclass(found, hf.PreTrainedModel):
            return found
    tasks = TASKS if task is None else [task]
    mappings = [getattr(hf, f"MODEL_FOR_{one}_MAPPING") for one in tasks]
    mappings += [hf.MODEL_MAPPING] if task is None else []
    family = (mapping.get(type(config), None) for mapping in mappings)
    found = next((one for one in family if one is not None), None)
    if found is None and task is None:
        raise InputError(
            f"{type(config).__name__} belongs to no model of transformers that can be built by "
            "itself; give a model type such as gpt2 or vit"
        )
    if found is None:
        raise InputError(
            f"{spec} {lacks}: transformers has no such model for {type(config).__name__}; give "
            f"another one, such as {such}. Other models are profiled and cut from Python: "
            "deeplimit.turnpike_profile, deeplimit.crop"
        )
    if task == "CAUSAL_LM" and trained:
        kind = ", ".join(config.architectures or ()) or "of no class that its config names"
        raise InputError(
            f"{spec} {lacks}: it is {kind}; give the folder of a whole language model, such as "
            f"{such}, or for a text classifier --data table:FILE"
        )
    return found[0] if isinstance(found, tuple) else found


def _built(spec: str, build: Callable[[], nn.Module], outline: Callable[[], nn.Module]) -> Any:
    """The model in training mode, if this machine has the memory for it."""
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
            f"{spec} cannot be built: {describe_error(error)}; a function of yours that returns "
            "the model can be given as module:function"
        ) from error


def preprocessor(scale: Standardisation) -> dict[str, Any]:
    """For AutoImageProcessor: pixels of 0 … 255 as the model was trained on; no resizing."""
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(scale.mean),
        "image_std": list(scale.std),
    }


def standardisation_beside(folder: Path, channels: int) -> Standardisation | None:
    """Reads from the file how images in [0, 1] are standardised; None where there is none.

    The library computes (f·p − mean) / std of pixels p in 0 … 255, with f the rescale_factor, or 1
    without do_rescale; without do_normalize mean is 0 and std is 1.

    Raises:
        InputError: the file is damaged, or a field is misspelt, missing or impossible.
    """
    path = folder / PREPROCESSOR
    if not path.exists():
        return None
    said = read_json(path, CORRECT)
    try:
        return _standardisation(said, channels)
    except InputError as error:
        raise InputError(f"{path}: {error}; {CORRECT}") from None


def _standardisation(said: Any, channels: int) -> Standardisation:
    if not isinstance(said, dict):
        raise InputError(f"it holds {_shown(said)}; expected an object of fields")
    for name in said:
        near = did_you_mean(name, READ, cutoff=ALIKE)
        if name not in READ and near:
            raise InputError(f"unknown field {name}{near}")
    flags = {
        name: coerce(bool, default if said.get(name) is None else said[name], name)
        for name, default in FLAGS.items()
    }
    if flags["rescale_offset"]:
        raise InputError("rescale_offset is true, which is not known here")
    factor = 1.0
    if flags["do_rescale"]:
        factor = _number("rescale_factor", said.get("rescale_factor", 1 / 255))
    mean, std = (0.0,) * channels, (1.0,) * channels
    if flags["do_normalize"]:
        mean, std = (_numbers(said, name, channels) for name in ("image_mean", "image_std"))
    for name, value in (("rescale_factor", factor), ("image_std", min(std))):
        if value <= 0:
            raise InputError(f"{name} is {value:g}; expected a number above 0")
    if factor != 1 / 255:
        mean, std = (tuple(v / (255 * factor) for v in values) for values in (mean, std))
    return Standardisation(mean, std)


def _numbers(said: dict[str, Any], name: str, channels: int) -> tuple[float, ...]:
    """One for each channel; a number by itself is all of them."""
    if name not in said:
        there = ", ".join(sorted(said)[:12]) or "no fields"
        raise InputError(f"no {name} among {there}; expected {channels} numbers")
    value = said[name]
    values = value if isinstance(value, list) else [value] * channels
    if len(values) != channels:
        raise InputError(
            f"{name} has {len(values)} numbers, the model's images {channels} channels; expected "
            "one for each"
        )
    return tuple(_number(name, value) for value in values)


def _number(name: str, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool | str) else float(value)
    except (TypeError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"{name} is {_shown(value)}; expected finite numbers")
    return number


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "…"
