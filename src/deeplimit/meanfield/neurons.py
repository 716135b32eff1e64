"""The hidden neurons of a block as particles ω = (u, w, b): found, read, checked, put back."""

import copy
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor, nn

from deeplimit._anatomy import Stack, anatomy, chain_stacks
from deeplimit._anatomy.evaluation import evaluating
from deeplimit.errors import InputError
from deeplimit.meanfield.layers import NeuronLayer, Norms, fold, is_wide, unfold


@dataclass(frozen=True)
class ParticleLayout:
    """The parts of a layer's particles.

    Attributes:
        parts: the names and shapes of what it consists of, in order; "u" is the output weight.
        activation: σ.
    """

    parts: tuple[tuple[str, tuple[int, ...]], ...]
    activation: str

    @property
    def size(self) -> int:
        """p: how many numbers."""
        return sum(numbers_in(shape) for _, shape in self.parts)

    @property
    def outputs(self) -> int:
        """The count of numbers, the first ones, that are the output weight u."""
        return numbers_in(self.parts[0][1])

    def join(self, parts: dict[str, Tensor]) -> Tensor:
        """[M, p] from a tensor [M, *shape] for each part."""
        return torch.cat(
            [parts[name].reshape(len(parts[name]), -1) for name, _ in self.parts], dim=1
        )

    def split(self, particles: Tensor) -> dict[str, Tensor]:
        """The inverse of `join`."""
        sizes = [numbers_in(shape) for _, shape in self.parts]
        pieces = torch.split(particles, sizes, dim=1)
        return {
            name: piece.reshape(len(particles), *shape)
            for (name, shape), piece in zip(self.parts, pieces, strict=True)
        }

    def __str__(self) -> str:
        """Parts with their shapes, and σ."""
        parts = ", ".join(f"{name} {list(shape)}" for name, shape in self.parts)
        return f"particles ({parts}) of {self.activation}"


@dataclass(frozen=True)
class Neurons:
    """The places of a block's hidden neurons: columns · σ(norm(rows x)), paths in the block.

    Attributes:
        within: the module that is a sum over neurons, "" for the whole block.
        rows: the first layers, one, or a gate and what it multiplies.
        activation, columns: σ and the second layer.
        norm, last_norm: batch norms behind the first and the second layer, where there are such.
    """

    within: str
    rows: tuple[str, ...]
    activation: str
    columns: str
    norm: str = ""
    last_norm: str = ""

    @property
    def layers(self) -> tuple[str, ...]:
        """The paths of all layers whose parameters are the particles' and the output bias."""
        paths = (*self.rows, self.norm, self.columns, self.last_norm)
        return tuple(path for path in paths if path)


# Residual functions of a chain, and the MLPs of transformers' blocks.
PATTERNS = (
    Neurons("", ("inner",), "activation", "outer"),
    Neurons("", ("conv1",), "activation", "conv2", "norm1", "norm2"),
    Neurons("", ("0",), "1", "2"),
    Neurons("mlp", ("mlp.fc1",), "mlp.activation_fn", "mlp.fc2"),
    Neurons("mlp", ("mlp.c_fc",), "mlp.act", "mlp.c_proj"),
    Neurons("mlp", ("mlp.gate_proj", "mlp.up_proj"), "mlp.act_fn", "mlp.down_proj"),
    Neurons("mlp", ("mlp.up_proj",), "mlp.act_fn", "mlp.down_proj"),
)


def find_neurons(block: nn.Module) -> Neurons:
    """The places of a block's hidden neurons."""
    there = {name for name, _ in block.named_modules()}
    for pattern in PATTERNS:
        if {pattern.activation, *pattern.layers} <= there:
            return pattern
    raise InputError(
        f"{type(block).__name__} is not a mean of particles that is known here; expected blocks "
        "V σ(W x + b), TwoLayerResidual or the like, ConvolutionalResidual, or blocks with an "
        "MLP of two layers, or three with a gate, as block.mlp"
    )


@dataclass(frozen=True)
class BlockParticles:
    """A block's neurons with the step and the count left in: φ(x) = Σ_i ψ(x, ω_i) + offset.

    Attributes:
        particles: [M, p], detached copies; those of half precision, for which u = N·M·h·V may be
            too large, in float32.
        offset: the output bias [d], or None.
        norms: of its batch norms what acts in training mode.
    """

    layout: ParticleLayout
    particles: Tensor
    offset: Tensor | None
    norms: Norms = field(default_factory=Norms)


@torch.no_grad()
def read(block: nn.Module, neurons: Neurons) -> BlockParticles:
    """The particles of a block; batch norms are folded in as they are in evaluation mode."""
    sigma = block.get_submodule(neurons.activation)
    if next(sigma.parameters(), None) is not None:
        raise InputError(f"the activation {type(sigma).__name__} has parameters; expected none")
    layers = [NeuronLayer(block.get_submodule(path)) for path in neurons.rows]
    last = NeuronLayer(block.get_submodule(neurons.columns))
    parts = {"u": last.columns}
    inner: Tensor | None = None
    for layer, name in zip(layers, ("w", "v"), strict=False):
        parts[name], bias, inner = fold(block, neurons.norm, layer.rows, 0, layer.bias)
        if bias is not None:
            parts["b" if name == "w" else "c"] = bias
    parts["u"], offset, outer = fold(block, neurons.last_norm, parts["u"], 1, last.bias)
    layout = ParticleLayout(
        tuple((name, tuple(x.shape[1:])) for name, x in parts.items()), _name_of(sigma)
    )
    copied = None if offset is None else offset.clone()
    return BlockParticles(layout, layout.join(parts).clone(), copied, Norms(inner, outer))


@torch.no_grad()
def write(block: nn.Module, neurons: Neurons, reading: BlockParticles) -> None:
    """Gives a block these particles, any number of them, and its batch norms theirs, in place."""
    parts, norms = reading.layout.split(reading.particles), reading.norms
    for path, name in zip(neurons.rows, ("w", "v"), strict=False):
        layer, bias = NeuronLayer(block.get_submodule(path)), parts.get("b" if name == "w" else "c")
        layer.set_rows(*unfold(block, neurons.norm, parts[name], 0, bias, norms.inner))
    last = NeuronLayer(block.get_submodule(neurons.columns))
    last.set_columns(*unfold(block, neurons.last_norm, parts["u"], 1, reading.offset, norms.outer))


def particle_tensors(block: nn.Module, neurons: Neurons) -> dict[str, Tensor]:
    """The tensors that particles and offset replace, by the names in the block."""
    own = [(path, block.get_submodule(path)) for path in neurons.layers]
    found: dict[str, Tensor] = {}
    for path, layer in own:
        found |= {f"{path}.{n}": p for n, p in layer.named_parameters(recurse=False)}
        found |= {f"{path}.{n}": b for n, b in layer.named_buffers(recurse=False)}
    return found


def _name_of(sigma: nn.Module) -> str:
    return repr(sigma).replace("inplace=True", "").replace("approximate='none'", "")


def numbers_in(shape: tuple[int, ...]) -> int:
    """Their product."""
    return int(torch.Size(shape).numel())


def check_additive(
    block: nn.Module, neurons: Neurons, reading: BlockParticles, done: set[object]
) -> None:
    """Looks whether a block is a sum over its neurons: half of them and the others add up to all.

    With its own particles and, in a copy, with random ones: output weights of zeros, a common
    start, make a sum of every module. Blocks of one class and structure are looked at once.

    Args:
        block: the block.
        neurons: where they are in it.
        reading: what they are.
        done: what was looked at before; added to.
    """
    key = (type(block), repr(block), reading.layout)
    if key in done:
        return
    if not all(map(is_wide, block.parameters())):  # whose rounding hides what does not add up
        block = copy.deepcopy(block).float()
    other = copy.deepcopy(block)
    own, copied = (m.get_submodule(neurons.within) if neurons.within else m for m in (block, other))
    x = _example(reading)

    def outputs(layer: BlockParticles) -> Tensor:
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


def _halves(reading: BlockParticles) -> list[BlockParticles]:
    """Every other neuron, with the offset, and the rest without it."""
    mask = torch.arange(len(reading.particles), device=reading.particles.device)[:, None] % 2 == 0
    return [
        replace(reading, particles=reading.particles * mask, norms=Norms()),
        replace(_without_offset(reading), particles=reading.particles * ~mask),
    ]


def _without_offset(reading: BlockParticles) -> BlockParticles:
    zero = None if reading.offset is None else torch.zeros_like(reading.offset)
    return replace(reading, offset=zero, norms=Norms())


def _example(reading: BlockParticles) -> Tensor:
    """A state: [2, 3, d] for linear layers, [2, C, 5, 5] for convolutions."""
    shape = dict(reading.layout.parts)["w"]
    size = (2, 3, *shape) if len(shape) == 1 else (2, shape[0], 5, 5)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, generator=generator).to(reading.particles)


def _drawn(reading: BlockParticles) -> BlockParticles:
    """As many particles of the layout, random ones that leave the arguments of σ of order 1."""
    generator = torch.Generator().manual_seed(1)
    count = len(reading.particles)
    parts = {
        name: torch.randn(count, *shape, generator=generator) / numbers_in(shape) ** 0.5
        for name, shape in reading.layout.parts
    }
    particles = reading.layout.join(parts).to(reading.particles)
    return replace(_without_offset(reading), particles=particles)


def particle_stacks(model: nn.Module) -> tuple[Stack, ...]:
    """The stages that divide the depth evenly; of blocks that add their input one for all."""
    chains = chain_stacks(model)
    for stack in chains:
        if stack.scheme.nodes != 1:
            raise InputError(
                f"a step of {type(stack.scheme).__name__} uses two neighbouring controls, so that "
                "a layer is not a mean of particles; expected Euler()"
            )
    if chains:
        return tuple(stack for stack in chains if stack.blocks)
    return (Stack(0, 0, tuple(b for stack in anatomy(model).stacks for b in stack.blocks)),)
