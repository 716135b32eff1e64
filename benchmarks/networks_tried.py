"""The networks that the adjoint's error is measured on, small and in float64, by family.

A family is a function of (depth, scale, seed) that gives a model and its loss. The scale is that of
the residual branch: T in h = T/N for our own chains, the initialiser's range for transformers, the
layer scale for ConvNeXt, the last norm's weight for ResNet.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import transformers as hf
from torch import Tensor, nn

from deeplimit import Euler, Heun, ResidualChain
from deeplimit.network.blocks import ConvolutionalResidual, TwoLayerResidual

Loss = Callable[[nn.Module], Tensor]
Family = Callable[[int, float, int], tuple[nn.Module, Loss]]
WIDTH, BATCH, CLASSES, IMAGE = 16, 4, 5, 16


def chain(
    activation: str, smooth: bool, heun: bool, dropout: float, depth: int, scale: float, seed: int
) -> tuple[nn.Module, Loss]:
    """Two-layer residuals, h = scale/N; controls A + B sin 2πs + C cos πs, or each drawn alone."""
    torch.manual_seed(seed)
    blocks = [TwoLayerResidual(WIDTH, 2 * WIDTH, activation) for _ in range(depth + heun)]
    if smooth:
        parts = [TwoLayerResidual(WIDTH, 2 * WIDTH, activation) for _ in range(3)]
        with torch.no_grad():
            for n, block in enumerate(blocks):
                factors = (1.0, math.sin(2 * math.pi * n / depth), math.cos(math.pi * n / depth))
                for name, theta in block.named_parameters():
                    theta.zero_()
                    for factor, part in zip(factors, parts, strict=True):
                        theta.add_(part.get_parameter(name), alpha=factor)
    parts_of = [nn.Sequential(b, nn.Dropout(dropout)) if dropout else b for b in blocks]
    model = ResidualChain(parts_of, step=scale / depth, scheme=Heun() if heun else Euler())
    return model.double(), partial(_free_loss, torch.randn(BATCH, WIDTH, dtype=torch.float64))


def convolutional(norm: str, depth: int, scale: float, seed: int) -> tuple[nn.Module, Loss]:
    """Convolutions with ReLU, in training mode, h = scale/N."""
    torch.manual_seed(seed)
    blocks = [ConvolutionalResidual(6, 6, norm, "relu") for _ in range(depth)]
    x = torch.randn(BATCH, 6, 5, 5, dtype=torch.float64)
    return ResidualChain(blocks, step=scale / depth).double(), partial(_free_loss, x)


def language(kind: str, depth: int, scale: float, seed: int) -> tuple[nn.Module, Loss]:
    """GPT-2 or Llama, predicting the next of random tokens; dropout as in the config."""
    torch.manual_seed(seed)
    if kind == "gpt2":
        config = hf.GPT2Config(
            vocab_size=50, n_positions=16, n_embd=WIDTH, n_layer=depth, n_head=2,
            initializer_range=scale, use_cache=False, bos_token_id=0, eos_token_id=1,
        )  # fmt: skip
        model: nn.Module = hf.GPT2LMHeadModel(config)
    else:
        config = hf.LlamaConfig(
            vocab_size=50, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_attention_heads=2,
            num_hidden_layers=depth, max_position_embeddings=16, initializer_range=scale,
            use_cache=False, pad_token_id=0, bos_token_id=0, eos_token_id=1,
        )  # fmt: skip
        model = hf.LlamaForCausalLM(config)
    tokens = torch.randint(50, (BATCH, 8))
    return model.double().train(), lambda m: m(input_ids=tokens, labels=tokens).loss


def vision(kind: str, depth: int, scale: float, seed: int) -> tuple[nn.Module, Loss]:
    """ViT, DINOv2, ConvNeXt or ResNet, classifying random images; one stage of `depth` blocks."""
    torch.manual_seed(seed)
    attention = {
        "hidden_size": WIDTH, "num_hidden_layers": depth, "num_attention_heads": 2,
        "intermediate_size": 2 * WIDTH, "mlp_ratio": 2, "image_size": IMAGE, "patch_size": 8,
        "initializer_range": scale, "num_labels": CLASSES,
    }  # fmt: skip
    stages = {"hidden_sizes": [8, 8], "depths": [1, depth - 1], "num_labels": CLASSES}
    model: nn.Module
    if kind == "vit":
        attention.pop("mlp_ratio")
        model = hf.ViTForImageClassification(hf.ViTConfig(**attention))
    elif kind == "dinov2":
        attention.pop("intermediate_size")
        model = hf.Dinov2ForImageClassification(hf.Dinov2Config(**attention))
    elif kind == "convnext":
        settings = {"patch_size": 2, "num_stages": 2, "initializer_range": 0.2}
        config = hf.ConvNextConfig(**stages, **settings, layer_scale_init_value=scale)
        model = hf.ConvNextForImageClassification(config)
    else:
        config = hf.ResNetConfig(**stages, embedding_size=8, layer_type="basic")
        model = hf.ResNetForImageClassification(config)
        for layer in model.modules():
            if isinstance(layer, hf.models.resnet.modeling_resnet.ResNetBasicLayer):
                nn.init.constant_(layer.layer[-1].normalization.weight, scale)
    images = torch.randn(BATCH, 3, IMAGE, IMAGE, dtype=torch.float64)
    labels = torch.randint(CLASSES, (BATCH,))
    return model.double().train(), lambda m: m(pixel_values=images, labels=labels).loss


def _free_loss(x: Tensor, model: nn.Module) -> Tensor:
    """Neither quadratic nor symmetric."""
    y = model(x)
    return (y.sin() + y.square() / 2).sum(dim=1).mean()


def _chains() -> dict[str, Family]:
    return {
        f"chain, {activation}, {'smooth' if smooth else 'independent'}, "
        f"{'Heun' if heun else 'Euler'}": partial(chain, activation, smooth, heun, 0.0)
        for activation in ("tanh", "gelu", "relu")
        for smooth in (True, False)
        for heun in (False, True)
    }


HORIZONS = (0.5, 2.0, 8.0)  # T in h = T/N
RANGES = (0.05, 0.15, 0.3)  # of the initialiser
BRANCHES = (0.1, 0.4, 1.0)  # layer scale, last norm's weight

FAMILIES: dict[str, tuple[Family, tuple[float, ...]]] = {
    **{name: (family, HORIZONS) for name, family in _chains().items()},
    "chain, tanh, independent, Euler, dropout": (
        partial(chain, "tanh", False, False, 0.1), HORIZONS),
    "convolutional, BatchNorm, ReLU": (partial(convolutional, "batch"), HORIZONS),
    "convolutional, GroupNorm, ReLU": (partial(convolutional, "group"), HORIZONS),
    "GPT-2": (partial(language, "gpt2"), RANGES),
    "Llama": (partial(language, "llama"), RANGES),
    "ViT": (partial(vision, "vit"), RANGES),
    "DINOv2": (partial(vision, "dinov2"), RANGES),
    "ConvNeXt": (partial(vision, "convnext"), BRANCHES),
    "ResNet": (partial(vision, "resnet"), BRANCHES),
}  # fmt: skip
