"""The ways to a gradient that are compared, on models of one chain of blocks."""

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deeplimit import ResidualChain, use_adjoint
from deeplimit.network.blocks import ConvolutionalResidual, TwoLayerResidual

Loss = Callable[[nn.Module], Tensor]
Method = Callable[[nn.Module], nn.Module]

# Compute must dominate what Python does; a step of the largest takes about a second on two cores.
SIZES: dict[str, dict[str, tuple[int, ...]]] = {
    "cpu": {"chain": (8, 16, 16, 16), "wide": (16, 32, 16, 16), "dinov2": (4, 192, 112)},
    "cuda": {"chain": (64, 64, 32, 32), "wide": (64, 128, 32, 32), "dinov2": (32, 768, 224)},
}
GAMMA = 0.9  # the momentum of momentumnet, as in its paper


def convolutional_chain(
    device: str, depth: int, norm: str = "group", size: str = "chain"
) -> tuple[nn.Module, Loss]:
    """x_{n+1} = x_n + φ_n(x_n)/N with two 3×3 convolutions, GELU between, and the norm."""
    torch.manual_seed(0)
    state = SIZES[device][size]
    blocks = [ConvolutionalResidual(state[1], state[1], norm, "gelu") for _ in range(depth)]
    x = torch.randn(state, device=device)
    return ResidualChain(blocks, step=1 / depth).to(device), lambda m: m(x).square().mean()


def dinov2(device: str, depth: int) -> tuple[nn.Module, Loss]:
    """DINOv2 of transformers from a config, unmodified, classifying random images."""
    torch.manual_seed(0)
    batch, width, image = SIZES[device]["dinov2"]
    config = hf.Dinov2Config(
        hidden_size=width, num_hidden_layers=depth, num_attention_heads=width // 64, mlp_ratio=4,
        image_size=image, patch_size=14, layerscale_value=0.1, num_labels=10,
    )  # fmt: skip
    images = torch.randn(batch, 3, image, image, device=device)
    labels = torch.randint(10, (batch,), device=device)
    model = hf.Dinov2ForImageClassification(config).train().to(device)
    return model, lambda m: m(pixel_values=images, labels=labels).loss


def tiny_chain(device: str, depth: int) -> tuple[nn.Module, Loss]:
    """Blocks so small that only what Python and the dispatcher do is left."""
    torch.manual_seed(0)
    blocks = [TwoLayerResidual(4, 4, "tanh") for _ in range(depth)]
    x = torch.randn(2, 4, device=device)
    return ResidualChain(blocks, step=1 / depth).to(device), lambda m: m(x).square().mean()


def plain(model: nn.Module) -> nn.Module:
    """Backpropagation through everything stored."""
    return model


def checkpointed(early_stop: bool, model: nn.Module) -> nn.Module:
    """torch.utils.checkpoint, non-reentrant, around each block, otherwise with its defaults."""
    save = partial(checkpoint, use_reentrant=False, early_stop=early_stop)
    for block in model.steps if isinstance(model, ResidualChain) else _layers(model):
        block.forward = partial(save, block.forward)  # type: ignore[method-assign]
    return model


def adjoint(evaluations: int, model: nn.Module) -> nn.Module:
    """States rebuilt backwards."""
    return use_adjoint(model, evaluations=evaluations, on_drift="ignore")


def momentumnet(model: nn.Module) -> nn.Module:
    """michaelsdr/momentumnet over the same blocks: another function, v ← γv + (1−γ)φ, x ← x + v."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from momentumnet import MomentumNet
    if isinstance(model, ResidualChain):
        blocks = [_Scaled(block, model.step) for block in model]
        return MomentumNet(blocks, gamma=GAMMA, use_backprop=False)
    layers = _layers(model)
    rival = MomentumNet(list(layers), gamma=GAMMA, use_backprop=False, is_residual=False)
    layers.__init__([_OfStateAlone(rival)])  # the model's own loop runs it as its one layer
    return model


METHODS: dict[str, Method] = {
    "plain": plain,
    "checkpoint": partial(checkpointed, False),
    "checkpoint, early stop": partial(checkpointed, True),
    "adjoint, e = 1": partial(adjoint, 1),
    "adjoint, e = 2": partial(adjoint, 2),
    "adjoint, e = 3": partial(adjoint, 3),
    "momentumnet": momentumnet,
}


class TrainingStep:
    """Forward, loss and backward, no optimiser, with one method on a copy of the model.

    Gradients are added to those that are there, so that no step but the first allocates any.
    """

    def __init__(self, method: str, model: nn.Module, loss: Loss, precision: str = "fp32"):
        self.model, self.loss = METHODS[method](copy.deepcopy(model)), loss
        self.kind = next(model.parameters()).device.type
        self.mixed = precision == "bf16"

    def __call__(self) -> None:
        """One step."""
        with torch.autocast(self.kind, torch.bfloat16, enabled=self.mixed):
            value = self.loss(self.model)
        value.backward()


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


class _Scaled(nn.Module):
    """hφ."""

    def __init__(self, block: nn.Module, step: float):
        super().__init__()
        self.block, self.step = block, step

    def forward(self, x: Tensor) -> Tensor:
        return self.step * self.block(x)


class _OfStateAlone(nn.Module):
    """A layer that leaves out arguments that are None, which momentumnet cannot take."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, *_: None) -> Tensor:
        return self.layer(x)


def _layers(model: nn.Module) -> Any:
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    return max(lists, key=len)
