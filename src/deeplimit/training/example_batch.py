"""One batch and a loss for a model: all that a training step is made of besides the optimiser."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from lightning_fabric.utilities import move_data_to_device
from torch import Tensor, nn
from torch.nn import functional as F

from deeplimit._anatomy.evaluation import Inputs
from deeplimit.errors import InputError, describe_error
from deeplimit.gradient.accuracy import LossOf
from deeplimit.training.building import run_data, stage_cost, training_batches
from deeplimit.training.library_models import LoadedModel
from deeplimit.training.run_folder import RunFolder
from deeplimit.training.specification import check_seed

SAMPLES, LENGTH, IMAGE = 4, 128, 224
FUNCTION = "a function that returns (model, batch), given as module:function, brings its own"


@dataclass(frozen=True)
class Example:
    """A batch, and loss_of(model, batch) → a scalar."""

    batch: Any
    loss_of: LossOf


@dataclass(frozen=True)
class BatchRequest:
    """A batch as the user asks for it; None is left to the model.

    Attributes:
        samples: how many.
        shape: of one sample, for random inputs.
        length: of one sample, for random tokens.
        seed: of what is drawn.

    Raises:
        InputError: a number below 1, both shape and length, or a seed that is none.
    """

    samples: int | None = None
    shape: tuple[int, ...] | None = None
    length: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in (("batch", self.samples), ("length", self.length)):
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}; expected at least 1")
        if self.shape is not None and (not self.shape or min(self.shape) < 1):
            raise InputError(f"shape is {self.shape}; expected sizes of at least 1: 3,224,224")
        if self.shape is not None and self.length is not None:
            raise InputError("shape and length given; give the one that the model takes")
        check_seed(self.seed)


def example(
    loaded: LoadedModel, asked: BatchRequest, device: torch.device | str = "cpu"
) -> Example:
    """A batch for the model, and its loss; the model is moved to the device.

    A run brings its data and its objective, stage cost included. A user's function may bring a
    batch: a tensor, a dict of keyword arguments, or (inputs, targets). Everything else gets random
    inputs: those that a transformers model names, numbers of the shape, or tokens of the length.
    Where no loss is given it is the model's own, if it returns one for labels; otherwise the
    cross-entropy against random classes of an output [B, C], or the mean square of any other.

    Raises:
        InputError: the asked does not go with the model, or the model does not run on the batch.
    """
    loaded.model.to(device)
    with torch.random.fork_rng():
        torch.manual_seed(asked.seed)
        if loaded.run is not None:
            _refuse(asked, "the run has its own data", but="batch")
            made = _of_run(RunFolder.open(loaded.run), loaded.model, asked)
        elif loaded.batch is not None:
            _refuse(asked, f"{loaded.spec} returned its own batch")
            made = _completed(loaded, move_data_to_device(loaded.batch, device))
        else:
            made = _completed(loaded, move_data_to_device(_inputs(loaded, asked), device))
        return Example(move_data_to_device(made.batch, device), made.loss_of)


def inputs_of(batch: Any) -> Inputs:
    """Returns the part of a batch that goes into the model: tensors, without targets."""
    if isinstance(batch, tuple | list):
        batch = batch[0]
    if isinstance(batch, Mapping):
        return {n: v for n, v in batch.items() if isinstance(v, Tensor) and n != "labels"}
    return cast(Tensor, batch)


def _refuse(asked: BatchRequest, why: str, but: str = "") -> None:
    """Refuses options that would silently be ignored."""
    given = {"batch": asked.samples, "shape": asked.shape, "length": asked.length}
    for name, value in given.items():
        if value is not None and name != but:
            raise InputError(f"{name} given, but {why}; leave it out")


def _of_run(run: RunFolder, model: nn.Module, asked: BatchRequest) -> Example:
    """The first batch of the run's own training, and what it minimises."""
    recipe, data = run.recipe, run_data(run)
    x, y = next(iter(training_batches(recipe, data, 0)))
    if asked.samples is not None:
        if asked.samples > len(y):
            raise InputError(
                f"batch is {asked.samples}; the run's own is {len(y)}: give at most that"
            )
        x, y = x[: asked.samples], y[: asked.samples]
    objective = stage_cost(recipe, data, model)

    def loss(_: nn.Module, batch: Any) -> Tensor:
        objective.draws.manual_seed(recipe.seed)  # the same layers in every pass
        return cast(Tensor, objective(*batch)[0])

    return Example((x, y), loss)


def _inputs(loaded: LoadedModel, asked: BatchRequest) -> Any:
    """Random inputs."""
    model, count = loaded.model, asked.samples or SAMPLES
    config: Any = getattr(model, "config", None)
    name = getattr(model, "main_input_name", None)
    if config is not None and isinstance(name, str):
        return _named_inputs(model, config, name, count, asked)
    if asked.length is not None:
        tables = (m for m in model.modules() if isinstance(m, nn.Embedding))
        table = next(tables, None)
        if table is None:
            raise InputError(f"length given, but {loaded.spec} has no embedding; give a shape")
        return torch.randint(table.num_embeddings, (count, asked.length))
    shape = asked.shape or loaded.input_shape
    if shape is None:
        raise InputError(
            f"{loaded.spec}: what goes into it is not known; give a shape such as 3,224,224, a "
            f"length for tokens, or {FUNCTION}"
        )
    return _numbers(model, count, shape)


def _named_inputs(
    model: nn.Module, config: Any, name: str, count: int, asked: BatchRequest
) -> dict[str, Any]:
    """Makes the main input of a transformers model: tokens, images or something continuous."""
    inputs: dict[str, Any] = {}
    if name == "input_ids":
        if asked.shape is not None:
            raise InputError("shape given, but the model takes tokens; give a length")
        longest = getattr(config, "max_position_embeddings", None) or LENGTH
        length = asked.length or min(LENGTH, longest)
        inputs[name] = torch.randint(config.get_text_config().vocab_size, (count, length))
        if config.is_encoder_decoder:
            inputs["labels"] = inputs[name].clone()
    elif asked.length is not None and name == "pixel_values":
        raise InputError("length given, but the model takes images; give a shape: 3,224,224")
    else:
        size = getattr(config, "image_size", None) or IMAGE
        height, width = size if isinstance(size, list | tuple) else (size, size)
        image = (getattr(config, "num_channels", 3), height, width)
        length = None if asked.length is None else (asked.length,)
        inputs[name] = _numbers(model, count, asked.shape or length or image)
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False  # in training nothing is generated
    return inputs


def _numbers(model: nn.Module, count: int, shape: tuple[int, ...]) -> Tensor:
    """Random numbers, of the model's precision."""
    floating = (p.dtype for p in model.parameters() if p.is_floating_point())
    return torch.randn(count, *shape, dtype=next(floating, torch.float32))


def _completed(loaded: LoadedModel, inputs: Any) -> Example:
    """Inputs with what the loss needs, and the loss, both from what the model gives for them."""
    if loaded.loss_of is not None:
        return Example(inputs, loaded.loss_of)
    if isinstance(inputs, tuple | list):
        if len(inputs) != 2:
            raise InputError(
                f"{loaded.spec} returned a batch of {len(inputs)} parts; expected a tensor, a dict "
                "of keyword arguments, (inputs, targets), or a loss_of beside it"
            )
        return Example(tuple(inputs), _of_targets)
    model = loaded.model
    try:
        with torch.no_grad():
            output = _run(model, inputs)
    except Exception as error:
        raise InputError(
            f"{loaded.spec} does not run on its batch: {describe_error(error)}; see shape and "
            f"length, or {FUNCTION}"
        ) from error
    if _loss(output) is not None:
        return Example(inputs, _own)
    tensor, logits = _first_tensor(output), _parts(output).get("logits")
    labels = "labels" in inspect.signature(model.forward).parameters
    if isinstance(inputs, Mapping) and labels and isinstance(logits, Tensor):
        return Example({**inputs, "labels": _classes(logits)}, _own)
    if tensor.dim() == 2 and tensor.shape[1] > 1:
        return Example((inputs, _classes(tensor)), _of_targets)
    return Example(inputs, _mean_square)


def _classes(logits: Tensor) -> Tensor:
    """A random class for every row of logits [..., C]."""
    return torch.randint(logits.shape[-1], logits.shape[:-1])


def _run(model: nn.Module, inputs: Any) -> Any:
    return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)


def _parts(output: Any) -> Mapping[Any, Any]:
    """Returns the parts of a model's output, by names or by places."""
    if isinstance(output, Mapping):
        return output
    return dict(enumerate(output if isinstance(output, tuple | list) else [output]))


def _loss(output: Any) -> Tensor | None:
    found = _parts(output).get("loss")
    return found if isinstance(found, Tensor) and found.dim() == 0 else None


def _first_tensor(output: Any) -> Tensor:
    tensors = (part for part in _parts(output).values() if isinstance(part, Tensor))
    tensor = next(tensors, None)
    if tensor is None:
        kind = type(output).__name__
        raise InputError(
            f"the model returned {kind} without a tensor; {FUNCTION}, and (model, batch, loss_of) "
            "its loss too"
        )
    return tensor


def _own(model: nn.Module, batch: Any) -> Tensor:
    """The loss that the model returns."""
    return cast(Tensor, _loss(_run(model, batch)))


def _of_targets(model: nn.Module, batch: Any) -> Tensor:
    """Cross-entropy for classes, mean squared error for other targets."""
    inputs, targets = batch
    output = _first_tensor(_run(model, inputs))
    if targets.is_floating_point():
        return F.mse_loss(output, targets)
    return F.cross_entropy(output.flatten(0, -2), targets.flatten())


def _mean_square(model: nn.Module, batch: Any) -> Tensor:
    """A loss for what has neither labels nor classes."""
    return _first_tensor(_run(model, batch)).square().mean()
