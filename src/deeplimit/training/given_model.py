"""A model that is not ours to build: loaded, given a recipe's weights, tried on the data."""

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deeplimit._anatomy import anatomy
from deeplimit._anatomy.evaluation import Inputs, evaluating
from deeplimit._anatomy.inputs import call
from deeplimit.data import DataSet, Standardisation
from deeplimit.errors import InputError, describe_error
from deeplimit.network.weights import read_pickled, read_safetensors
from deeplimit.training.library_models import IMAGES, UNTRAINED, LoadedModel
from deeplimit.training.recipe import Recipe
from deeplimit.training.run_folder import load_named
from deeplimit.training.specification import Named, check_seed

CAUSAL = 1e-3  # of the largest logit by which a later token may change one; more is no rounding
NESTED = ("state_dict", "model_state_dict", "model")  # where checkpoints keep the weights
PARALLEL = "module."  # before every name in those of DataParallel


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
        spec: a run folder, or one of the forms in `deeplimit.training.models`.
        seed: of the parameters that are drawn here; torch's own random state is left as it was.
        classes: asks a library for a classifier of images with so many classes.
        new_head: of a trained model of transformers with another number of classes.
        trust: whether code that a run folder names may be run.

    Raises:
        InputError: no such model, a seed out of range, a library that is not installed, a function
            that fails or returns something else, or code that is not trusted.
    """
    check_seed(seed)
    named = Named.typed(spec, trust=trust)
    return load_named(named, seed=seed, classes=classes, new_head=new_head)


def given_model(recipe: Recipe, data: DataSet) -> tuple[nn.Module, Standardisation | None]:
    """The model that a recipe names, with its weights, and the standardisation that it needs.

    Networks of deeplimit's own bring theirs inside; for others it is the recipe's, else what the
    model says it was trained with, else the data's.

    Raises:
        InputError: no such model or weights, or figures that do not go with the model or the data.
    """
    spec, task = recipe.model or "", IMAGES
    if data.is_text:
        task = "SEQUENCE_CLASSIFICATION" if data.vocabulary is None else "CAUSAL_LM"
    more: dict[str, Any] = {"new_head": recipe.new_head, "task": task}
    loaded = load_named(spec, seed=recipe.seed, classes=data.classes, **more)
    model: Any = loaded.model
    if recipe.weights is not None:
        load_weights(model, recipe.weights, spec)
    elif recipe.epochs == 0 and loaded.weights == UNTRAINED:
        raise InputError(
            f"{spec} has random weights, in which there is nothing to find; give --weights FILE, a "
            "folder with weights, or train it: deeplimit train DATA --model"
        )
    if recipe.stack is not None:
        anatomy(model, blocks=recipe.stack)
    if data.is_text and loaded.weights != UNTRAINED and not recipe.new_head:
        _check_words(model, data, spec)
    names = data.class_names
    config: Any = getattr(model, "config", None)
    if getattr(config, "id2label", None) == {i: f"LABEL_{i}" for i in range(len(names))}:
        config.id2label = dict(enumerate(names))  # of a new head of transformers
        config.label2id = {name: i for i, name in enumerate(names)}
    if data.is_text or hasattr(model, "standardise"):
        if recipe.mean is not None:
            why = (
                f"{recipe.data} is text" if data.is_text else f"{spec} standardises its own inputs"
            )
            raise InputError(f"mean given, but {why}; leave mean and std out")
        return model, None
    if recipe.mean is not None and recipe.std is not None:
        scale = Standardisation(recipe.mean, recipe.std)
    elif loaded.standardisation is not None:
        scale = loaded.standardisation
    else:
        mean, std = data.standardisation()
        scale = Standardisation(tuple(mean.tolist()), tuple(std.tolist()))
    scale.check(data.shape)
    return model, scale


def load_weights(model: nn.Module, path: Path, spec: str) -> None:
    """Puts a state_dict into a model, all of it.

    Raises:
        InputError: the file cannot be read, or its names or shapes are not the model's.
    """
    remedy = "expected a .safetensors file, or a state_dict written by torch.save"
    if path.suffix == ".safetensors":
        weights: Any = read_safetensors(path, remedy)[0]
    else:
        weights = read_pickled(path, "no readable weights", remedy)
    nested = (weights.get(name) for name in NESTED) if isinstance(weights, Mapping) else ()
    weights = next((part for part in nested if isinstance(part, Mapping)), weights)
    if not isinstance(weights, Mapping):
        raise InputError(f"{path} holds {type(weights).__name__}; expected a state_dict")
    weights = {str(name).removeprefix(PARALLEL): tensor for name, tensor in weights.items()}
    try:
        model.load_state_dict(weights)
    except Exception as error:  # names, shapes, or values that are no tensors
        reason = textwrap.shorten(str(error), 300)
        raise InputError(
            f"{path}: not the weights of {spec} ({reason}); give the model that they are of, as "
            "module:function if need be"
        ) from error


def check_model(model: nn.Module, x: Inputs, data: DataSet, spec: str, recipe: Recipe) -> None:
    """Runs a model, called `spec`, on a sample of its data as it is to see it.

    Raises:
        InputError: it has no anatomy, does not take such samples, tells other classes apart, or
            cannot have the recipe's gradient.
    """
    samples = "×".join(map(str, data.shape)) + (" tokens" if data.is_text else "")
    reads_tokens = (
        f"{spec} reads tokens, {recipe.data} has none; give it a text, --data text:FILE, or texts "
        "with labels, --data table:FILE"
    )
    if getattr(model, "main_input_name", "") == "input_ids" and not data.is_text:
        raise InputError(reads_tokens)
    with evaluating(model), torch.no_grad():
        try:
            logits = call(model, x)
        except Exception as error:  # whatever the user's model raises
            remedy = (
                "give a model for such images, such as a config.json with their image_size and "
                "num_channels, or a module:function that resizes them"
            )
            raise InputError(
                f"{spec} does not take the samples of {recipe.data}, {samples}: "
                f"{describe_error(error)}; {'give a smaller length' if data.is_text else remedy}"
            ) from error
        if data.vocabulary is not None and isinstance(x, Tensor):
            _check_causal(model, x, logits, spec)
    structure = anatomy(model, x, recipe.stack)
    if structure.tokens and data.vocabulary is None:
        raise InputError(reads_tokens)
    if recipe.gradient == "adjoint" and not (structure.rebuildable or recipe.bits):
        raise InputError(
            "gradient is adjoint: the states of a CIFAR ResNet cannot be rebuilt, because of the "
            "ReLU after every addition; give bits, or the gradient backprop"
        )
    if logits.shape != (1, *data.train.y.shape[1:], data.classes):
        heads = logits.shape[-1] if logits.dim() else 0
        raise InputError(
            f"{spec} tells {heads} classes apart, {recipe.data} has {data.classes}; give a model "
            f"with a head for {data.classes} classes, as module:function if need be"
        )


def _check_causal(model: nn.Module, x: Tensor, logits: Tensor, spec: str) -> None:
    """Refuses a model whose answer to a token of x [1, L] depends on those after it."""
    other = x.clone()
    other[:, -1] = (x[:, -1] + 1) % logits.shape[-1]
    apart = (call(model, other) - logits)[:, :-1].abs().max()
    if apart > CAUSAL * logits.abs().max():
        raise InputError(
            f"{spec} looks at the tokens that follow, so it is an encoder and no model of the next "
            "token; give a decoder such as Llama or GPT-2, or a text classifier and --data "
            "table:FILE"
        )


def _check_words(model: Any, data: DataSet, spec: str) -> None:
    """Refuses labels in words that a trained classifier does not know, whose order none says."""
    names = [str(name) for name in getattr(model.config, "id2label", {}).values()]
    words = not all(name.isdigit() for name in data.class_names)
    if data.vocabulary is None and words and names != [*data.class_names]:
        raise InputError(
            f"{data.name}: labels {', '.join(data.class_names[:4])}, while {spec} calls its "
            f"classes {', '.join(names[:4])}; number them in the model's order, from 0 on"
        )
