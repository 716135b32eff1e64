"""Whether a block is what its particles are read for: a sum over its hidden neurons."""

import copy
from typing import cast

import torch
from torch import Tensor, nn

from deeplimit._anatomy.evaluation import evaluating
from deeplimit.errors import InputError
from deeplimit.meanfield.neuron_layer import is_wide
from deeplimit.meanfield.neurons import Neurons, Reading, numbers_in, write


def check_additive(block: nn.Module, neurons: Neurons, reading: Reading, done: set[object]) -> None:
    """Whether a block is a sum over its neurons: half of them and the others add up to all.

    With its own particles and, in a copy, with random ones: output weights of zeros, a common
    start, make a sum of every module. Blocks of one class and structure are looked at once.

    Args:
        block: the block.
        neurons: where they are in it.
        reading: what they are.
        done: what was looked at before; added to.

    Raises:
        InputError: they do not.
    """
    key = (type(block), repr(block), reading.form)
    if key in done:
        return
    if not all(map(is_wide, block.parameters())):  # whose rounding hides what does not add up
        block = copy.deepcopy(block).float()
    other = copy.deepcopy(block)
    own, copied = (m.get_submodule(neurons.within) if neurons.within else m for m in (block, other))
    x = _example(block, neurons, reading)

    def outputs(layer: Reading) -> Tensor:
        write(other, neurons, layer)
        return cast(Tensor, copied(x))

    with evaluating(block), evaluating(other), torch.no_grad():
        drawn = _drawn(reading)
        gaps = [
            _gap(own(x), [outputs(half) for half in _halves(reading)]),
            _gap(outputs(drawn), [outputs(half) for half in _halves(drawn)]),
        ]
    rounding = 100 * len(reading.particles) ** 0.5 * torch.finfo(reading.particles.dtype).eps
    if not all(gap <= rounding for gap in gaps):
        raise InputError(
            f"{type(own).__name__} is not a mean of particles: two halves of its neurons add up "
            f"to something else than all of them (by {max(gaps):.2g} of it)"
        )
    done.add(key)


def _gap(whole: Tensor, halves: list[Tensor]) -> float:
    """The largest difference of whole and sum, of the largest value."""
    size = float(torch.stack([whole, *halves]).abs().max())
    return float((sum(halves) - whole).abs().max()) / max(size, 1e-300)


def _halves(reading: Reading) -> list[Reading]:
    """Every other neuron, with the offset, and the rest without it."""
    mask = torch.arange(len(reading.particles), device=reading.particles.device) % 2 == 0
    zero = None if reading.offset is None else torch.zeros_like(reading.offset)
    return [
        Reading(reading.form, reading.particles * mask[:, None], reading.offset),
        Reading(reading.form, reading.particles * ~mask[:, None], zero),
    ]


def _example(block: nn.Module, neurons: Neurons, reading: Reading) -> Tensor:
    """A state: [2, 3, d] for linear layers, [2, C, 5, 5] for convolutions."""
    shape = dict(reading.form.parts)["w"]
    size = (2, 3, *shape) if len(shape) == 1 else (2, shape[0], 5, 5)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, generator=generator).to(reading.particles)


def _drawn(reading: Reading) -> Reading:
    """As many particles of the form, random ones that leave the arguments of σ of order 1."""
    generator = torch.Generator().manual_seed(1)
    parts = {
        name: torch.randn(len(reading.particles), *shape, generator=generator)
        / numbers_in(shape) ** 0.5
        for name, shape in reading.form.parts
    }
    particles = reading.form.join(parts).to(reading.particles)
    offset = None if reading.offset is None else torch.zeros_like(reading.offset)
    return Reading(reading.form, particles, offset)
