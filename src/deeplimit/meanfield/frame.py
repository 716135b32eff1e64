"""A network taken apart into its particles and its frame, what is no particle; and put together."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from deeplimit._anatomy import Anatomy, anatomy, model_of
from deeplimit._anatomy.checks import shown
from deeplimit.errors import InputError
from deeplimit.meanfield.grid import Breakpoints, layers_at, lengths, same_grid, uniform_grid
from deeplimit.meanfield.layers import Norms
from deeplimit.meanfield.neurons import (
    BlockParticles,
    Neurons,
    ParticleLayout,
    check_additive,
    find_neurons,
    particle_stacks,
    particle_tensors,
    read,
    write,
)
from deeplimit.network.blocks import check_values

NAMED = 3  # names listed in an error
ROUNDING = 64  # in units of the precision


@dataclass(frozen=True, eq=False)
class Frame(ABC):
    """A network without its particles.

    Attributes:
        template: the network, its particles left out.
        layouts: of each layer, what its particles are.
        offsets: of each layer the output bias c as a density in depth, h c / Δ, or None.
        breakpoints: of the layers, s_0 … s_N.
    """

    template: nn.Module
    layouts: tuple[ParticleLayout, ...]
    offsets: tuple[Tensor | None, ...]
    breakpoints: Breakpoints

    @property
    @abstractmethod
    def step(self) -> float:
        """The step size h."""

    @abstractmethod
    def rest(self) -> dict[str, Tensor]:
        """Parameters and buffers by their names, less those of the particles."""

    @abstractmethod
    def build(self, layers: Sequence[BlockParticles]) -> nn.Module:
        """The network with these neurons in its layers."""

    @abstractmethod
    def on(self, breakpoints: Breakpoints) -> "Frame":
        """The same on another grid, each cell as the layer in which its middle lies."""

    def network(
        self, layers: Sequence[Tensor], weights: Sequence[Tensor], norms: Sequence[Norms]
    ) -> nn.Module:
        """V_i = Δ m_i u_i / h for atoms of weight m_i in a cell of length Δ, and so the offsets."""
        cells = zip(
            self.layouts,
            layers,
            weights,
            self.offsets,
            lengths(self.breakpoints),
            self.widths([len(particles) for particles in layers]),
            norms,
            strict=True,
        )
        readings = []
        for layout, particles, mass, offset, length, width, norm in cells:
            factor = length / self.step
            # Where layers differ in width those that are missing are neurons of zeros.
            padded = particles.new_zeros(width, layout.size)
            padded[: len(particles)] = particles
            padded[: len(particles), : layout.outputs] *= (factor * mass).to(particles)[:, None]
            shift = None if offset is None else offset * factor
            readings.append(
                BlockParticles(layout, padded, shift, norm.padded(width).scaled(factor))
            )
        return self.build(readings)

    def widths(self, least: Sequence[int]) -> list[int]:
        """The numbers of neurons in the network's layers, which has one width for all."""
        return [max(least)] * len(least)

    def difference(self, other: "Frame") -> str | None:
        """The difference besides values; None where the frames can be mixed."""
        if type(self.template) is not type(other.template):
            return f"{type(self.template).__name__} and {type(other.template).__name__}"
        mine, theirs = self.rest(), other.rest()
        names = [n for n in {**mine, **theirs} if _shape(mine, n) != _shape(theirs, n)]
        return f"the shapes of {listed(names)}" if names else None

    def unequal(self, other: "Frame") -> list[str]:
        """The names of parameters and buffers that differ, output biases too; on one grid."""
        mine, theirs = self.rest(), other.rest()
        names = [name for name, value in mine.items() if not torch.equal(value, theirs[name])]
        if not all(map(_alike, self.offsets, other.offsets)):
            names.append("the output biases of the layers")
        return names

    @torch.no_grad()
    def mixed(self, others: Sequence["Frame"], weights: Sequence[float]) -> "Frame":
        """Σ_k λ_k of frames on one grid, this one first; whole numbers are this one's."""
        every = [self.rest(), *(other.rest() for other in others)]
        values = {}
        for name, value in every[0].items():
            same = [rest[name] for rest in every]
            values[name] = _mean(same, weights) if value.is_floating_point() else value
        template = copy.deepcopy(self.template)
        template.load_state_dict(values, strict=False)
        offsets: list[Tensor | None] = []
        for column in zip(self.offsets, *(other.offsets for other in others), strict=True):
            there = [offset for offset in column if offset is not None]
            filled = [torch.zeros_like(there[0]) if c is None else c for c in column if there]
            offsets.append(_mean(filled, weights) if there else None)
        return replace(self, template=template, offsets=tuple(offsets))


@dataclass(frozen=True, eq=False)
class ChainFrame(Frame):
    """Of a `ResidualChain` or a `ResidualClassifier`: between stem and head only layers.

    Attributes:
        h: the step size.
        prototypes: for each layout a block without its particles, and where these are in it.
        stages: the numbers of the chains that have layers.
    """

    h: float
    prototypes: dict[ParticleLayout, tuple[nn.Module, Neurons]]
    stages: tuple[int, ...]

    @property
    def step(self) -> float:
        """The chains' own."""
        return self.h

    def rest(self) -> dict[str, Tensor]:
        """Stem, projections and head."""
        return self.template.state_dict()

    def on(self, breakpoints: Breakpoints) -> "ChainFrame":
        """Any grid; h becomes hN/N', so that the horizon in time stays."""
        places = layers_at(self.breakpoints, breakpoints)
        before, after = len(self.layouts), len(places)
        return replace(
            self,
            layouts=tuple(self.layouts[n] for n in places),
            offsets=tuple(self.offsets[n] for n in places),
            breakpoints=breakpoints,
            h=self.h if before == after else self.h * before / after,
        )

    def widths(self, least: Sequence[int]) -> list[int]:
        """One width for all, of a classifier twice as many in each stage."""
        growth = [2**m for m in self._stage_of_layers]
        base = max(-(-count // g) for count, g in zip(least, growth, strict=True))
        return [base * g for g in growth]

    def build(self, layers: Sequence[BlockParticles]) -> nn.Module:
        """Copies of the template and the prototypes."""
        read = anatomy(self.template)
        blocks: list[list[nn.Module]] = [[] for _ in read.stacks]
        for m, reading in zip(self._stage_of_layers, layers, strict=True):
            prototype, neurons = self.prototypes[reading.layout]
            block = copy.deepcopy(prototype)
            write(block, neurons, reading)
            blocks[m].append(block)
        stacks = [
            replace(stack, blocks=tuple(own), step=self.h)
            for stack, own in zip(read.stacks, blocks, strict=True)
        ]
        return read.with_stacks(stacks, len(layers[0].particles) // 2 ** self.stages[0])

    @property
    def _stage_of_layers(self) -> list[int]:
        every = len(self.stages)
        return [self.stages[int(every * (a + b) / 2)] for a, b in pairwise(self.breakpoints)]


@dataclass(frozen=True, eq=False)
class BlockFrame(Frame):
    """Of a model whose blocks do more than their particles: their depth cannot be divided.

    Attributes:
        places: of each layer, the block's name in the model and where its particles are in it.
    """

    places: tuple[tuple[str, Neurons], ...]
    step = 1.0

    def rest(self) -> dict[str, Tensor]:
        """Everything but the layers' neurons and output biases."""
        gone: set[str] = set()
        for name, neurons in self.places:
            block = self.template.get_submodule(name)
            gone |= {f"{name}.{path}" for path in particle_tensors(block, neurons)}
        return {k: v for k, v in self.template.state_dict().items() if k not in gone}

    def on(self, breakpoints: Breakpoints) -> "BlockFrame":
        """The same grid."""
        if not same_grid(breakpoints, self.breakpoints):
            raise InputError(
                f"the layers of {type(self.template).__name__} are more than their particles "
                "(attention, norms), so that they cannot be divided in depth: give networks of "
                f"equal depth, here {len(self.layouts)} layers"
            )
        return self

    def build(self, layers: Sequence[BlockParticles]) -> nn.Module:
        """A copy of the template; its configuration says the width."""
        model = copy.deepcopy(self.template)
        for (name, neurons), reading in zip(self.places, layers, strict=True):
            write(model.get_submodule(name), neurons, reading)
        _configure(model, len(layers[0].particles))
        return model

    def widths(self, least: Sequence[int]) -> list[int]:
        """One for all where a configuration says it; a multiple of the state's if as a ratio."""
        config: Any = getattr(self.template, "config", None)
        if config is None:
            return list(least)
        unit = config.hidden_size if hasattr(config, "mlp_ratio") else 1
        return [-(-max(least) // unit) * unit] * len(least)


def _configure(model: nn.Module, width: int) -> None:
    """Brings up to date what a model of transformers says of the width of its MLPs."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "mlp_ratio"):
        config.mlp_ratio = width // config.hidden_size
    for name in ("intermediate_size", "n_inner"):
        if hasattr(config, name):
            setattr(config, name, width)
            return


def _alike(a: Tensor | None, b: Tensor | None) -> bool:
    """True where output biases are equal up to the rounding of a batch norm's β − μγ/√(v + ε)."""
    if a is None or b is None or a.shape != b.shape:
        return a is b
    size = max(float(a.abs().max()), float(b.abs().max()))
    return torch.allclose(a, b.to(a), rtol=0, atol=ROUNDING * torch.finfo(a.dtype).eps * size)


def _shape(values: dict[str, Tensor], name: str) -> torch.Size | None:
    return values[name].shape if name in values else None


def _mean(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = values[0] * weights[0]
    for value, weight in zip(values[1:], weights[1:], strict=True):
        total = total + value.to(total) * weight
    return total


def listed(names: Sequence[str]) -> str:
    """The first few names."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def frame_of(model: nn.Module | Anatomy) -> tuple[Frame, list[Tensor], list[Norms]]:
    """The frame of a network, the particles [M_n, p] of its layers, u = M h V / Δ, their norms."""
    model = model_of(model)
    floating = {n: v for n, v in model.state_dict().items() if v.is_floating_point()}
    check_values(floating.items())
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
    factors = [h / length for length in lengths(grid)]
    cells = list(zip(readings, factors, strict=True))
    offsets = tuple(None if r.offset is None else r.offset * factor for r, factor in cells)
    parts = tuple(reading.layout for reading in readings), offsets, grid
    frame: Frame
    if adds:
        names = {module: name for name, module in model.named_modules()}
        pairs = list(zip(blocks, found, strict=True))
        gone = [t for block, at in pairs for t in particle_tensors(block, at).values()]
        template = copy.deepcopy(model, _emptied(gone))
        places = tuple((names[block], at) for block, at in pairs)
        frame = BlockFrame(template, *parts, places)
    else:
        own = anatomy(model)
        template = own.with_stacks([replace(stack, blocks=()) for stack in own.stacks])
        indices = tuple(stack.index for stack in stacks)
        frame = ChainFrame(template, *parts, h, _prototypes(blocks, found, readings), indices)
    for reading, factor in cells:  # u_i = M h V_i / Δ; N M h V_i on a uniform grid
        reading.particles[:, : reading.layout.outputs] *= len(reading.particles) * factor
    return frame, [r.particles for r in readings], [r.norms.scaled(factor) for r, factor in cells]


def _prototypes(
    blocks: Sequence[nn.Module], found: Sequence[Neurons], readings: Sequence[BlockParticles]
) -> dict[ParticleLayout, tuple[nn.Module, Neurons]]:
    """For each layout a block without its particles, which must be all that it has."""
    prototypes = {}
    for block, at, reading in zip(blocks, found, readings, strict=True):
        own = list(particle_tensors(block, at).values())
        besides = [name for name, p in block.named_parameters() if not any(p is q for q in own)]
        if besides:
            raise InputError(
                f"{type(block).__name__} has parameters besides its particles: {listed(besides)}; "
                "in a ResidualChain a block is a mean of particles and nothing else"
            )
        if reading.layout not in prototypes:
            prototypes[reading.layout] = (copy.deepcopy(block, _emptied(own)), at)
    return prototypes


def _read_all(blocks: Sequence[nn.Module]) -> tuple[list[Neurons], list[BlockParticles]]:
    """Of all blocks, which must be sums over their neurons."""
    found = [find_neurons(block) for block in blocks]
    readings = []
    checked: set[object] = set()
    for block, neurons in zip(blocks, found, strict=True):
        reading = read(block, neurons)
        check_additive(block, neurons, reading, checked)
        readings.append(reading)
    return found, readings


def _emptied(tensors: Sequence[Tensor]) -> dict[int, Any]:
    """The memo of a deep copy that leaves the parameters among these out."""
    return {
        id(p): nn.Parameter(p.detach().new_empty(0), requires_grad=p.requires_grad)
        for p in tensors
        if isinstance(p, nn.Parameter)
    }


def check_batch(read: Anatomy, x: object, shape: Sequence[int]) -> None:
    """Raises InputError unless x is a batch of samples of this shape, in the model's precision.

    A stem standardises what is of lower precision to the model's own.
    """
    if not isinstance(x, Tensor):
        raise InputError(f"{shown(x)} given as the samples; expected a tensor, one row per sample")
    dtype = next(p.dtype for p in read.model.parameters())
    stem, _ = read.stem_and_head or (None, None)
    taken = x.dtype if isinstance(stem, nn.Identity) else torch.promote_types(x.dtype, dtype)
    if taken != dtype:
        raise InputError(
            f"samples of {x.dtype} given to a network of {dtype}; expected one precision: give "
            f"x.to({dtype})"
        )
    if x.shape[x.dim() - len(shape) :] != tuple(shape):
        size = ", ".join(map(str, shape))
        raise InputError(
            f"samples of shape {list(x.shape)} given; the network takes [samples, {size}]"
        )
