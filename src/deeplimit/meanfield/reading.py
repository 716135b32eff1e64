"""A network taken apart: its particles, layer by layer, and its frame."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from deeplimit._anatomy import anatomy
from deeplimit._anatomy.checks import check_module
from deeplimit.errors import InputError
from deeplimit.meanfield.additivity import check_additive
from deeplimit.meanfield.checks import particle_stacks
from deeplimit.meanfield.frame import BlockFrame, ChainFrame, Frame, listed
from deeplimit.meanfield.grid import Breakpoints, lengths, uniform_grid
from deeplimit.meanfield.neurons import (
    Form,
    Neurons,
    Reading,
    find_neurons,
    particle_parameters,
    read,
)
from deeplimit.meanfield.norms import Norms


def frame_of(model: nn.Module) -> tuple[Frame, list[Tensor], list[Norms]]:
    """The frame of a network, the particles [M_n, p] of its layers, u = M h V / Δ, their norms.

    Raises:
        InputError: as `LayerwiseMeasure.of`.
    """
    check_module(model)
    _check_values(model)
    stacks = particle_stacks(model)
    steps = {stack.step for stack in stacks}
    if not steps:
        raise InputError(f"{type(model).__name__} has no layers, so that there are no particles")
    if len(steps) > 1:
        raise InputError(f"the chains have step sizes {sorted(steps)}; expected layers of one step")
    (h,) = steps
    blocks = [block for stack in stacks for block in stack.blocks]
    adds = stacks[0].adds
    if adds:
        blocks = list(dict.fromkeys(blocks))
    found, readings = _read_all(blocks)
    grid = uniform_grid([len(blocks)] if adds else [len(stack.blocks) for stack in stacks])
    parts = tuple(reading.form for reading in readings), _densities(readings, grid, h), grid
    frame: Frame
    if adds:
        names = {module: name for name, module in model.named_modules()}
        pairs = list(zip(blocks, found, strict=True))
        gone = [p for block, at in pairs for _, p in particle_parameters(block, at)]
        template = copy.deepcopy(model, _emptied(gone))
        places = tuple((names[block], at) for block, at in pairs)
        frame = BlockFrame(template, *parts, places)
    else:
        own = anatomy(model)
        template = own.with_stacks([replace(stack, blocks=()) for stack in own.stacks])
        indices = tuple(stack.index for stack in stacks)
        frame = ChainFrame(template, *parts, h, _prototypes(blocks, found, readings), indices)
    return frame, *_scaled(readings, grid, h)


def _prototypes(
    blocks: Sequence[nn.Module], found: Sequence[Neurons], readings: Sequence[Reading]
) -> dict[Form, tuple[nn.Module, Neurons]]:
    """For each form a block without its particles, which must be all that it has."""
    prototypes = {}
    for block, at, reading in zip(blocks, found, readings, strict=True):
        own = [p for _, p in particle_parameters(block, at)]
        besides = [name for name, p in block.named_parameters() if not any(p is q for q in own)]
        if besides:
            raise InputError(
                f"{type(block).__name__} has parameters besides its particles: {listed(besides)}; "
                "in a ResidualChain a block is a mean of particles and nothing else"
            )
        if reading.form not in prototypes:
            prototypes[reading.form] = (copy.deepcopy(block, _emptied(own)), at)
    return prototypes


def _read_all(blocks: Sequence[nn.Module]) -> tuple[list[Neurons], list[Reading]]:
    """Of all blocks, which must be sums over their neurons."""
    found = [find_neurons(block) for block in blocks]
    readings = []
    checked: set[object] = set()
    for block, neurons in zip(blocks, found, strict=True):
        reading = read(block, neurons)
        check_additive(block, neurons, reading, checked)
        readings.append(reading)
    return found, readings


def _scaled(
    readings: Sequence[Reading], grid: Breakpoints, h: float
) -> tuple[list[Tensor], list[Norms]]:
    """u_i = M h V_i / Δ; N M h V_i on a uniform grid."""
    layers, norms = [], []
    for reading, length in zip(readings, lengths(grid), strict=True):
        particles = reading.particles
        particles[:, : reading.form.outputs] *= len(particles) * h / length
        layers.append(particles)
        norms.append(reading.norms.scaled(h / length))
    return layers, norms


def _densities(
    readings: Sequence[Reading], grid: Breakpoints, h: float
) -> tuple[Tensor | None, ...]:
    cells = zip(readings, lengths(grid), strict=True)
    return tuple(None if r.offset is None else r.offset * (h / length) for r, length in cells)


def _emptied(parameters: Sequence[nn.Parameter]) -> dict[int, Any]:
    """What a deep copy puts in place of these."""
    return {
        id(p): nn.Parameter(p.detach().new_empty(0), requires_grad=p.requires_grad)
        for p in parameters
    }


def _check_values(model: nn.Module) -> None:
    if any(p.is_meta for p in model.parameters()):
        raise InputError(f"{type(model).__name__} is on the meta device; load its weights first")
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise InputError(
                f"{name} of {type(model).__name__} is not finite: its training diverged; give the "
                "last good checkpoint"
            )
