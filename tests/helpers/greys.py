"""Images that a small model learns in seconds, and small models of other libraries for them."""

import json
from pathlib import Path

import numpy as np

VIT = {
    "model_type": "vit", "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
    "intermediate_size": 32, "image_size": 8, "patch_size": 4, "num_channels": 1,
}  # fmt: skip

MODULE = """
import torch
import transformers

class MyViT(transformers.ViTForImageClassification):
    pass

def build(classes=4):
    torch.manual_seed(1)
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
        image_size=8, patch_size=4, num_channels=1, num_labels=classes,
    )
    return MyViT(config)

def five():
    return build(5)
"""


DINO = VIT | {"model_type": "dinov2", "mlp_ratio": 2}  # its mask token gets no gradient


def greys(folder: Path, samples: int = 300, channels: int = 1) -> str:
    """A data set npz:FILE: noise of 8×8 pixels in four degrees of brightness, the classes."""
    y = np.arange(samples) % 4
    x = np.random.default_rng(0).integers(0, 130, (samples, channels, 8, 8))
    x += 20 * y[:, None, None, None]
    np.savez(folder / "greys.npz", x=x.astype(np.uint8), y=y)
    return f"npz:{folder / 'greys.npz'}"


def vit(folder: Path, **changes: object) -> str:
    """A specification transformers:FILE of a small vision transformer."""
    return _config(folder / "vit.json", VIT | changes)


def dino(folder: Path) -> str:
    """The same of a small DINOv2."""
    return _config(folder / "dino.json", DINO)


def _config(file: Path, settings: dict[str, object]) -> str:
    file.write_text(json.dumps(settings))
    return f"transformers:{file}"
