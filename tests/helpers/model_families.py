"""One small model of every kind that an anatomy of ours reads, none of them at its initial values.

Everything is float64 and seeded. All parameters, running statistics and standardisations are moved
away from their starting values, so that no residual function vanishes and no norm is the identity.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deeplimit.network import (
    Architecture,
    CifarArchitecture,
    CifarResNet,
    Heun,
    LinearResidual,
    ResidualChain,
    TwoLayerResidual,
)

CLASSES = 4
BATCH = 6


@torch.no_grad()
def shaken(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in float64 with random parameters and random figures in its norms."""
    generator = torch.Generator().manual_seed(seed)
    model.double()
    for parameter in model.parameters():
        fan_in = max(parameter[0].numel(), 1)
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.copy_(noise * fan_in**-0.5 if parameter.dim() > 1 else 0.5 * noise + 0.3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            size = module.running_mean.shape
            module.running_mean.copy_(0.3 * torch.randn(size, generator=generator))
            module.running_var.copy_(0.5 + torch.rand(size, generator=generator))
            module.num_batches_tracked.fill_(7)
    for name, buffer in model.named_buffers():
        if name.endswith("std") or name.endswith("mean"):
            buffer.copy_(0.3 + torch.rand(buffer.shape, generator=generator))
    return model


def _chain(scheme: object = None, blocks: int = 5) -> ResidualChain:
    residuals = [TwoLayerResidual(CLASSES, 7, "tanh") for _ in range(blocks)]
    return ResidualChain(residuals, step=0.3, scheme=scheme)


def _classifier(
    kind: str, shape: tuple[int, ...], depths: tuple[int, ...], **more: object
) -> Callable:
    settings: dict = {"width": 4, "hidden": 5, "activation": "tanh", "step": 0.4} | more
    return lambda: Architecture(kind, shape, CLASSES, depths, **settings).build()


def _cifar(depths: tuple[int, ...], strided: tuple[bool, ...]) -> Callable:
    return lambda: CifarResNet(CifarArchitecture(depths, strided, CLASSES))


IMAGE = (3, 8, 8)
_BUILDERS: dict[str, tuple[tuple[int, ...], Callable[[], nn.Module]]] = {
    "chain": ((CLASSES,), _chain),
    "chain, Heun": ((CLASSES,), lambda: _chain(Heun())),
    "chain, linear": (
        (CLASSES,),
        lambda: ResidualChain([LinearResidual(CLASSES) for _ in range(4)], step=0.2),
    ),
    "logit": ((CLASSES,), _classifier("logit", (CLASSES,), (4,))),
    "logit, Heun, with a stem": ((6,), _classifier("logit", (6,), (4,), scheme="heun")),
    "vector": ((6,), _classifier("vector", (6,), (4,), width=5)),
    "vector, Heun": ((6,), _classifier("vector", (6,), (3,), width=6, scheme="heun")),
    "vector, linear, from images": ((2, 2, 2), _classifier("vector", (2, 2, 2), (3,), hidden=0)),
    "convolutional, batch": (IMAGE, _classifier("convolutional", IMAGE, (3,), reduction=2)),
    "convolutional, group": (
        IMAGE,
        _classifier("convolutional", IMAGE, (3,), norm="group", reduction=1),
    ),
    "convolutional, no norm, Heun": (
        IMAGE,
        _classifier("convolutional", IMAGE, (2,), norm="none", scheme="heun"),
    ),
    "three stages, batch": (IMAGE, _classifier("convolutional", IMAGE, (2, 1, 2), reduction=1)),
    "three stages, batch, Heun": (
        IMAGE,
        _classifier("convolutional", IMAGE, (1, 2, 1), scheme="heun", reduction=1),
    ),
    "three stages, group": (
        IMAGE,
        _classifier("convolutional", IMAGE, (2, 1, 1), norm="group", reduction=1),
    ),
    "three stages, no norm": (
        IMAGE,
        _classifier("convolutional", IMAGE, (1, 1, 2), norm="none", reduction=1),
    ),
    "three stages, batch, the middle one empty": (
        IMAGE,
        _classifier("convolutional", IMAGE, (2, 0, 1), reduction=1),
    ),
    "CIFAR ResNet": (IMAGE, _cifar((2, 2, 2), (True, True))),
    "CIFAR ResNet, cut": (IMAGE, _cifar((1, 1, 2), (False, True))),
}
FAMILIES = tuple(_BUILDERS)


@dataclass(frozen=True)
class Sample:
    """A model with a batch that it takes."""

    name: str
    model: nn.Module
    x: Tensor
    y: Tensor

    @property
    def depth(self) -> int:
        """The number of residual steps, counted by hand."""
        if isinstance(self.model, ResidualChain):
            return len(self.model) - (self.model.scheme == Heun())
        return sum(self.model.architecture.depths)


def sample(name: str, seed: int = 0) -> Sample:
    """A fresh model of a family, in training mode, and a batch."""
    shape, build = _BUILDERS[name]
    generator = torch.Generator().manual_seed(seed + 1)
    x = torch.rand(BATCH, *shape, generator=generator, dtype=torch.float64)
    y = torch.randint(CLASSES, (BATCH,), generator=generator)
    return Sample(name, shaken(build(), seed), x, y)
