"""Small batches on which a model is read, made of what it says of its inputs."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from deeplimit._anatomy.batches import TOKENS
from deeplimit._anatomy.calling import main_input, parameters_of
from deeplimit._anatomy.evaluation import Inputs

BATCH, SIZES = 2, (64, 32, 224, 28)


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
        own = getattr(model, "image_size", None) or _patched(model)
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


def _patched(model: nn.Module) -> Any:
    return getattr(getattr(model, "patch_embed", None), "img_size", None)


def _configured(model: Any, generator: torch.Generator) -> Iterator[Inputs]:
    """Inputs by the names that a model of transformers gives to them."""
    config, main, takes = model.config, model.main_input_name, parameters_of(model)
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
        shape = (BATCH, channels, cast(int, height), cast(int, width))
        made["pixel_values"] = torch.randn(shape, generator=generator)
    if main == "input_values":
        strides = math.prod(getattr(config, "conv_stride", None) or [1])
        made[main] = torch.randn(BATCH, max(12 * strides, 400), generator=generator)
    if main == "input_features":
        bands = getattr(config, "num_mel_bins", None) or getattr(config, "feature_size", None) or 80
        length = 2 * (getattr(config, "max_source_positions", None) or 50)
        made[main] = torch.randn(BATCH, bands, length, generator=generator)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in takes:
        made["decoder_input_ids"] = ids
    if made:
        yield made
    elif isinstance(getattr(model, "dummy_inputs", None), Mapping):
        yield dict(model.dummy_inputs)
