"""Batches that a model of transformers may take, by the names in its forward."""

import inspect
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor

BATCH, TOKENS, SPECIAL = 3, 8, 5
Batch = dict[str, Tensor]


def batches(model: Any, head: str) -> Iterator[Batch]:
    """Of text with one row padded, pictures, sound, films; then the model's own dummy inputs."""
    takes = set(inspect.signature(type(model).forward).parameters)
    config, main = model.config, model.main_input_name
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    draw = torch.Generator().manual_seed(2)
    words = getattr(text, "vocab_size", None)
    words = words if isinstance(words, int) and words > 2 * SPECIAL else 100
    ids = torch.randint(SPECIAL, min(words, 100), (BATCH, TOKENS), generator=draw)
    mask = torch.ones_like(ids)
    padded = ids.clone()
    padded[1, -2:], pad = getattr(text, "pad_token_id", None) or 0, mask.clone()
    pad[1, -2:] = 0
    several = (BATCH, 2, TOKENS) if head == "MultipleChoice" else None
    texts: list[Batch] = []
    if several:
        both = torch.randint(SPECIAL, min(words, 100), several, generator=draw)
        texts.append({"input_ids": both, "attention_mask": torch.ones_like(both)})
        texts.append({"input_ids": both})
    elif "input_ids" in takes:
        if "attention_mask" in takes:
            texts += [{"input_ids": padded, "attention_mask": pad}]
        texts += [{"input_ids": ids}]
        end = getattr(text, "eos_token_id", None)
        if (
            isinstance(end, int) and head == "SequenceClassification"
        ):  # that read this token's state
            texts += [{"input_ids": torch.cat([ids[:, :-1], torch.full((BATCH, 1), end)], 1)}]
    sides = _other(model, takes, main, draw)
    decoded: Batch = {}
    if "decoder_input_ids" in takes and getattr(config, "is_encoder_decoder", False):
        decoded = {"decoder_input_ids": ids.clone()}
    if main == "input_ids" or not sides:
        for one in texts:
            yield one | decoded | _beside(takes, one["input_ids"])
        for one, other in product(texts, sides):
            yield one | other | decoded | _beside(takes, one["input_ids"])
    for other in sides:
        yield other | decoded
        for one in texts:
            yield one | other | decoded
    if isinstance(getattr(model, "dummy_inputs", None), dict):
        yield dict(model.dummy_inputs)


def _beside(takes: set[str], ids: Tensor) -> Batch:
    """Where words stand on a page."""
    if "bbox" not in takes or ids.dim() != 2:
        return {}
    corner = torch.arange(ids.shape[1]).expand(ids.shape)
    return {"bbox": torch.stack([corner, corner, corner + 3, corner + 5], -1)}


def _other(model: Any, takes: set[str], main: str, draw: torch.Generator) -> list[Batch]:
    """Pictures, films and sound."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    found: list[Batch] = []
    config = model.config
    seen = getattr(config, "vision_config", None) or config
    size = getattr(seen, "image_size", None) or 32
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    channels = getattr(seen, "num_channels", None) or getattr(seen, "in_channels", None) or 3
    frames = getattr(seen, "num_frames", None) or getattr(seen, "frames_per_clip", None) or 2
    for name in ("pixel_values", "pixel_values_videos"):
        if name in takes:
            made = [(BATCH, channels, height, width), (BATCH, frames, channels, height, width)]
            found += [{name: normal(*shape)} for shape in made[:: -1 if "videos" in name else 1]]
            if height < 64:
                found.append({name: normal(BATCH, channels, 64, 64)})
    if "input_values" in takes:
        length, bins = getattr(config, "max_length", None), getattr(config, "num_mel_bins", None)
        found.append({"input_values": normal(BATCH, 800)})
        if isinstance(length, int) and isinstance(bins, int):
            found.append({"input_values": normal(BATCH, length, bins)})
    if "input_features" in takes:
        sound = getattr(config, "encoder_config", None) or getattr(config, "audio_config", config)
        bands = next(
            (
                getattr(sound, name)
                for name in ("num_mel_bins", "feature_size", "input_feat_per_channel", "input_dim",
                             "feature_projection_input_dim", "n_mels")
                if isinstance(getattr(sound, name, None), int)
            ),
            80,
        )  # fmt: skip
        long = 2 * (getattr(sound, "max_source_positions", None) or 32)
        found += [{"input_features": normal(BATCH, bands, long)}]
        found += [{"input_features": normal(BATCH, long, bands)}]
    for name in ("inputs", "audio_values"):
        if name in takes and main == name:
            found.append({name: torch.randint(SPECIAL, 100, (BATCH, TOKENS), generator=draw)})
            found.append({name: normal(BATCH, 3, height, width)})
    return sorted(found, key=lambda one: main not in one)
