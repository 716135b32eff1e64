"""Training as a gradient flow of measures: an optimiser whose steps do not know width and depth."""

import math
from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from deeplimit._anatomy.checks import check_number, shown
from deeplimit.errors import InputError
from deeplimit.meanfield.coordinates import Coordinate, coordinates


class ParticleFlow(Optimizer):
    """Moves points ω = scale · θ, each of a mass, by g = (1/mass) ∂L/∂ω.

    In the parameters θ that a network holds, with g = ∂L/∂θ / (mass · scale):

        Euler step of the flow     ω ← ω − lr g,            that is  θ ← θ − lr g / scale
        momentum β                 v ← βv + g,              ω ← ω − lr v
        Adam (β₁, β₂)              m ← β₁m + (1−β₁)g,  v ← β₂v + (1−β₂)g²,
                                   ω ← ω − lr m̂ / (√v̂ + ε)

    all with θ ← θ + dω/scale. `particle_flow` finds scale and mass in a network.

    Args:
        params: parameters, or groups of them that may set `scale` and `mass` (1 otherwise).
        lr: the step of the flow's time.
        momentum: 0 ≤ β < 1; a step moves as far as one of lr/(1 − β) does in the long run.
        betas: (β₁, β₂) for Adam-like steps, without momentum.
        eps: ε of Adam, on the scale of g.

    Raises:
        InputError: a setting out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        momentum: float = 0.0,
        betas: tuple[float, float] | None = None,
        eps: float = 1e-8,
    ):
        _check(lr, momentum, betas, eps)
        settings = {"lr": lr, "momentum": momentum, "betas": betas, "eps": eps}
        super().__init__(params, settings | {"scale": 1.0, "mass": 1.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; the closure, where there is one, computes loss and gradients first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                velocity = parameter.grad / (group["mass"] * group["scale"])
                direction = self._direction(self.state[parameter], velocity, group)
                parameter.add_(direction, alpha=-group["lr"] / group["scale"])
        return loss

    def _direction(self, state: dict[str, Any], velocity: Tensor, group: dict[str, Any]) -> Tensor:
        if group["betas"] is not None:
            return _adam(state, velocity, group["betas"], group["eps"])
        if not group["momentum"]:
            return velocity
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(velocity)
        return state["momentum_buffer"].mul_(group["momentum"]).add_(velocity)


def _adam(
    state: dict[str, Any], velocity: Tensor, betas: tuple[float, float], eps: float
) -> Tensor:
    if not state:
        state["step"] = 0
        state["exp_avg"] = torch.zeros_like(velocity)
        state["exp_avg_sq"] = torch.zeros_like(velocity)
    state["step"] += 1
    mean = state["exp_avg"].lerp_(velocity, 1 - betas[0])
    square = state["exp_avg_sq"].mul_(betas[1]).addcmul_(velocity, velocity, value=1 - betas[1])
    corrections = [1 - beta ** state["step"] for beta in betas]
    return mean / corrections[0] / ((square / corrections[1]).sqrt() + eps)


def particle_flow(
    model: nn.Module,
    lr: float,
    *,
    momentum: float = 0.0,
    betas: tuple[float, float] | None = None,
    eps: float = 1e-8,
    others: float = 1.0,
) -> ParticleFlow:
    """The optimiser that follows the gradient flow of the risk w.r.t. the COT distance.

    A layer x + h Σ_i V_i σ(w_i·x + b_i), one of N, is a mean of M particles ω_i = (u_i, w_i, b_i)
    with u_i = N·M·h·V_i, and the flow of the risk L moves each by

        dω_{n,i}/dt = −N·M·∂L/∂ω_{n,i}.

    Since ∂L/∂u = ∂L/∂V · ∂V/∂u = ∂L/∂V/(N·M·h) and dV = du/(N·M·h), in the weights that a network
    holds this is

        dV/dt = −N·M·(N·M·h)^{−2} ∂L/∂V = −∂L/∂V / (N·M·h²),
        dw/dt = −N·M·∂L/∂w,    db/dt = −N·M·∂L/∂b;

    the first is −∂L/∂V/(N·M) for h = 1 and −(N/M)·∂L/∂V for h = 1/N. What moves is the measure:
    splitting every particle in two (2M of half the V) changes nothing, doubling the depth (each
    layer twice, at h/2) moves the risk's course by O(1/N).

    With momentum v ← βv + N·M·∂L/∂ω, ω ← ω − lr·v. Adam divides by the size of the gradient, so
    that N·M drops out of it; each of its steps moves every number of (u, w, b) by about lr, hence V
    by lr/(N·M·h), and ε stands beside √v̂ of N·M·∂L/∂ω. Both keep what is said above, but follow no
    gradient flow: the certificate of convergence speaks of the plain one.

    Convolutional two-layer residuals without norms (a particle is a hidden channel) and the MLPs of
    transformers (a hidden neuron) go the same way; h = 1 where a model has no step. Layers may
    differ in width. Stages divide the depth evenly, as in `LayerwiseMeasure`.

    Parameters that belong to no particle (stem, head, attention, norms) take an ordinary step of
    lr·others, −lr·others·∂L/∂θ or Adam's. A layer's bias c behind V is the same for all particles;
    it moves as the point N·h·c of mass 1/N, by −∂L/∂c/(N·h²).

    In `param_groups` the learning rate of every group is lr, or lr·others; `scale` and `mass` stand
    beside it. Schedulers therefore act on the flow's time.

    Args:
        model: one with `ResidualChain`s, or one that `anatomy` can read.
        lr: the step of the flow's time; of a size that does not depend on width and depth.
        momentum: 0 ≤ β < 1.
        betas: (β₁, β₂) for Adam-like steps, such as (0.9, 0.999).
        eps: ε of Adam.
        others: factor on the learning rate of parameters that belong to no particle; at 0 they
            stay as they are.

    Raises:
        InputError: lr ≤ 0 or another setting out of range, a network that is not a mean of
            particles, nothing to train, or parameters that are not finite.

    Source: [BPV24] arXiv 2403.12887; momentum and Adam are ours.
    """
    _check(lr, momentum, betas, eps)
    every = coordinates(model, others)
    if not every:
        raise InputError(
            f"no parameter of this {type(model).__name__} is to be trained; set requires_grad"
        )
    groups: dict[tuple[float, float, float], list[nn.Parameter]] = {}
    for c in every:
        groups.setdefault(_settings(c, lr, others), []).append(c.parameter)
    made = [
        {"params": parameters, "lr": rate, "scale": scale, "mass": mass}
        for (rate, scale, mass), parameters in groups.items()
    ]
    return ParticleFlow(made, lr, momentum=momentum, betas=betas, eps=eps)


def _settings(c: Coordinate, lr: float, others: float) -> tuple[float, float, float]:
    """Learning rate, scale and mass of a parameter's group."""
    return (lr * others, 1.0, 1.0) if c.role == "other" else (lr, c.scale, c.mass)


def _check(lr: float, momentum: float, betas: tuple[float, float] | None, eps: float) -> None:
    check_number("lr", lr, "a number above 0, a step of the flow's time", _positive)
    check_number("momentum", momentum, "0 ≤ momentum < 1", _below_one)
    check_number("eps", eps, "a number above 0", _positive)
    if betas is None:
        return
    pair = isinstance(betas, Sequence) and len(betas) == 2
    if not pair or not all(isinstance(v, Real) and 0 <= float(v) < 1 for v in betas):
        raise InputError(
            f"betas are {shown(betas)}; expected two numbers in [0, 1), such as (0.9, 0.999)"
        )
    if momentum:
        raise InputError("momentum and betas were given; expected one of them")


def _positive(value: float) -> bool:
    return math.isfinite(value) and value > 0


def _below_one(value: float) -> bool:
    return 0 <= value < 1
