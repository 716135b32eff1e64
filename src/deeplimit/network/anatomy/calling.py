"""How a model is called with what people have, which of its outputs is read, and a made example."""

import inspect
import math
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from deeplimit.errors import InputError
from deeplimit.network.checks import shown
from deeplimit.network.modes import Inputs, to_device, to_precision

BATCH, TOKENS, SIZES = 2, 8, (64, 32, 224, 28)
ANSWERS = ("logits", "prediction_logits", "seq_relationship_logits", "last_hidden_state")


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
    """What a model answers to a batch: logits where it has them, else its first tensor.

    Args:
        model: any module.
        x: a tensor, tensors by name (then by keyword), or a tuple (then one after the other); of
            a model of transformers a tensor is its main input.

    Raises:
        InputError: there is no tensor in what it returns.
    """
    named = _by_name(model)
    if isinstance(x, tuple | list) and not isinstance(x, Tensor):
        return answer(model, model(*x))
    if named is None:
        return answer(model, model(**x) if isinstance(x, Mapping) else model(x))
    given: dict[str, Any] = {named: x} if isinstance(x, Tensor) else dict(x)
    parameter = next(model.parameters())
    if not torch.is_autocast_enabled(parameter.device.type):
        given = dict(to_precision(given, parameter.dtype))
    takes = _takes(model)
    if "use_cache" in takes:
        given.setdefault("use_cache", False)
    if "return_dict" in takes:
        given["return_dict"] = True
    return answer(model, model(**given))


def answer(model: nn.Module, output: Any) -> Tensor:
    """The tensor that is read: logits; several of one shape side by side; else the first one."""
    if isinstance(output, Tensor):
        return output
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


def batch_of(x: Any) -> int:
    """How many samples there are; 0 where no tensor tells."""
    parts = [x] if isinstance(x, Tensor) else [*x.values()] if isinstance(x, Mapping) else [*x]
    return next((len(p) for p in parts if isinstance(p, Tensor) and p.dim()), 0)


def mapped(x: Any, change: Any) -> Any:
    """Inputs with `change` made to each tensor in them."""
    if isinstance(x, Tensor):
        return change(x)
    if isinstance(x, Mapping):
        return {k: change(v) if isinstance(v, Tensor) else v for k, v in x.items()}
    return tuple(change(v) if isinstance(v, Tensor) else v for v in x)


def placed(model: nn.Module, x: Any) -> Any:
    """Inputs where the model is: on its device, numbers with a fraction in its precision."""
    first = next((p for p in model.parameters() if p.is_floating_point()), None)
    if first is None:
        return x
    if isinstance(x, Tensor | Mapping):
        moved = to_device(x, first.device)
        return to_precision(moved, first.dtype)
    return mapped(x, lambda v: to_precision(v.to(first.device), first.dtype))


def examples(model: nn.Module) -> Iterator[Inputs]:
    """Small batches that the model may take, the likeliest first."""
    generator = torch.Generator().manual_seed(0)
    if _by_name(model) is not None:
        yield from _configured(cast(Any, model), generator)
        return
    first = next((m for m in model.modules() if list(m.parameters(recurse=False))), None)
    weight = getattr(first, "weight", None)
    if isinstance(first, nn.Embedding):
        yield torch.randint(first.num_embeddings, (BATCH, TOKENS), generator=generator)
    elif isinstance(weight, Tensor) and weight.dim() >= 3:  # of a convolution
        groups = getattr(first, "groups", 1)
        own = getattr(model, "image_size", None) or _patched(model)
        sizes = [own, *SIZES] if isinstance(own, int | tuple) else list(SIZES)
        for size in sizes:
            shape = size if isinstance(size, tuple) else (size,) * (weight.dim() - 2)
            yield torch.randn(BATCH, weight.shape[1] * groups, *shape, generator=generator)
    elif isinstance(weight, Tensor) and weight.dim() == 2:
        yield torch.randn(BATCH, weight.shape[1], generator=generator)
        yield torch.randn(BATCH, TOKENS, weight.shape[1], generator=generator)
    widths = {p.shape[-1] for p in model.parameters() if p.dim()}
    for width in sorted(widths)[:4]:
        yield torch.randn(BATCH, width, generator=generator)
        yield torch.randn(BATCH, TOKENS, width, generator=generator)


def _patched(model: nn.Module) -> Any:
    return getattr(getattr(model, "patch_embed", None), "img_size", None)


def _by_name(model: nn.Module) -> str | None:
    """The name of the main input of a model that is called by keywords, as those of transformers."""
    name = getattr(model, "main_input_name", None)
    return name if isinstance(name, str) and hasattr(model, "config") else None


def _takes(model: nn.Module) -> Mapping[str, Any]:
    return inspect.signature(type(model).forward).parameters


def _configured(model: Any, generator: torch.Generator) -> Iterator[Inputs]:
    """Inputs by the names that a model of transformers gives to them."""
    config, main, takes = model.config, model.main_input_name, _takes(model)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    words = getattr(text, "vocab_size", None) or 2
    special = {
        getattr(text, f"{kind}_token_id", None) for kind in ("pad", "bos", "eos", "decoder_start")
    }
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
        made["pixel_values"] = torch.randn(BATCH, channels, height, width, generator=generator)
    if main == "input_values":
        strides = math.prod(getattr(config, "conv_stride", None) or [1])
        made[main] = torch.randn(BATCH, max(12 * strides, 400), generator=generator)
    if main == "input_features":
        bands = getattr(config, "num_mel_bins", None) or getattr(config, "feature_size", 80)
        length = 2 * (getattr(config, "max_source_positions", None) or 50)
        made[main] = torch.randn(BATCH, bands, length, generator=generator)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in takes:
        made["decoder_input_ids"] = ids
    if made:
        yield made
    elif isinstance(getattr(model, "dummy_inputs", None), Mapping):
        yield dict(model.dummy_inputs)
