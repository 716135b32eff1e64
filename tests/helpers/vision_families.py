"""Small image classifiers of transformers, not at their initial values, and their naive walks."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from model_families import shaken
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

CLASSES, BATCH = 3, 4
TOKENS = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 4,
    "image_size": 8,
    "patch_size": 4,
    "num_labels": CLASSES,
}
PIXELS = {"num_labels": CLASSES, "depths": [3, 1, 2]}


def _vit() -> nn.Module:
    config = transformers.ViTConfig(**TOKENS, intermediate_size=24)
    return transformers.ViTForImageClassification(config)


def _dinov2() -> nn.Module:
    config = transformers.Dinov2Config(**TOKENS, mlp_ratio=2, out_features=["stage2", "stage4"])
    return transformers.Dinov2ForImageClassification(config)


def _resnet(kind: str, **more: object) -> Callable[[], nn.Module]:
    settings = {"layer_type": kind, "embedding_size": 4, **PIXELS, **more}
    settings["hidden_sizes"] = [8, 12, 16] if kind == "bottleneck" else [4, 6, 8]
    return lambda: transformers.ResNetForImageClassification(transformers.ResNetConfig(**settings))


def _convnext(version: str) -> Callable[[], nn.Module]:
    settings = {"num_stages": 3, "hidden_sizes": [4, 6, 8], "patch_size": 2, "image_size": 16}
    config = getattr(transformers, f"ConvNext{version}Config")
    model = getattr(transformers, f"ConvNext{version}ForImageClassification")
    return lambda: model(config(**settings, **PIXELS))


# name: how it is made, side of its images
_BUILDERS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "ViT": (_vit, 8),
    "DINOv2": (_dinov2, 8),
    "ResNet, basic": (_resnet("basic", out_features=["stage1", "stage3"]), 32),
    "ResNet, basic, strided from the start": (_resnet("basic", downsample_in_first_stage=True), 32),
    "ResNet, bottleneck": (_resnet("bottleneck"), 32),
    "ConvNeXt": (_convnext(""), 16),
    "ConvNeXt V2": (_convnext("V2"), 16),
}
FAMILIES = tuple(_BUILDERS)

# Of each block the parts that its control consists of: the last norm and what follows it; all of a
# transformer layer, where attention and MLP each add to the state.
CONTROLS = {
    "ViT": ("",),
    "DINOv2": ("",),
    "ResNet, basic": ("layer.1.normalization.",),
    "ResNet, basic, strided from the start": ("layer.1.normalization.",),
    "ResNet, bottleneck": ("layer.2.normalization.",),
    "ConvNeXt": ("layernorm.", "pwconv1.", "pwconv2."),
    "ConvNeXt V2": ("layernorm.", "pwconv1.", "grn.", "pwconv2."),
}
# The layers that change the shape, seen in the configurations.
FIXED = {
    "ResNet, basic": (3, 4),
    "ResNet, basic, strided from the start": (0, 3, 4),
    "ResNet, bottleneck": (0, 3, 4),
}
# The stage of each state.
STAGES = {
    "ViT": (0, 0, 0, 0, 0),
    "DINOv2": (0, 0, 0, 0, 0),
    "ResNet, basic": (0, 0, 0, 0, 1, 2, 2),
    "ResNet, basic, strided from the start": (0, 1, 1, 1, 2, 3, 3),
    "ResNet, bottleneck": (0, 1, 1, 1, 2, 3, 3),
    "ConvNeXt": (0, 0, 0, 1, 2, 2, 2),
    "ConvNeXt V2": (0, 0, 0, 1, 2, 2, 2),
}


@dataclass(frozen=True)
class Vision:
    """A model with a batch that it takes."""

    name: str
    model: nn.Module
    x: Tensor
    y: Tensor

    @property
    def depth(self) -> int:
        """The number of residual steps, counted by hand."""
        return len(STAGES[self.name]) - 1


def vision(name: str, seed: int = 0) -> Vision:
    """A fresh model, in training mode, and a batch."""
    build, side = _BUILDERS[name]
    generator = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(BATCH, 3, side, side, generator=generator, dtype=torch.float64)
    y = torch.randint(CLASSES, (BATCH,), generator=generator)
    return Vision(name, shaken(build(), seed).train(), x, y)


def naive_walk(model: nn.Module, x: Tensor, removed: Iterable[int] = ()) -> list[Tensor]:
    """The states x_0 … x_N written out, without some blocks; batch norms as the model's mode is."""
    gone, kind = set(removed), model.config.model_type
    states: list[Tensor] = []
    if kind in ("vit", "dinov2"):
        x = model.base_model.embeddings(x)
        stages = [model.vit.layers if kind == "vit" else model.dinov2.encoder.layer]
    else:
        x = model.base_model.get_submodule("embedder" if kind == "resnet" else "embeddings")(x)
        stages = list(model.base_model.encoder.stages)
    n = 0
    for stage in stages:
        if kind.startswith("convnext"):
            for module in stage.downsampling_layer:
                x = module(x)
        for block in getattr(stage, "layers", stage):
            if n not in gone:
                states.append(x)
                x = block(x)
            n += 1
    return [*states, x]


def _running(x: Tensor, projection: nn.Module) -> Tensor:
    """A projection shortcut by the running statistics of its batch norm."""
    norm = projection.normalization
    y = F.conv2d(x, projection.convolution.weight, stride=projection.convolution.stride)
    mean, var, scale, bias = (
        t[:, None, None] for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    return (y - mean) / (var + norm.eps).sqrt() * scale + bias


def naive_carry(model: nn.Module, stage: int, x: Tensor) -> Tensor:
    """A state of a stage in the next stage's shape, written out."""
    stages = model.base_model.encoder.stages
    if model.config.model_type == "resnet":
        projections = [s.layers[0].shortcut for s in stages]
        projections = [p for p in projections if not isinstance(p, nn.Identity)]
        return _running(x, projections[stage]).clamp(min=0)
    norm, convolution = stages[stage + 1].downsampling_layer
    centred = x - x.mean(1, keepdim=True)
    x = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
    x = x * norm.weight[:, None, None] + norm.bias[:, None, None]
    return F.conv2d(x, convolution.weight, convolution.bias, stride=2)


def naive_head(model: nn.Module, x: Tensor) -> Tensor:
    """The logits of states of the last stage, written out."""
    kind = model.config.model_type
    if kind == "resnet":
        linear = model.classifier[1]
        return x.mean((2, 3)) @ linear.weight.T + linear.bias
    norm, linear = model.base_model.layernorm, model.classifier
    if kind.startswith("convnext"):
        x = x.mean((2, 3))
    centred = x - x.mean(-1, keepdim=True)
    x = centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    x = x * norm.weight + norm.bias
    if kind == "vit":
        x = x[:, 0]
    elif kind == "dinov2":
        x = torch.cat([x[:, 0], x[:, 1:].sum(1) / (x.shape[1] - 1)], dim=1)
    return x @ linear.weight.T + linear.bias


def naive_logits(name: str, model: nn.Module, stage: int, x: Tensor) -> Tensor:
    """z of one state: past all changes of shape, then the head."""
    for m in range(stage, STAGES[name][-1]):
        x = naive_carry(model, m, x)
    return naive_head(model, x)
