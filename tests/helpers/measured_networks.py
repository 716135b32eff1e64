"""Small networks of every kind whose layers are means of particles, in float64 and seeded."""

import math
from collections.abc import Callable

import torch
from model_families import shaken
from torch import Tensor, nn

from deeplimit.meanfield import LayerwiseMeasure
from deeplimit.network import Architecture, ResidualChain, TwoLayerResidual

CLASSES, BATCH = 3, 4


def classifier(kind: str = "vector", seed: int = 0, **more: object) -> nn.Module:
    """A classifier, its parameters away from where they start."""
    shape = (1, 8, 8) if kind == "convolutional" else (5,)
    settings: dict = {"depths": (3,), "width": 4, "hidden": 6, "activation": "tanh", "step": 0.4}
    settings |= {"shape": shape, "classes": CLASSES, "norm": "none"} | more
    if kind == "convolutional":
        settings.setdefault("reduction", 2)
    return shaken(Architecture(kind, **settings).build(), seed).eval()


def framed(seed: int, **more: object) -> nn.Module:
    """Classifiers of one stem and head, whatever the seed."""
    model, shared = classifier(seed=seed, **more), classifier()
    model.stem, model.head = shared.stem, shared.head
    return model


@torch.no_grad()
def smooth_chain(depth: int, seed: int) -> nn.Module:
    """θ_n = a + b sin(2 s) at s = n/N, h = 1/N."""
    chain = ResidualChain([TwoLayerResidual(4, 5, "tanh") for _ in range(depth)], step=1 / depth)
    chain.double()
    generator = torch.Generator().manual_seed(seed)
    for name, like in chain[0].named_parameters():
        a, b = torch.randn(2, *like.shape, generator=generator, dtype=torch.float64)
        for n, block in enumerate(chain):
            block.get_parameter(name).copy_((a + b * math.sin(2 * n / depth)) / 2)
    return chain


def sequential_chain(seed: int = 0, widths: tuple[int, ...] = (3, 5, 4)) -> nn.Module:
    """A user's own residual functions, with output biases and layers of different widths."""
    blocks = [nn.Sequential(nn.Linear(4, m), nn.Tanh(), nn.Linear(m, 4)) for m in widths]
    return shaken(ResidualChain(blocks, step=0.5), seed)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "chain": lambda: shaken(
        ResidualChain([TwoLayerResidual(4, 6, "relu") for _ in range(3)], step=0.3)
    ),
    "chain of a user's blocks": sequential_chain,
    "vector": classifier,
    "logit": lambda: classifier("logit", width=CLASSES),
    "convolutional": lambda: classifier("convolutional"),
    "convolutional, two stages": lambda: classifier("convolutional", depths=(1, 2), hidden=0),
    "convolutional, batch norms": lambda: classifier("convolutional", norm="batch", depths=(2, 1)),
}


def inputs(model: nn.Module, seed: int = 0) -> Tensor:
    """A batch that the model takes."""
    generator = torch.Generator().manual_seed(seed)
    shape = model.architecture.shape if hasattr(model, "architecture") else (4,)
    return torch.randn(BATCH, *shape, generator=generator, dtype=torch.float64)


def output(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def relative(a: Tensor, b: Tensor) -> float:
    """Largest difference over the largest value."""
    return float((a - b).detach().abs().max() / b.detach().abs().max())


def cloud(*size: int, seed: int = 0, weighted: bool = False) -> LayerwiseMeasure:
    """Gaussian particles [N, M, p], of equal weights or of random ones."""
    generator = torch.Generator().manual_seed(seed)
    particles = torch.randn(size, generator=generator, dtype=torch.float64)
    weights = torch.rand(size[:2], generator=generator, dtype=torch.float64) + 0.1
    weights = weights / weights.sum(1, keepdim=True)
    return LayerwiseMeasure(particles, weights if weighted else None)
