"""How the parameters of a network enter its particles: the metric that its training moves in."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, cast

from torch import nn

from deeplimit._anatomy.checks import check_module, check_number
from deeplimit.errors import InputError
from deeplimit.meanfield.additivity import check_additive
from deeplimit.meanfield.checks import particle_stacks
from deeplimit.meanfield.neurons import find_neurons, read
from deeplimit.network.blocks import check_values

Role = Literal["particle", "offset", "other"]


@dataclass(frozen=True)
class Coordinate:
    """A parameter θ as part of a point ω = scale · θ that has a mass.

    With the squared length Σ mass ‖dω‖² the gradient flow of a risk L moves θ by

        dθ/dt = −rate ∂L/∂θ,    rate = 1/(mass · scale²).

    Attributes:
        parameter: θ.
        scale: ∂ω/∂θ: N·M·h for the output weights of particles, 1 for their inner weights.
        mass: of one particle, 1/(N·M).
        role: a part of particles, the bias that all particles of a layer share, or neither.
    """

    parameter: nn.Parameter
    scale: float
    mass: float
    role: Role

    @property
    def rate(self) -> float:
        """1/(mass · scale²)."""
        return 1 / (self.mass * self.scale**2)


@dataclass(frozen=True)
class ParticleLayer:
    """The parameters of x + h (Σ_i V_i σ(w_i·x + b_i) + c), a layer of M particles.

    Attributes:
        inner: W and b, or whatever else stands before V.
        outer: V.
        offset: c, or None.
        width: M.
        length: Δ of its cell of depth: 1/N.
        step: h.
    """

    inner: tuple[nn.Parameter, ...]
    outer: nn.Parameter
    offset: nn.Parameter | None
    width: int
    length: float
    step: float

    def coordinates(self) -> Iterator[Coordinate]:
        """Of all its parameters."""
        mass = self.length / self.width
        for parameter in self.inner:
            yield Coordinate(parameter, 1.0, mass, "particle")
        yield Coordinate(self.outer, self.step / mass, mass, "particle")
        if self.offset is not None:
            yield Coordinate(self.offset, self.step / self.length, self.length, "offset")


def coordinates(model: nn.Module, others: float = 1.0) -> tuple[Coordinate, ...]:
    """The coordinates of a network's trainable parameters.

    An ordinary block Σ_i V_i σ(w_i·x + b_i) with step h, one of N layers, is a mean of M particles
    ω_i = (u_i, w_i, b_i) of mass 1/(N·M) with u_i = N·M·h·V_i, so that V has the rate 1/(N·M·h²), W
    and b have N·M. A bias c behind V is the same for all particles of a layer: the point N·h·c of
    mass 1/N. Layers that share a parameter add their masses. As in `LayerwiseMeasure` K stages
    divide the depth evenly, so that N is K times the layers of the stage.

    Args:
        model: one with `ResidualChain`s, or one that `anatomy` can read, which has h = 1.
        others: the rate of the parameters that belong to no particle; at 0 they are left out.

    Raises:
        InputError: a network that is not a mean of particles, or has parameters without values or
            not finite, or `others` is negative.
    """
    check_module(model)
    expected = "a number ≥ 0, 0 to leave them as they are"
    others = check_number("others", others, expected, lambda v: math.isfinite(v) and v >= 0)
    check_values(model.named_parameters())
    found: dict[nn.Parameter, Coordinate] = {}
    for layer in particle_layers(model):
        for new in layer.coordinates():
            old = found.get(new.parameter)
            if old is not None and old.scale != new.scale:
                raise InputError(
                    "a parameter is shared by layers of different steps, or of stages of different "
                    "depth; its particles have no common scale: give each its own"
                )
            mass = new.mass + (old.mass if old else 0.0)
            found[new.parameter] = Coordinate(new.parameter, new.scale, mass, new.role)
    if others > 0:
        rest = [p for p in model.parameters() if p not in found]
        found |= {p: Coordinate(p, 1.0, 1 / others, "other") for p in rest}
    return tuple(c for p, c in found.items() if p.requires_grad)


def particle_layers(model: nn.Module) -> list[ParticleLayer]:
    """The layers of a network, as means of particles.

    Raises:
        InputError: it has none, or one that is not.
    """
    checked: set[object] = set()
    stacks = particle_stacks(model)
    layers = [
        _of_block(block, 1 / (len(stacks) * len(stack.blocks)), stack.step, checked)
        for stack in stacks
        for block in stack.blocks
    ]
    if not layers:
        raise InputError(f"{type(model).__name__} has no layers, so no particles")
    return layers


def _of_block(block: nn.Module, length: float, step: float, checked: set[object]) -> ParticleLayer:
    """One layer, which must be a sum over its particles."""
    neurons = find_neurons(block)
    for path in (neurons.norm, neurons.last_norm):
        if path and not isinstance(block.get_submodule(path), nn.Identity):
            raise InputError(
                f"a {type(block).__name__} with norms is not a mean of particles while it is "
                "trained: a norm's statistics go by the batch, or by all of them together; build "
                'it without ("none")'
            )
    reading = read(block, neurons)
    check_additive(block, neurons, reading, checked)
    last = block.get_submodule(neurons.columns)
    return ParticleLayer(
        inner=tuple(p for row in neurons.rows for p in block.get_submodule(row).parameters()),
        outer=cast(nn.Parameter, last.weight),
        offset=cast(nn.Parameter | None, last.bias),
        width=len(reading.particles),
        length=length,
        step=step,
    )
