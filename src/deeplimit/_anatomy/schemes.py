"""One step of a discretisation: how the residual functions move the state from layer to layer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

Residual = Callable[[Tensor], Tensor]


@runtime_checkable
class Scheme(Protocol):
    """A discretisation of ẋ = φ(x, θ); a small object without state.

    Attributes:
        order: order of accuracy in h of the states, for controls smooth in depth.
        nodes: how many neighbouring controls one step uses; N steps need N + nodes − 1 controls.
    """

    @property
    def order(self) -> int:
        """Order of accuracy."""
        ...

    @property
    def nodes(self) -> int:
        """Controls per step."""
        ...

    def step(self, residuals: Sequence[Residual], x: Tensor, h: float) -> Tensor:
        """x_{n+1} from x_n, with the `nodes` residual functions φ(·, θ_n), φ(·, θ_{n+1}), …"""
        ...

    def inverse_start(self, residuals: Sequence[Residual], x: Tensor, h: float) -> Tensor:
        """A first guess of x_n from x_{n+1}, where a fixed point for x_n may start."""
        ...


@dataclass(frozen=True)
class Euler:
    """x_{n+1} = x_n + h φ(x_n, θ_n): an ordinary residual block. First order."""

    order = 1
    nodes = 1

    def step(self, residuals: Sequence[Residual], x: Tensor, h: float) -> Tensor:
        """One Euler step."""
        (residual,) = residuals
        return torch.add(x, residual(x), alpha=h)

    def inverse_start(self, residuals: Sequence[Residual], x: Tensor, h: float) -> Tensor:
        """x_{n+1} itself, an error of O(h)."""
        return x


@dataclass(frozen=True)
class Heun:
    """a = φ(x_n, θ_n),  x_{n+1} = x_n + h/2 (a + φ(x_n + h a, θ_{n+1})).

    Second order for controls smooth in depth; N steps use N + 1 controls θ_0 … θ_N, and a step is
    the identity only if both of its controls vanish. Source: [SAP22] arXiv 2205.14612.
    """

    order = 2
    nodes = 2

    def step(self, residuals: Sequence[Residual], x: Tensor, h: float) -> Tensor:
        """One step of Heun's method."""
        left, right = residuals
        a = left(x)
        return torch.add(x, a + right(torch.add(x, a, alpha=h)), alpha=h / 2)

    def inverse_start(self, residuals: Sequence[Residual], x: Tensor, h: float) -> Tensor:
        """A step of Heun's method backwards: b = φ(x, θ_{n+1}),  x − h/2 (b + φ(x − h b, θ_n)).

        An error of O(h⁴) for controls smooth in depth, O(h²) for independent ones. Source: [SAP22].
        """
        left, right = residuals
        b = right(x)
        return torch.add(x, b + left(torch.add(x, b, alpha=-h)), alpha=-h / 2)


SCHEMES: dict[str, Scheme] = {"euler": Euler(), "heun": Heun()}
