"""References: plain backpropagation, and the scheme of [SAP22] (arXiv 2205.14612) written out."""

import itertools
import math
from functools import cache

import torch
from torch import Tensor

from deeplimit import Heun, ResidualChain, drift, use_adjoint, use_backprop
from deeplimit.network.blocks import TwoLayerResidual

WIDTH, HIDDEN, BATCH, GAIN = 16, 32, 8, 1.0


def chain_of(
    depth: int, activation: str, *, smooth: bool, heun: bool = False, seed: int = 0
) -> ResidualChain:
    """Two-layer residuals with h = 1/N, float64; controls smooth in depth, or each drawn alone.

    Smooth: θ(s) = A + B sin 2πs + C cos πs at the nodes s_n = n/N.
    """
    torch.manual_seed(seed)

    def block() -> TwoLayerResidual:
        return TwoLayerResidual(WIDTH, HIDDEN, activation).double()

    blocks = [block() for _ in range(depth + heun)]
    parts = [block() for _ in range(3)]
    with torch.no_grad():
        for n, phi in enumerate(blocks):
            s = n / depth
            factors = (1.0, math.sin(2 * math.pi * s), math.cos(math.pi * s))
            for name, theta in phi.named_parameters():
                if smooth:
                    curve = zip(factors, parts, strict=True)
                    theta.copy_(sum(f * part.get_parameter(name) for f, part in curve))  # type: ignore[arg-type]
                theta.mul_(GAIN)
    return ResidualChain(blocks, step=1 / depth, scheme=Heun() if heun else None)


def batch(seed: int = 0) -> Tensor:
    """x_0, the same for every depth."""
    return torch.randn(BATCH, WIDTH, dtype=torch.float64, generator=torch.manual_seed(1000 + seed))


def loss_of(x: Tensor) -> Tensor:
    """Neither quadratic nor symmetric."""
    return (x.sin() + x.square() / 2).sum(dim=1).mean()


Gradient = tuple[Tensor, list[Tensor]]


def gradient(chain: ResidualChain, x: Tensor) -> Gradient:
    """(∇x_0, all ∇θ) of the chain as it is switched now."""
    x = x.clone().requires_grad_()
    first, *rest = torch.autograd.grad(loss_of(chain(x)), [x, *chain.parameters()])
    return first, rest


def relative(got: list[Tensor], exact: list[Tensor]) -> float:
    """‖got − exact‖ / ‖exact‖ over all."""
    gap = sum(float((a - b).square().sum()) for a, b in zip(got, exact, strict=True))
    return math.sqrt(gap / sum(float(b.square().sum()) for b in exact))


def errors(
    chain: ResidualChain, x: Tensor, evaluations: int, exact: Gradient | None = None
) -> tuple[float, float, float]:
    """Relative errors of the rebuilt x_1 (the last of all), of ∇x_0 and of all ∇θ."""
    use_backprop(chain)
    exact = exact or gradient(chain, x)
    with torch.no_grad():
        _, x1, x2 = chain.trajectory(x)[:3]
    got = gradient(use_adjoint(chain, evaluations=evaluations, on_drift="ignore"), x)
    state = drift(chain) * float((x2 - x1).norm() / x1.norm())
    return state, relative([got[0]], [exact[0]]), relative(got[1], exact[1])


def paper_gradient(chain: ResidualChain, x: Tensor) -> Gradient:
    """[SAP22]: rebuild x̃_n by the backward step, then the VJP of the step at x̃_n. No refinement.

    Euler: x̃_n = x_{n+1} − hφ(x_{n+1}, θ_n). Heun: its backward step. Two evaluations per step.
    """
    h = chain.step
    with torch.no_grad():
        state = chain(x)
    leaf = state.clone().requires_grad_()
    (adjoint,) = torch.autograd.grad(loss_of(leaf), [leaf])
    total = {theta: torch.zeros_like(theta) for theta in chain.parameters()}
    for n in reversed(range(chain.horizon)):
        with torch.no_grad():
            if isinstance(chain.scheme, Heun):
                left, right = chain.controls(n)
                b = right(state)
                state = state - h / 2 * (b + left(state - h * b))
            else:
                state = state - h * chain.controls(n)[0](state)
        leaf = state.clone().requires_grad_()
        own = list(itertools.chain(*(m.parameters() for m in chain.controls(n))))
        adjoint, *parts = torch.autograd.grad(chain.advance(n, leaf), [leaf, *own], adjoint)
        for theta, part in zip(own, parts, strict=True):
            total[theta] += part
    return adjoint, [total[theta] for theta in chain.parameters()]


def slope(depths: list[int], values: list[float]) -> float:
    """Least-squares slope of log value against log depth."""
    a = torch.tensor(depths, dtype=torch.float64).log()
    b = torch.tensor(values, dtype=torch.float64).log()
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / (a * a).sum())


@cache
def case(
    depth: int, activation: str, smooth: bool, heun: bool, seed: int
) -> tuple[ResidualChain, Tensor, Gradient]:
    """A chain, its batch and its gradient, the same for every number of evaluations."""
    chain, x = chain_of(depth, activation, smooth=smooth, heun=heun, seed=seed), batch(seed)
    return chain, x, gradient(chain, x)


def mean_slopes(
    activation: str, evaluations: int, *, smooth: bool, heun: bool, depths: list[int], seeds: int
) -> list[float]:
    """Slopes of the errors of states, ∇x_0 and ∇θ, from geometric means over seeds."""
    rows = []
    for depth in depths:
        cases = [case(depth, activation, smooth, heun, seed) for seed in range(seeds)]
        found = [errors(chain, x, evaluations, exact) for chain, x, exact in cases]
        rows.append([math.exp(sum(map(_log, c)) / seeds) for c in zip(*found, strict=True)])
    return [slope(depths, list(column)) for column in zip(*rows, strict=True)]


def _log(value: float) -> float:
    return math.log(max(value, 1e-300))  # ReLU networks are linear for a while: no error at all
