"""A stage's Neural ODE the slow way: real modules with mixed parameters, scipy, full Jacobians."""

import copy
from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor, nn

Phi = Callable[[nn.Module, Tensor], Tensor]


def plain(block: nn.Module, x: Tensor) -> Tensor:
    """φ of our chains' blocks."""
    return block(x)


def added(block: nn.Module, x: Tensor) -> Tensor:
    """φ of blocks that return x + φ(x)."""
    y = block(x)
    return (y[0] if isinstance(y, tuple) else y) - x


class NaiveODE:
    """ẋ = φ(x, θ(s)) with θ(s) mixed into a module of its own, buffers included."""

    def __init__(self, blocks: Sequence[nn.Module], step: float, linear: bool, phi: Phi = plain):
        self.blocks, self.step, self.linear, self.phi = list(blocks), step, linear, phi
        self._mixed = copy.deepcopy(self.blocks[0])

    @torch.no_grad()
    def velocity(self, n: int, c: float, x: Tensor) -> Tensor:
        """φ(x, θ(s_n + c h)), inside interval n also beyond its ends."""
        left = self.blocks[n].state_dict()
        right = self.blocks[min(n + 1, len(self.blocks) - 1) if self.linear else n].state_dict()
        mixed = self._mixed.state_dict()
        for name, value in mixed.items():
            if value.is_floating_point():
                value.copy_((1 - c) * left[name] + c * right[name])
        return self.phi(self._mixed, x)

    def solution(
        self, x: Tensor, horizon: int, fractions: Sequence[float] = (1.0,), rtol: float = 1e-11
    ) -> Tensor:
        """x(s_n + c h) [horizon, fractions, samples, …], n < horizon."""
        found = []
        for n in range(horizon):

            def rhs(c: float, y: np.ndarray, n: int = n, shape: torch.Size = x.shape) -> np.ndarray:
                state = torch.from_numpy(y).view(shape)
                return self.step * self.velocity(n, c, state).flatten().numpy()

            path = solve_ivp(
                rhs,
                (0.0, 1.0),
                x.flatten().numpy(),
                method="DOP853",
                rtol=rtol,
                atol=rtol / 10,
                t_eval=fractions,
            )
            assert path.success
            states = torch.from_numpy(path.y.T.copy()).view(len(fractions), *x.shape)
            found.append(states)
            x = states[-1]
        return torch.stack(found)

    def gaps(self, states: Sequence[Tensor], rtol: float = 1e-11) -> Tensor:
        """‖x_n − x(s_n)‖ [N + 1, samples]."""
        x = states[0]
        own = torch.cat([x[None], self.solution(x, len(states) - 1, rtol=rtol)[:, -1]])
        return (torch.stack(list(states)) - own).flatten(2).norm(dim=2)

    def acceleration(self, n: int, c: float, x: Tensor, e: float = 1e-5) -> Tensor:
        """‖x″‖ [samples] by central differences of φ along the solution."""
        v = self.velocity(n, c, x)
        h = self.step
        after = self.velocity(n, c + e / h, x + e * v)
        before = self.velocity(n, c - e / h, x - e * v)
        return ((after - before) / (2 * e)).flatten(1).norm(dim=1)

    def jacobian_norm(self, n: int, x: Tensor) -> float:
        """The largest singular value of ∂φ/∂x(·, θ_n) over the samples, by a full SVD."""
        block = self.blocks[n]
        full = [
            torch.autograd.functional.jacobian(lambda y: self.phi(block, y[None])[0], sample)
            for sample in x
        ]
        return max(
            float(torch.linalg.matrix_norm(j.reshape(sample.numel(), -1), 2))
            for j, sample in zip(full, x, strict=True)
        )
