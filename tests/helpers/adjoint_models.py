"""Somebody else's blocks in float64, and their gradients with and without kept states."""

import torch
from torch import Tensor, nn

from deeplimit import use_adjoint, use_backprop

EXACT = 1e-11  # what 60 evaluations of a contraction leave


MANY = {"evaluations": 60, "tolerance": 1e-6, "on_drift": "raise"}


class Block(nn.Module):
    """Somebody else's block: it adds its input itself."""

    def __init__(self, width: int = 6, dropout: float = 0.0, gain: float = 0.2):
        super().__init__()
        self.inner, self.outer = nn.Linear(width, 12), nn.Linear(12, width)
        self.dropout, self.gain = nn.Dropout(dropout), gain

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gain * self.outer(self.dropout(self.inner(x).tanh()))


def sequence(depth: int = 6, **settings: float) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Block(**settings) for _ in range(depth))).double()  # type: ignore[arg-type]


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.manual_seed(7))


def gradients(model: nn.Module, x: Tensor) -> list[Tensor | None]:
    """All ∇θ and ∇x_0 of a loss on the output, with `.grad` as training has it."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(3)
    model(x).sin().sum().backward()
    found = [x.grad, *(p.grad for p in model.parameters())]
    return [None if g is None else g.clone() for g in found]


def assert_equal(got: list[Tensor | None], expected: list[Tensor | None], atol: float) -> None:
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=0, atol=atol)


def same_gradients(model: nn.Module, x: Tensor, atol: float = EXACT) -> None:
    expected = gradients(use_backprop(model), x)
    use_adjoint(model, **MANY)  # type: ignore[arg-type]
    for _ in range(2):  # the first run, which finds the blocks, and a later one
        assert_equal(gradients(model, x), expected, atol)
