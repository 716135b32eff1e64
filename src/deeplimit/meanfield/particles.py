"""The hidden neurons of a block as particles ω = (u, w, b): found, read, checked, put back."""

import copy
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from deeplimit._anatomy import Stack, anatomy, chain_stacks
from deeplimit._anatomy.evaluation import evaluating
from deeplimit.errors import InputError
from deeplimit.meanfield.layers import NeuronLayer, Norms, fold, is_wide, norm_at, unfold


@dataclass(frozen=True)
class ParticleLayout:
    """The parts of a layer's particles, names and shapes, first the output weight "u"; and σ."""

    parts: tuple[tuple[str, tuple[int, ...]], ...]
    activation: str

    @property
    def sizes(self) -> list[int]:
        """The count of numbers of each part; the first ones are the output weight u."""
        return [torch.Size(shape).numel() for _, shape in self.parts]

    def join(self, parts: dict[str, Tensor]) -> Tensor:
        """[M, p] from a tensor [M, *shape] for each part."""
        every = (parts[name] for name, _ in self.parts)
        return torch.cat([part.reshape(len(part), -1) for part in every], dim=1)

    def split(self, particles: Tensor) -> dict[str, Tensor]:
        """The inverse of `join`."""
        pieces = zip(self.parts, torch.split(particles, self.sizes, dim=1), strict=True)
        return {name: piece.reshape(len(particles), *shape) for (name, shape), piece in pieces}

    def __str__(self) -> str:
        """Parts with their shapes, and σ."""
        parts = ", ".join(f"{name} {list(shape)}" for name, shape in self.parts)
        return f"particles ({parts}) of {self.activation}"


@dataclass(frozen=True)
class Neurons:
    """The places of a block's hidden neurons: last_norm(columns · σ(norm(rows x))), as paths."""

    within: str  # the module that is a sum over neurons, "" for the whole block
    rows: tuple[str, ...]  # one layer, or a gate and what it multiplies
    activation: str
    columns: str
    norm: str = ""
    last_norm: str = ""

    @property
    def layers(self) -> list[str]:
        """The paths of all layers whose parameters are the particles' and the output bias."""
        return list(filter(None, (*self.rows, self.norm, self.columns, self.last_norm)))

    def tensors(self, block: nn.Module) -> dict[str, Tensor]:
        """The tensors that particles and offset replace, by the names in the block."""
        return {
            f"{path}.{name}": tensor
            for path in self.layers
            for own in (nn.Module.named_parameters, nn.Module.named_buffers)
            for name, tensor in own(block.get_submodule(path), recurse=False)
        }

    @torch.no_grad()
    def write(self, block: nn.Module, reading: "BlockParticles") -> None:
        """Gives a block these particles, any number of them, and its batch norms theirs."""
        parts, norms = reading.layout.split(reading.particles), reading.norms
        for path, name, shift in zip(self.rows, "wv", "bc", strict=False):
            rows = unfold(block, self.norm, parts[name], 0, parts.get(shift), norms.inner)
            NeuronLayer(block, path, first=True).put(*rows)
        columns = unfold(block, self.last_norm, parts["u"], 1, reading.offset, norms.outer)
        NeuronLayer(block, self.columns, first=False).put(*columns)


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


@dataclass(frozen=True)
class BlockParticles:
    """A block's neurons with the step and the count left in: φ(x) = Σ_i ψ(x, ω_i) + offset.

    Half precision, for which u = N·M·h·V may be too large, is read in float32.
    """

    layout: ParticleLayout
    particles: Tensor  # [M, p], detached copies
    offset: Tensor | None  # the output bias [d]
    norms: Norms = field(default_factory=Norms)


@dataclass(frozen=True)
class ParticleLayer:
    """A block x + h φ(x) as a mean of particles, and the stage that it is of."""

    block: nn.Module
    neurons: Neurons
    reading: BlockParticles
    stack: Stack


def particle_layers(model: nn.Module, *, trained: bool = False) -> list[ParticleLayer]:
    """The layers of a network in order, sums over their particles; if `trained` without norms."""
    stacks = chain_stacks(model)
    if not stacks:  # blocks that add their input are one stage
        blocks = [block for stack in anatomy(model).stacks for block in stack.blocks]
        stacks = (Stack(0, 0, tuple(blocks)),)
    found, done = [], set[object]()
    for stack in stacks:
        if stack.scheme.nodes != 1:
            raise InputError(
                f"a step of {type(stack.scheme).__name__} uses two neighbouring controls, so that "
                "a layer is not a mean of particles; expected Euler()"
            )
        for block in stack.blocks:
            neurons = _find_neurons(block)
            norms = [path for path in (neurons.norm, neurons.last_norm) if path]
            if trained and any(norm_at(block, path) for path in norms):
                raise InputError(
                    f"a {type(block).__name__} with norms is not a mean of particles while it is "
                    "trained: a norm's statistics go by the batch, or by all of them together; "
                    'build it without ("none")'
                )
            reading = _read(block, neurons)
            _check_additive(block, neurons, reading, done)
            found.append(ParticleLayer(block, neurons, reading, stack))
    if not found:
        raise InputError(f"{type(model).__name__} has no layers, so that there are no particles")
    return found


def _find_neurons(block: nn.Module) -> Neurons:
    there = {name for name, _ in block.named_modules()}
    for pattern in PATTERNS:
        if {pattern.activation, *pattern.layers} <= there:
            return pattern
    raise InputError(
        f"{type(block).__name__} is not a mean of particles that is known here; expected blocks "
        "V σ(W x + b), TwoLayerResidual or the like, ConvolutionalResidual, or blocks with an "
        "MLP of two layers, or three with a gate, as block.mlp"
    )


@torch.no_grad()
def _read(block: nn.Module, neurons: Neurons) -> BlockParticles:
    """The particles of a block; batch norms are folded in as they are in evaluation mode."""
    sigma = block.get_submodule(neurons.activation)
    if next(sigma.parameters(), None) is not None:
        raise InputError(f"the activation {type(sigma).__name__} has parameters; expected none")
    inner: Tensor | None = None
    columns, bias = NeuronLayer(block, neurons.columns, first=False).get()
    columns, offset, outer = fold(block, neurons.last_norm, columns, 1, bias)
    parts = {"u": columns}
    for path, name, shift in zip(neurons.rows, "wv", "bc", strict=False):
        rows, bias = NeuronLayer(block, path, first=True).get()
        parts[name], bias, inner = fold(block, neurons.norm, rows, 0, bias)
        if bias is not None:
            parts[shift] = bias
    activation = repr(sigma).replace("inplace=True", "").replace("approximate='none'", "")
    layout = ParticleLayout(tuple((n, tuple(x.shape[1:])) for n, x in parts.items()), activation)
    copied = None if offset is None else offset.clone()
    return BlockParticles(layout, layout.join(parts).clone(), copied, Norms(inner, outer))


@torch.no_grad()
def _check_additive(
    block: nn.Module, neurons: Neurons, reading: BlockParticles, done: set[object]
) -> None:
    """Looks whether a block is a sum over its neurons: half of them and the others add up to all.

    With its own particles and, in a copy, with random ones: output weights of zeros, a common
    start, make a sum of every module. Blocks of one class and structure are looked at once.
    """
    key = (type(block), repr(block), reading.layout)
    if key in done:
        return
    if not all(map(is_wide, block.parameters())):  # whose rounding hides what does not add up
        block = copy.deepcopy(block).float()
    other = copy.deepcopy(block)
    own, copied = (m.get_submodule(neurons.within) if neurons.within else m for m in (block, other))
    layout, mine, offset = reading.layout, reading.particles, reading.offset
    none = None if offset is None else torch.zeros_like(offset)
    shapes, count = dict(layout.parts), len(mine)
    # A state, and random particles that leave the arguments of σ of order 1.
    size = (2, 3, *shapes["w"]) if len(shapes["w"]) == 1 else (2, shapes["w"][0], 5, 5)
    x = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(mine)
    draws, generator = {}, torch.Generator().manual_seed(1)
    for (name, shape), numbers in zip(layout.parts, layout.sizes, strict=True):
        draws[name] = torch.randn(count, *shape, generator=generator) / numbers**0.5
    drawn = layout.join(draws).to(mine)
    half = torch.arange(count, device=mine.device)[:, None] % 2 == 0

    def output(particles: Tensor, shift: Tensor | None) -> Tensor:
        neurons.write(other, BlockParticles(layout, particles, shift))
        return cast(Tensor, copied(x))

    def gap(whole: Tensor, particles: Tensor, shift: Tensor | None) -> float:
        """The largest difference of whole and sum, of the largest value."""
        halves = [output(particles * half, shift), output(particles * ~half, none)]
        largest = float(torch.stack([whole, *halves]).abs().max())
        return float((sum(halves) - whole).abs().max()) / max(largest, 1e-300)

    with evaluating(block), evaluating(other):
        gaps = [gap(own(x), mine, offset), gap(output(drawn, none), drawn, none)]
    rounding = 100 * count**0.5 * torch.finfo(mine.dtype).eps
    if not all(gap <= rounding for gap in gaps):
        raise InputError(
            f"{type(own).__name__} is not a mean of particles: two halves of its neurons add up "
            f"to something else than all of them (by {max(gaps):.2g} of it)"
        )
    done.add(key)
