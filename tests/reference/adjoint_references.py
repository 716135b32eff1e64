"""Residual networks that are not ours, and plain backpropagation through them as the reference."""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Gradients = dict[str, Tensor]
LossOf = Callable[[Any, Any], Tensor]

WIDTH, DEPTH, BATCH = 8, 5, 4


class Block(nn.Module):
    """x + φ(x), φ a small pre-norm MLP: contracts well, so that few evaluations are exact enough.

    The second factor makes it differ from layer to layer in more than its parameters.
    """

    def __init__(self, width: int = WIDTH, gain: float = 0.1):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.gain = gain

    def residual(self, x: Tensor) -> Tensor:
        """φ(x)."""
        return self.gain * self.down(torch.tanh(self.up(self.norm(x))))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.residual(x)


class Tower(nn.Module):
    """A stem, residual blocks in a ModuleList and a head, as people write them."""

    def __init__(self, block: Callable[[], nn.Module] = Block, depth: int = DEPTH):
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(block() for _ in range(depth))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def tower(block: Callable[[], nn.Module] = Block, depth: int = DEPTH) -> Tower:
    """The same float64 tower each time."""
    torch.manual_seed(0)
    return Tower(block, depth).double()


def inputs(seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """A batch for a tower."""
    generator = torch.Generator().manual_seed(100 + seed)
    return torch.randn(BATCH, WIDTH, dtype=dtype, generator=generator)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    """Neither quadratic nor symmetric."""
    y = model(x)
    return (y.sin() + y.square() / 2).mean()


def gradients(
    model: nn.Module, batch: Any, loss: LossOf = loss_of, seed: int = 0
) -> tuple[Tensor, Gradients]:
    """(loss, ∇θ by name) of the model as it is switched now, by backward()."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    value = loss(model, batch)
    value.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return value.detach(), found


def exact_gradients(
    model: nn.Module, batch: Any, loss: LossOf = loss_of, seed: int = 0
) -> tuple[Tensor, Gradients]:
    """The same by plain backpropagation, on a copy of a model that is not switched."""
    return gradients(copy.deepcopy(model), batch, loss, seed)


def relative_error(got: Gradients, exact: Gradients) -> float:
    """‖g − g*‖ / ‖g*‖ over all parameters; both must have a gradient for the same ones."""
    assert got.keys() == exact.keys()
    gap = sum(float((got[name] - exact[name]).square().sum()) for name in exact)
    return math.sqrt(gap / sum(float(g.square().sum()) for g in exact.values()))
