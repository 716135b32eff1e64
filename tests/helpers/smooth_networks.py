"""Networks whose controls lie on one smooth curve, so that orders in N can be measured.

In float64 and seeded; two networks of one seed and different depths sample the same curve.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from deeplimit.network import Euler, Heun, ResidualChain, Scheme

WIDTH, HIDDEN, BATCH = 3, 5, 6


@torch.no_grad()
def on_a_curve(blocks: Sequence[nn.Module], span: float, seed: int = 0) -> None:
    """θ_n = a + b sin(2 s) + c cos(3 s) at s = n / span, entries of order one."""
    for i, name in enumerate(dict(blocks[0].named_parameters())):
        generator = torch.Generator().manual_seed(1000 * seed + i)
        shape = blocks[0].get_parameter(name).shape
        scale = shape[-1] ** -0.5 if len(shape) > 1 else 0.5
        a, b, c = (
            scale * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)
        )
        for n, block in enumerate(blocks):
            s = torch.tensor(n / span, dtype=torch.float64)
            block.get_parameter(name).copy_(a + b * (2 * s).sin() + c * (3 * s).cos())


class TanhResidual(nn.Module):
    """V tanh(W x + b) + c."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, HIDDEN)
        self.outer = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(x).tanh())


def smooth_chain(horizon: int, scheme: Scheme | None = None, seed: int = 0) -> ResidualChain:
    """h = 1/N, φ = V tanh(W x + b) + c."""
    scheme = scheme or Euler()
    blocks = [TanhResidual().double() for _ in range(horizon + scheme.nodes - 1)]
    on_a_curve(blocks, horizon, seed)
    return ResidualChain(blocks, step=1 / horizon, scheme=scheme)


class TanhBlock(TanhResidual):
    """x + V tanh(W x + b) + c, the step 1/N folded into V and c."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Folded(nn.Module):
    """A user's own network: a linear stem, blocks, a linear head."""

    def __init__(self, horizon: int) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(TanhBlock() for _ in range(horizon))
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@torch.no_grad()
def folded(horizon: int, seed: int = 0) -> Folded:
    """Smooth in depth; its updates are O(1/N)."""
    model = Folded(horizon).double()
    on_a_curve(list(model.blocks), horizon, seed)
    for block in model.blocks:
        for p in block.outer.parameters():
            p.div_(horizon)
    on_a_curve([model.stem], 1, seed + 1)
    on_a_curve([model.head], 1, seed + 2)
    return model


def batch(seed: int = 0, width: int = WIDTH) -> Tensor:
    """Inputs of order one."""
    generator = torch.Generator().manual_seed(7 + seed)
    return torch.randn(BATCH, width, generator=generator, dtype=torch.float64)


def slope(depths: Sequence[int], errors: Sequence[float]) -> float:
    """Of log error against log N, least squares."""
    n = torch.tensor(depths, dtype=torch.float64).log()
    e = torch.tensor(errors, dtype=torch.float64).log()
    n, e = n - n.mean(), e - e.mean()
    return float((n * e).sum() / (n * n).sum())


MAKERS: dict[str, Callable[[int], nn.Module]] = {
    "Euler": smooth_chain,
    "Heun": lambda horizon: smooth_chain(horizon, Heun()),
    "folded": folded,
}
