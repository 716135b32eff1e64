"""Small networks of particles in float64, their data, and copies split in width and depth."""

import copy
import math

import torch
from torch import Tensor, nn

from deeplimit.network import ResidualChain, TwoLayerResidual

STATE, SAMPLES = 3, 7


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


X, TARGET = drawn(SAMPLES, STATE, seed=100), drawn(SAMPLES, STATE, seed=101)


@torch.no_grad()
def chain(
    horizon: int,
    widths: int | list[int],
    *,
    step: float | None = None,
    size: float = 0.5,
    gain: float = 1.0,
    seed: int = 0,
) -> ResidualChain:
    """Particles with u of this size, w of this gain, b of order one, smooth in depth."""
    every = widths if isinstance(widths, list) else [widths] * horizon
    h = 1 / horizon if step is None else step
    blocks = []
    for n, width in enumerate(every):
        block = TwoLayerResidual(STATE, width, "tanh").double()
        s = n / horizon
        for i, (p, scale) in enumerate(
            ((block.inner.weight, gain), (block.inner.bias, 1.0), (block.outer.weight, size))
        ):
            a, b = (drawn(*p.shape, seed=10 * seed + 2 * i + k) for k in (0, 1))
            p.copy_(scale * (a * math.cos(s) + b * math.sin(s)))
        block.outer.weight.div_(horizon * width * h)
        blocks.append(block)
    return ResidualChain(blocks, step=h)


def risk_of(model: nn.Module, x: Tensor = X, y: Tensor = TARGET) -> Tensor:
    """1/(2D) Σ ‖z − y‖²."""
    return (model(x) - y).square().sum() / (2 * len(x))


def backward(model: nn.Module) -> float:
    """Sets the gradients; returns the risk."""
    model.zero_grad()
    risk = risk_of(model)
    risk.backward()
    return float(risk.detach())


@torch.no_grad()
def split_width(model: ResidualChain) -> ResidualChain:
    """Every particle twice, with half the output weight each: the same measure."""
    blocks = []
    for old in model:
        new = TwoLayerResidual(STATE, 2 * old.inner.out_features, "tanh").double()
        new.inner.weight.copy_(old.inner.weight.repeat(2, 1))
        new.inner.bias.copy_(old.inner.bias.repeat(2))
        new.outer.weight.copy_(old.outer.weight.repeat(1, 2) / 2)
        blocks.append(new)
    return ResidualChain(blocks, step=model.step)


def split_depth(model: ResidualChain) -> ResidualChain:
    """Every layer twice at half the step: the same measure."""
    return ResidualChain(
        [copy.deepcopy(block) for block in model for _ in range(2)], step=model.step / 2
    )
