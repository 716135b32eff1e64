"""Inputs as people give them to a model: its call, the output that is read, batches of any form."""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from deeplimit._anatomy.checks import shown
from deeplimit._anatomy.evaluation import Inputs, to_device, to_precision
from deeplimit._anatomy.nested import each_tensor, fields_of, tensors_in
from deeplimit.errors import InputError

FAILS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
    RuntimeError,
    TypeError,
    ValueError,
)
ANSWERS = (
    "sentence_embedding",
    "logits",
    "prediction_logits",
    "seq_relationship_logits",
    "last_hidden_state",
)


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside torch.compile, DataParallel and DistributedDataParallel."""
    while True:
        inside = getattr(model, "_orig_mod", None)
        if inside is None and isinstance(
            model, nn.DataParallel | nn.parallel.DistributedDataParallel
        ):
            inside = model.module
        if not isinstance(inside, nn.Module):
            return model
        model = inside


def call(model: nn.Module, x: Any) -> Tensor:
    """Runs a model on a batch: its logits where it has them, else its first tensor.

    Tensors by name are given by keyword, those of a tuple one after the other; to a model of
    transformers a tensor is its main input.
    """
    named = main_input(model)
    if isinstance(x, tuple | list) and not isinstance(x, Tensor):
        return answer(model, model(*x))
    if named is None:
        by_name = isinstance(x, Mapping) and _named(parameters_of(model), x)
        return answer(model, model(**x) if by_name else model(x))
    given: dict[str, Any] = {named: x} if isinstance(x, Tensor) else dict(x)
    parameter = next(model.parameters())
    if not torch.is_autocast_enabled(parameter.device.type):
        given = dict(to_precision(given, parameter.dtype))
    takes = parameters_of(model)
    if "use_cache" in takes:
        given.setdefault("use_cache", False)
    if "return_dict" in takes:
        given["return_dict"] = True
    return answer(model, model(**given))


def answer(model: nn.Module, output: Any) -> Tensor:
    """The tensor that is read: logits; several of one shape side by side; else the first one.

    Fields of a named tuple or of a dataclass are tensors by name.
    """
    if isinstance(output, Tensor):
        return output
    if hasattr(output, "_asdict"):
        output = output._asdict()
    elif not isinstance(output, Mapping) and (names := fields_of(output)):
        output = {name: getattr(output, name) for name in names}
    if isinstance(output, Mapping):
        starts, ends = output.get("start_logits"), output.get("end_logits")
        if isinstance(starts, Tensor) and isinstance(ends, Tensor) and starts.shape == ends.shape:
            return torch.stack([starts, ends], -1)
        for name in ANSWERS:
            if isinstance(output.get(name), Tensor):
                return cast(Tensor, output[name])
        parts = [v for name, v in output.items() if name != "loss"]
    else:
        parts = list(output) if isinstance(output, tuple | list) else []
    for part in parts:
        if isinstance(part, Tensor) and part.is_floating_point() and part.dim():
            return part
    raise InputError(
        f"{type(model).__name__} returns {shown(output)}; expected a tensor, or a mapping or tuple "
        "with one in it"
    )


def _named(takes: Mapping[str, inspect.Parameter], x: Mapping[str, Any]) -> bool:
    """Tells whether a mapping is for the parameters of a forward, and not for its first one."""
    if any(name in takes for name in x):
        return True
    own = list(takes.values())[1:]  # without self
    needed = any(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in own)
    return not needed and any(p.kind is p.VAR_KEYWORD for p in own)


def main_input(model: nn.Module) -> str | None:
    """The main input's name, of a model that is called by keywords as those of transformers."""
    name = getattr(model, "main_input_name", None)
    return name if isinstance(name, str) and hasattr(model, "config") else None


def parameters_of(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """The parameters of a model's forward."""
    return _parameters(type(model).forward)


@lru_cache
def _parameters(forward: Callable[..., Any]) -> Mapping[str, Any]:
    return inspect.signature(forward).parameters


def told(error: BaseException) -> str:
    """The first line of an error."""
    first = (str(error).strip().splitlines() or [""])[0]
    return first[:200] or type(error).__name__


def batch_of(x: Any) -> int:
    """Counts the samples; 0 where no tensor tells."""
    return next((len(v) for v in tensors_in(x) if v.dim()), 0)


def placed(model: nn.Module, x: Any) -> Any:
    """Inputs where the model is: on its device, numbers with a fraction in its precision."""
    first = next((p for p in model.parameters() if p.is_floating_point()), None)
    return x if first is None else to_precision(to_device(x, first.device), first.dtype)


def first_sample(x: Any, samples: int = 1) -> Any:
    """The first sample of a batch, or the first few."""
    count = batch_of(x)
    return each_tensor(lambda v: v[:samples] if v.dim() and len(v) == count else v, x)


def one_token(x: Any, at: int = 0) -> Any:
    """One token of the first sample, of what has tokens."""

    def cut(v: Tensor) -> Tensor:
        return v if v.is_floating_point() or v.dim() < 2 else v[:, at:][:, :1]

    return each_tensor(cut, first_sample(x))


BATCH, TOKENS, SIZES = 2, 4, (64, 32, 224, 28)  # of inputs that are made


def joined(xs: Sequence[Any], rows: int) -> Any:
    """Several inputs as one batch of so many rows, in turn; what is no sample is the last one's."""
    count = batch_of(xs[-1])

    def join(*parts: Tensor) -> Tensor:
        if not parts[-1].dim() or len(parts[-1]) != count:
            return parts[-1]
        every = torch.cat(parts)
        return every[torch.arange(rows) % len(every)]

    return each_tensor(join, *xs)


def others(model: nn.Module, x: Any) -> list[Any]:
    """Other inputs of the same kind: what a head that reads them would answer otherwise to.

    The latter half of some is padding, or tokens of a meaning: where a text ends, a head may look.
    """
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    said = vars(config) if hasattr(config, "__dict__") else {}
    marks = _marks(value for name, value in said.items() if name.endswith("_token_id"))
    words = getattr(config, "vocab_size", None) or 0
    tokens = {0, *(m for m in marks if 0 <= m < words)}
    tokens |= {m.padding_idx or 0 for m in model.modules() if isinstance(m, nn.Embedding)}
    changes: list[Callable[[Tensor], Tensor]] = [partial(_ending, t) for t in sorted(tokens)]
    return [each_tensor(change, x) for change in (otherwise, *changes)]


def _marks(told: Iterable[Any]) -> set[int]:
    """Tokens of a meaning, of each of which a configuration tells none, one or several."""
    every = (m for value in told for m in (value if isinstance(value, list | tuple) else [value]))
    return {m for m in every if isinstance(m, int)}


def _ending(token: int, x: Tensor) -> Tensor:
    """The same with a latter half of zeros, or of this token where it is whole numbers."""
    other = x.clone()
    if other.dim() > 1:
        counts = other.dtype != torch.bool and not other.is_floating_point() and other.max() > 1
        other[:, other.shape[1] // 2 :] = token if counts else 0
    return other


def otherwise(x: Tensor) -> Tensor:
    """Numbers with a fraction, or tokens, that are others."""
    other = x.flip(0).clone()
    if other.is_floating_point():
        return other * -0.7 + 0.1
    if other.dim() > 1 and other.dtype != torch.bool:
        half = other.shape[1] // 2
        other[:, half:] = other[:, :1] if bool((other != other.flatten()[:1]).any()) else 0
    return other


def kind_of(x: Any) -> Any:
    """Of inputs, their names and dimensions."""
    if isinstance(x, Tensor):
        return x.dim()
    parts = x.items() if isinstance(x, Mapping) else enumerate(x)
    dims = ((name, tuple(v.dim() for v in tensors_in(part))) for name, part in parts)
    return frozenset(of for of in dims if of[1])


def examples(model: nn.Module) -> Iterator[Inputs]:
    """Small batches that the model may take, the likeliest first."""
    generator = torch.Generator().manual_seed(0)
    if main_input(model) is not None:
        yield from _configured(cast(Any, model), generator)
        return
    weights = ((m, getattr(m, "weight", None)) for m in model.modules())
    first, weight = next(
        ((m, w) for m, w in weights if isinstance(w, Tensor) and w.dim() > 1), (None, None)
    )
    if isinstance(first, nn.Embedding):
        yield torch.randint(first.num_embeddings, (BATCH, TOKENS), generator=generator)
    elif isinstance(weight, Tensor) and weight.dim() >= 3:  # of a convolution
        groups = getattr(first, "groups", 1)
        own = getattr(model, "image_size", None)
        own = own or getattr(getattr(model, "patch_embed", None), "img_size", None)
        sizes = [own, *SIZES] if isinstance(own, int | tuple) else list(SIZES)
        for size in sizes:
            sides = size if isinstance(size, tuple) else (size,) * (weight.dim() - 2)
            shape = (BATCH, weight.shape[1] * groups, *cast(tuple[int, ...], sides))
            yield torch.randn(shape, generator=generator)
    elif isinstance(weight, Tensor) and weight.dim() == 2:
        yield torch.randn(BATCH, weight.shape[1], generator=generator)
        yield torch.randn(BATCH, TOKENS, weight.shape[1], generator=generator)
    widths = {p.shape[-1] for p in model.parameters() if p.dim()}
    for width in sorted(widths)[:4]:
        yield torch.randn(BATCH, width, generator=generator)
        yield torch.randn(BATCH, TOKENS, width, generator=generator)


def _configured(model: Any, generator: torch.Generator) -> Iterator[Inputs]:
    """Inputs by the names that a model of transformers gives to them."""
    config, main, takes = model.config, model.main_input_name, parameters_of(model)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    words = getattr(text, "vocab_size", None) or 2
    kinds = ("pad", "bos", "eos", "decoder_start")
    special = _marks(getattr(text, f"{kind}_token_id", None) for kind in kinds)
    allowed = [i for i in range(min(words, 1000)) if i not in special] or [0]
    chosen = torch.randint(len(allowed), (BATCH, TOKENS), generator=generator)
    ids = torch.tensor(allowed)[chosen]
    vision = getattr(config, "vision_config", None) or config
    size = getattr(vision, "image_size", None) or SIZES[0]
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    channels = getattr(vision, "num_channels", None) or 3
    made: dict[str, Tensor] = {}
    if main == "input_ids" or (hasattr(config, "text_config") and "input_ids" in takes):
        made["input_ids"] = ids
    if main == "pixel_values" or (hasattr(config, "vision_config") and "pixel_values" in takes):
        shape = (BATCH, channels, cast(int, height), cast(int, width))
        made["pixel_values"] = torch.randn(shape, generator=generator)
    if main == "input_values":
        strides = math.prod(getattr(config, "conv_stride", None) or [1])
        spectrogram = [getattr(config, name, None) for name in ("max_length", "num_mel_bins")]
        sides: list[Any] = spectrogram if all(spectrogram) else [max(12 * strides, 400)]
        made[main] = torch.randn(BATCH, *sides, generator=generator)
    if main == "input_features":
        bands = getattr(config, "num_mel_bins", None) or getattr(config, "feature_size", None) or 80
        length = 2 * (getattr(config, "max_source_positions", None) or 50)
        made[main] = torch.randn(BATCH, bands, length, generator=generator)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in takes:
        made["decoder_input_ids"] = ids
    if made:
        yield made
        ends = sorted(_marks([getattr(text, "eos_token_id", None)]))
        yield from _otherwise_made(made, ends[:1], generator)
    elif isinstance(getattr(model, "dummy_inputs", None), Mapping):
        yield dict(model.dummy_inputs)


def _otherwise_made(
    made: dict[str, Tensor], ends: Sequence[int], generator: torch.Generator
) -> Iterator[dict[str, Tensor]]:
    """Inputs that fewer models take."""
    names = ("pixel_values", "input_features", "input_ids")
    images, features, ids = (made.get(name) for name in names)
    if images is not None and ids is not None:  # an image wants tokens that stand for it
        yield {name: x for name, x in made.items() if x is not images}
    elif images is not None:
        for size in SIZES:
            shape = (*images.shape[:2], size, size)
            yield made | {"pixel_values": torch.randn(shape, generator=generator)}
    if features is not None:
        yield made | {"input_features": features.mT}
    if ids is not None:
        for end in ends:  # the answer is read at a text's end
            yield made | {"input_ids": torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], end)], 1)}
        yield made | {"input_ids": torch.stack([ids, ids.flip(0)], 1)}  # of which one is chosen
