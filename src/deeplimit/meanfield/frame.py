"""A network taken apart into its particles and its frame, what is no particle; and put together."""

import copy
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from deeplimit._anatomy import Anatomy, anatomy, chain_stacks, model_of
from deeplimit._anatomy.checks import shown
from deeplimit.errors import InputError
from deeplimit.meanfield.particles import (
    BlockParticles,
    Neurons,
    Norms,
    ParticleLayout,
    mean_of,
    particle_layers,
)
from deeplimit.network.blocks import check_values

Breakpoints = tuple[float, ...]  # of a piecewise constant function of depth s ∈ [0, 1]
NEAR = 1e-12  # breakpoints closer than this are one; far below the length of any layer
NAMED = 3  # names listed in an error
ROUNDING = 64  # in units of the precision


def uniform_grid(depths: Sequence[int]) -> Breakpoints:
    """Stage k of K in [k/K, (k + 1)/K], its layers of equal lengths there; n/N for one stage."""
    # The floats nearest to the fractions, so that equal ones are so to the last bit.
    every = [(k, Fraction(n, depth)) for k, depth in enumerate(depths) for n in range(depth)]
    return (*(float((k + part) / len(depths)) for k, part in every), 1.0)


def grid_of(breakpoints: Iterable[float] | None, layers: int) -> Breakpoints:
    """0 = s_0 < s_1 < … < s_N = 1; layers of equal lengths where none are given."""
    if breakpoints is None:
        return uniform_grid([layers])
    grid = tuple(map(float, breakpoints))
    rising = all(b - a > NEAR for a, b in pairwise(grid))  # not for NaN either
    if len(grid) != layers + 1 or grid[0] != 0 or grid[-1] != 1 or not rising:
        raise InputError(
            f"{len(grid)} breakpoints given for {layers} layers, {grid}; expected 0 = s_0 < s_1 < "
            f"… < s_{layers} = 1"
        )
    return grid


def lengths(grid: Breakpoints) -> tuple[float, ...]:
    """Of the cells."""
    return tuple(b - a for a, b in pairwise(grid))


def merged_grid(*grids: Breakpoints) -> Breakpoints:
    """The breakpoints of all of them: n/64 and n/63 give 126 cells."""
    first, *inner, last = sorted({s for grid in grids for s in grid})
    kept = [first]
    for s in inner:
        if s - kept[-1] > NEAR and last - s > NEAR:
            kept.append(s)
    return (*kept, last)


def same_grid(a: Breakpoints, b: Breakpoints) -> bool:
    """True where the cells are the same ones."""
    return len(a) == len(b) and all(abs(s - r) <= NEAR for s, r in zip(a, b, strict=True))


def layers_at(grid: Breakpoints, finer: Breakpoints) -> tuple[int, ...]:
    """For each cell of another grid, the cell of this one in which its middle lies."""
    last = len(grid) - 2
    return tuple(min(bisect_right(grid, (a + b) / 2) - 1, last) for a, b in pairwise(finer))


@dataclass(frozen=True, eq=False)
class Place:
    """A layer of a frame: what its particles are, and where they go."""

    layout: ParticleLayout
    neurons: Neurons
    offset: Tensor | None  # the output bias c as a density in depth, h c / Δ
    block: nn.Module | str  # of a chain, without its particles; else, being more than they, a name
    stage: int  # the number of the chain


@dataclass(frozen=True, eq=False)
class Frame:
    """A network without its particles."""

    template: nn.Module  # the network, its particles left out; of a chain its blocks
    places: tuple[Place, ...]
    breakpoints: Breakpoints
    step: float  # h; 1 of models whose blocks add their input

    @property
    def layouts(self) -> tuple[ParticleLayout, ...]:
        """The parts of each layer's particles."""
        return tuple(place.layout for place in self.places)

    @property
    def divisible(self) -> bool:
        """True of chains, whose layers are their particles and nothing else."""
        return not isinstance(self.places[0].block, str)

    def rest(self) -> dict[str, Tensor]:
        """Parameters and buffers by their names, less those of the particles and output biases."""
        gone: set[str] = set()
        for place in self.places:
            if isinstance(place.block, str):
                block = self.template.get_submodule(place.block)
                gone |= {f"{place.block}.{name}" for name in place.neurons.tensors(block)}
        return {k: v for k, v in self.template.state_dict().items() if k not in gone}

    def on(self, breakpoints: Breakpoints) -> "Frame":
        """The same on another grid, each cell as the layer in which its middle lies.

        h becomes hN/N', so that the horizon in time stays. The depth of blocks that do more than
        their particles cannot be divided.
        """
        if same_grid(breakpoints, self.breakpoints):
            return replace(self, breakpoints=breakpoints)
        if not self.divisible:
            raise InputError(
                f"the layers of {type(self.template).__name__} are more than their particles "
                "(attention, norms), so that they cannot be divided in depth: give networks of "
                f"equal depth, here {len(self.places)} layers"
            )
        places = tuple(self.places[n] for n in layers_at(self.breakpoints, breakpoints))
        before, after = len(self.places), len(places)
        h = self.step if before == after else self.step * before / after
        return replace(self, places=places, breakpoints=breakpoints, step=h)

    def network(
        self, layers: Sequence[Tensor], weights: Sequence[Tensor], norms: Sequence[Norms]
    ) -> nn.Module:
        """V_i = Δ m_i u_i / h for atoms of weight m_i in a cell of length Δ, and so the offsets.

        Of a chain copies of the template and the blocks, of another model a copy of the template.
        """
        model, stacks = copy.deepcopy(self.template), chain_stacks(self.template)
        widths = self._widths([len(particles) for particles in layers])
        chains: list[list[nn.Module]] = [[] for _ in stacks]
        sizes = zip(lengths(self.breakpoints), widths, strict=True)
        cells = zip(self.places, layers, weights, norms, sizes, strict=True)
        for place, particles, mass, norm, (length, width) in cells:
            factor, layout = length / self.step, place.layout
            # Where layers differ in width those that are missing are neurons of zeros.
            padded = particles.new_zeros(width, sum(layout.sizes))
            padded[: len(particles)] = particles
            outer = padded[: len(particles), : layout.sizes[0]]
            outer *= (factor * mass).to(particles)[:, None]
            shift = None if place.offset is None else place.offset * factor
            reading = BlockParticles(layout, padded, shift, norm.padded(width).scaled(factor))
            if isinstance(place.block, str):
                place.neurons.write(model.get_submodule(place.block), reading)
            else:
                block = copy.deepcopy(place.block)
                place.neurons.write(block, reading)
                chains[place.stage].append(block)
        if not stacks:
            _configure(model, widths[0])
            return model
        pairs = zip(stacks, chains, strict=True)
        made = [replace(stack, blocks=tuple(own), step=self.step) for stack, own in pairs]
        return anatomy(model).with_stacks(made, widths[0] // 2 ** self.places[0].stage)

    def _widths(self, least: Sequence[int]) -> list[int]:
        """The numbers of neurons in the layers, as the model can say them: often one for all."""
        if self.divisible:
            # Twice as many in each stage of a classifier.
            growth = [2**place.stage for place in self.places]
            base = max(-(-count // g) for count, g in zip(least, growth, strict=True))
            return [base * g for g in growth]
        config: Any = getattr(self.template, "config", None)
        if config is None:
            return list(least)
        # A multiple of the state's where they are said as a ratio.
        unit = config.hidden_size if hasattr(config, "mlp_ratio") else 1
        return [-(-max(least) // unit) * unit] * len(least)

    def difference(self, other: "Frame") -> str | None:
        """The difference besides values; None where the frames can be mixed."""
        if type(self.template) is not type(other.template):
            return f"{type(self.template).__name__} and {type(other.template).__name__}"
        mine, theirs = ({k: v.shape for k, v in f.rest().items()} for f in (self, other))
        names = [n for n in {**mine, **theirs} if mine.get(n) != theirs.get(n)]
        return f"the shapes of {listed(names)}" if names else None

    def unequal(self, other: "Frame") -> list[str]:
        """The names of parameters and buffers that differ, output biases too; on one grid."""
        mine, theirs = self.rest(), other.rest()
        names = [name for name, value in mine.items() if not torch.equal(value, theirs[name])]
        pairs = zip(self.places, other.places, strict=True)
        if not all(_alike(a.offset, b.offset) for a, b in pairs):
            names.append("the output biases of the layers")
        return names

    @torch.no_grad()
    def mixed(self, others: Sequence["Frame"], weights: Sequence[float]) -> "Frame":
        """Σ_k λ_k of frames on one grid, this one first; whole numbers are this one's."""
        every = [self.rest(), *(other.rest() for other in others)]
        values = {}
        for name, value in every[0].items():
            same = [rest[name] for rest in every]
            values[name] = mean_of(same, weights) if value.is_floating_point() else value
        template = copy.deepcopy(self.template)
        template.load_state_dict(values, strict=False)
        places = []
        for column in zip(self.places, *(other.places for other in others), strict=True):
            offsets = [place.offset for place in column]
            there = [offset for offset in offsets if offset is not None]
            filled = [torch.zeros_like(there[0]) if c is None else c for c in offsets if there]
            places.append(replace(column[0], offset=mean_of(filled, weights) if there else None))
        return replace(self, template=template, places=tuple(places))


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


def listed(names: Sequence[str]) -> str:
    """The first few names."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def frame_of(model: nn.Module | Anatomy) -> tuple[Frame, list[Tensor], list[Norms]]:
    """The frame of a network, the particles [M_n, p] of its layers, u = M h V / Δ, their norms."""
    model = model_of(model)
    floating = {n: v for n, v in model.state_dict().items() if v.is_floating_point()}
    check_values(floating.items())
    layers = particle_layers(model)
    steps = {layer.stack.step for layer in layers}
    if len(steps) > 1:
        raise InputError(f"the chains have step sizes {sorted(steps)}; expected layers of one step")
    h, adds = layers[0].stack.step, layers[0].stack.adds
    if adds:  # a block that is called several times is one layer
        layers = list({layer.block: layer for layer in layers}.values())
    stages = dict.fromkeys(layer.stack.index for layer in layers)
    counts = [sum(layer.stack.index == index for layer in layers) for index in stages]
    grid = uniform_grid(counts)
    names = {module: name for name, module in model.named_modules()}
    places, particles, norms, every = [], [], [], []
    for layer, length in zip(layers, lengths(grid), strict=True):
        factor, reading, block = h / length, layer.reading, layer.block
        own = list(layer.neurons.tensors(block).values())
        every += own
        besides = [n for n, p in block.named_parameters() if not any(p is q for q in own)]
        if besides and not adds:
            raise InputError(
                f"{type(block).__name__} has parameters besides its particles: {listed(besides)}; "
                "in a ResidualChain a block is a mean of particles and nothing else"
            )
        offset = None if reading.offset is None else reading.offset * factor
        where = names[block] if adds else copy.deepcopy(block, _emptied(own))
        places.append(Place(reading.layout, layer.neurons, offset, where, layer.stack.index))
        # u_i = M h V_i / Δ; N M h V_i on a uniform grid
        outer = reading.particles[:, : reading.layout.sizes[0]]
        outer *= len(reading.particles) * factor
        particles.append(reading.particles)
        norms.append(reading.norms.scaled(factor))
    if adds:
        template = copy.deepcopy(model, _emptied(every))
    else:
        read = anatomy(model)
        template = read.with_stacks([replace(stack, blocks=()) for stack in read.stacks])
    return Frame(template, tuple(places), grid, h), particles, norms


def _emptied(tensors: Sequence[Tensor]) -> dict[int, Any]:
    """The memo of a deep copy that leaves the parameters among these out."""
    return {
        id(p): nn.Parameter(p.detach().new_empty(0), requires_grad=p.requires_grad)
        for p in tensors
        if isinstance(p, nn.Parameter)
    }


def check_batch(read: Anatomy, x: object, shape: Sequence[int]) -> None:
    """Raises InputError unless x is a batch of samples of this shape, in the model's precision."""
    if not isinstance(x, Tensor):
        raise InputError(f"{shown(x)} given as the samples; expected a tensor, one row per sample")
    dtype = next(p.dtype for p in read.model.parameters())
    stem, _ = read.stem_and_head or (None, None)  # which standardises what is of a lower one
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
