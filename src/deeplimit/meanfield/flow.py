"""Training as a gradient flow of measures, whose steps do not know width and depth."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from deeplimit._anatomy import Anatomy, model_of
from deeplimit._anatomy.checks import check_number, shown
from deeplimit.errors import InputError
from deeplimit.meanfield.particles import ParticleLayer, particle_layers
from deeplimit.network.blocks import check_values

Role = Literal["particle", "offset", "other"]


@dataclass(frozen=True)
class Coordinate:
    """A parameter θ as part of a point ω = scale · θ that has a mass.

    With the squared length Σ mass ‖dω‖² the gradient flow of a risk L moves θ by

        dθ/dt = −rate ∂L/∂θ,    rate = 1/(mass · scale²).
    """

    parameter: nn.Parameter
    scale: float  # ∂ω/∂θ: N·M·h for the output weights of particles, 1 for their inner weights
    mass: float  # of one particle, 1/(N·M)
    role: Role  # a part of particles, the bias that all of a layer's share, or neither

    @property
    def rate(self) -> float:
        """1/(mass · scale²)."""
        return 1 / (self.mass * self.scale**2)


def coordinates(model: nn.Module | Anatomy, others: float = 1.0) -> tuple[Coordinate, ...]:
    """The coordinates of a network's trainable parameters; `particle_flow` has the formulas.

    Layers that share a parameter add their masses. N is the number of stages times the layers of
    the layer's own. `others` is the rate of what belongs to no particle; at 0 that is left out.
    """
    model = model_of(model)
    expected = "a number ≥ 0, 0 to leave them as they are"
    others = check_number("others", others, expected, lambda v: 0 <= v < math.inf)
    check_values(model.named_parameters())
    layers = particle_layers(model, trained=True)
    stages = len({layer.stack.index for layer in layers})
    found: dict[nn.Parameter, Coordinate] = {}
    for layer in layers:
        depth, h = stages * len(layer.stack.blocks), layer.stack.step
        for new in _of_layer(layer, 1 / depth, h):
            old = found.get(new.parameter)
            if old is not None and old.scale != new.scale:
                raise InputError(
                    "a parameter is shared by layers of different steps, or of stages of different "
                    "depth; its particles have no common scale: give each its own"
                )
            found[new.parameter] = replace(new, mass=new.mass + (old.mass if old else 0.0))
    if others > 0:
        rest = [p for p in model.parameters() if p not in found]
        found |= {p: Coordinate(p, 1.0, 1 / others, "other") for p in rest}
    return tuple(c for p, c in found.items() if p.requires_grad)


def _of_layer(layer: ParticleLayer, length: float, step: float) -> list[Coordinate]:
    """Those of x + h (Σ_i V_i σ(w_i·x + b_i) + c), of M particles."""
    neurons, mass = layer.neurons, length / len(layer.reading.particles)
    last = layer.block.get_submodule(neurons.columns)
    outer, bias = cast(nn.Parameter, last.weight), cast(nn.Parameter | None, last.bias)
    inner = [p for row in neurons.rows for p in layer.block.get_submodule(row).parameters()]
    found = [Coordinate(parameter, 1.0, mass, "particle") for parameter in inner]
    found.append(Coordinate(outer, step / mass, mass, "particle"))
    if bias is not None:
        found.append(Coordinate(bias, step / length, length, "offset"))
    return found


def slope(model: nn.Module | Anatomy, *, others: float = 1.0) -> float:
    """Measures ‖∇L‖_μ of the risk L whose gradients the parameters have, after `loss.backward()`.

        ‖∇L‖²_μ = N·M·Σ_{n,i} ‖∂L/∂ω_{n,i}‖²,    ω = (u, w, b),  u = N·M·h·V,

    summed over layers of widths M_n where these differ; in the parameters that a network holds
    Σ_n ‖∂L/∂V‖²/(N·M·h²) + N·M·(‖∂L/∂W‖² + ‖∂L/∂b‖²). What is trained besides belongs to the flow:
    a layer's bias c behind V adds ‖∂L/∂c‖²/(N·h²), other parameters add others·‖∂L/∂θ‖². Along the
    flow dL/dt = −‖∇L‖²_μ.

        >>> wide = widen(model, 2)
        >>> model(x).square().mean().backward(), wide(x).square().mean().backward()
        (None, None)
        >>> bool(abs(slope(wide) / slope(model) - 1) < 1e-9)
        True

    Frozen parameters and those without a gradient count as 0. Source: [BPV24] arXiv 2403.12887.

    Args:
        model: the network, as for `particle_flow`.
        others: as given to `particle_flow`; 0 for a flow of the particles alone.

    Raises:
        InputError: a network that is not a mean of particles, no gradient at all, or values that
            are not finite.
    """
    return slope_of(coordinates(model, others))


@torch.no_grad()
def slope_of(every: Sequence[Coordinate]) -> float:
    """√(Σ rate ‖∂L/∂θ‖²), from the gradients that the parameters have now."""
    with_gradient = [(c.rate, c.parameter.grad) for c in every if c.parameter.grad is not None]
    if not with_gradient:
        raise InputError("the parameters have no gradients; call loss.backward() first")
    value = math.sqrt(sum(rate * _square(grad) for rate, grad in with_gradient))
    if not math.isfinite(value):
        raise InputError(
            "the gradients have numbers that are not finite; take weights from before the training "
            "diverged, or a smaller lr"
        )
    return value


@torch.no_grad()
def length(changes: Iterable[tuple[Coordinate, Tensor]]) -> float:
    """√(Σ mass ‖dω‖²) of changes dθ of parameters: ω = scale · θ."""
    return math.sqrt(sum(_square(change) / c.rate for c, change in changes))


def _square(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x.double()).square())


class ParticleFlow(Optimizer):
    """Moves points ω = scale · θ, each of a mass, by g = (1/mass) ∂L/∂ω.

    In the parameters θ that a network holds, with g = ∂L/∂θ / (mass · scale):

        Euler step of the flow     ω ← ω − lr g,            that is  θ ← θ − lr g / scale
        momentum β                 v ← βv + g,              ω ← ω − lr v
        Adam (β₁, β₂)              m ← β₁m + (1−β₁)g,  v ← β₂v + (1−β₂)g²,
                                   ω ← ω − lr m̂ / (√v̂ + ε)

    all with θ ← θ + dω/scale. `particle_flow` finds scale and mass in a network.

        >>> flow = ParticleFlow([{"params": model.parameters(), "mass": 0.5}], 0.1)
        >>> flow.param_groups[0]["scale"], flow.param_groups[0]["mass"]
        (1.0, 0.5)

    Source: [BPV24] arXiv 2403.12887; momentum and Adam are ours.

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
        if group["betas"] is None and not group["momentum"]:
            return velocity
        names = ("momentum_buffer",) if group["betas"] is None else ("exp_avg", "exp_avg_sq")
        if not state:
            state.update({name: torch.zeros_like(velocity) for name in names})
        if group["betas"] is None:
            buffer: Tensor = state["momentum_buffer"]
            return buffer.mul_(group["momentum"]).add_(velocity)
        state["step"] = state.get("step", 0) + 1
        first, second = group["betas"]
        mean: Tensor = state["exp_avg"].lerp_(velocity, 1 - first)
        square: Tensor = state["exp_avg_sq"].mul_(second)
        square.addcmul_(velocity, velocity, value=1 - second)
        least, most = (1 - beta ** state["step"] for beta in group["betas"])
        step: Tensor = mean / least / ((square / most).sqrt() + group["eps"])
        return step


def particle_flow(
    model: nn.Module | Anatomy,
    lr: float,
    *,
    momentum: float = 0.0,
    betas: tuple[float, float] | None = None,
    eps: float = 1e-8,
    others: float = 1.0,
) -> ParticleFlow:
    """Makes the optimiser that follows the gradient flow of the risk w.r.t. the COT distance.

    A layer x + h Σ_i V_i σ(w_i·x + b_i), one of N, is a mean of M particles ω_i = (u_i, w_i, b_i)
    with u_i = N·M·h·V_i, and the flow of the risk L moves each by

        dω_{n,i}/dt = −N·M·∂L/∂ω_{n,i},    that is    dV/dt = −∂L/∂V / (N·M·h²)

    and dw/dt = −N·M·∂L/∂w, db/dt = −N·M·∂L/∂b. What moves is the measure: splitting every particle
    in two (2M of half the V) changes nothing, doubling the depth (each layer twice, at h/2) moves
    the risk's course by O(1/N). Momentum and Adam, as in `ParticleFlow`, keep this, but follow no
    gradient flow: the certificate of convergence speaks of the plain one. A step of Adam moves
    every number of (u, w, b) by about lr, hence V by lr/(N·M·h).

    Convolutional two-layer residuals without norms (a particle is a hidden channel) and the MLPs of
    transformers (a hidden neuron) go the same way; h = 1 where a model has no step. Layers may
    differ in width. Stages divide the depth evenly, as in `LayerwiseMeasure`. Parameters that
    belong to no particle (stem, head, attention, norms) take an ordinary step of lr·others. A
    layer's bias c behind V, the same for all particles, moves as the point N·h·c of mass 1/N.

    In `param_groups` the learning rate of every group is lr, or lr·others; `scale` and `mass` stand
    beside it. Schedulers therefore act on the flow's time.

        >>> optimizer = particle_flow(model, 0.1)
        >>> [(group["scale"], group["mass"]) for group in optimizer.param_groups][:2]
        [(1.0, 0.125), (4.0, 0.125)]

    Args:
        model: one with `ResidualChain`s, or one that `anatomy` can read; its anatomy.
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
    groups: dict[tuple[float, float, float], list[nn.Parameter]] = {}
    for c in coordinates(model, others):
        settings = (lr * others, 1.0, 1.0) if c.role == "other" else (lr, c.scale, c.mass)
        groups.setdefault(settings, []).append(c.parameter)
    if not groups:
        raise InputError(
            f"no parameter of this {type(model_of(model)).__name__} is to be trained; set "
            "requires_grad"
        )
    names = ("lr", "scale", "mass")
    made = [{"params": p, **dict(zip(names, s, strict=True))} for s, p in groups.items()]
    return ParticleFlow(made, lr, momentum=momentum, betas=betas, eps=eps)


def _check(lr: float, momentum: float, betas: tuple[float, float] | None, eps: float) -> None:
    expected = "a number above 0, a step of the flow's time"
    check_number("lr", lr, expected, lambda v: 0 < v < math.inf)
    check_number("momentum", momentum, "0 ≤ momentum < 1", lambda v: 0 <= v < 1)
    check_number("eps", eps, "a number above 0", lambda v: 0 < v < math.inf)
    if betas is None:
        return
    pair = isinstance(betas, Sequence) and len(betas) == 2
    if not pair or not all(isinstance(v, Real) and 0 <= float(v) < 1 for v in betas):
        raise InputError(
            f"betas are {shown(betas)}; expected two numbers in [0, 1), such as (0.9, 0.999)"
        )
    if momentum:
        raise InputError("momentum and betas were given; expected one of them")
