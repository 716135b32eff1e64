"""The hidden neurons of a block as particles ω = (u, w, b): found, read, checked, put back."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from deeplimit._anatomy import Stack, anatomy, chain_stacks
from deeplimit._anatomy.block_call import is_transposed
from deeplimit._anatomy.evaluation import evaluating
from deeplimit.errors import InputError

Move = Callable[[Sequence[Tensor]], Tensor]


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


@dataclass(frozen=True, eq=False)
class Norms:
    """The batch norms of a layer besides their affine map of evaluation mode.

    A channel γ (z − μ) / √(v + ε) + β has three numbers (|γ|, β, v); γ's sign is the weights', and
    μ is what leaves evaluation mode as the particles have it, so that these numbers act in training
    mode alone. They are no part of a particle, nor of d.
    """

    inner: Tensor | None = None  # [M, 3], of each particle; None where no norm is, or none known
    outer: Tensor | None = None  # [d, 3], behind the second layer, |γ| and β as densities in depth

    def scaled(self, factor: float) -> "Norms":
        """Of `factor` times the residual function."""
        if self.outer is None:
            return self
        return replace(self, outer=self.outer * self.outer.new_tensor([factor, factor, 1.0]))

    def padded(self, width: int) -> "Norms":
        """With channels that do nothing up to this number of particles."""
        if self.inner is None:
            return self
        rows = self.inner.new_tensor([[1.0, 0.0, 1.0]]).expand(width - len(self.inner), 3)
        return replace(self, inner=torch.cat([self.inner, rows]))


def moved_norms(norms: Sequence[Norms], weights: Sequence[float], move: Move) -> Norms:
    """The norms of a layer made of others: what became of the particles becomes of their channels.

    Mean |γ|, β and v: a mean of neurons keeps in training mode the mean and the spread that they
    have, which the mean of their weights alone loses (REPAIR, arXiv 2211.08403). `move` takes
    [M_k, q] of each layer to [M, q]; the weights λ_k are for the norms behind the second layer.
    """
    inner = [n.inner for n in norms if n.inner is not None]
    outer = [n.outer for n in norms if n.outer is not None]
    mean = mean_of(outer, weights) if len(outer) == len(norms) else None
    return Norms(move(inner) if len(inner) == len(norms) else None, mean)


def mean_of(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ_k λ_k of tensors, in the place and precision of the first."""
    total = values[0] * weights[0]
    for value, weight in zip(values[1:], weights[1:], strict=True):
        total = total + value.to(total) * weight
    return total


@dataclass(frozen=True)
class BlockParticles:
    """A block's neurons with the step and the count left in: φ(x) = Σ_i ψ(x, ω_i) + offset.

    Half precision, for which u = N·M·h·V may be too large, is read in float32.
    """

    layout: ParticleLayout
    particles: Tensor  # [M, p], detached copies
    offset: Tensor | None  # the output bias [d]
    norms: Norms = Norms()


class NeuronLayer:
    """A linear layer or convolution by its hidden neurons, with the batch norm that follows it.

    `first` where it gives the neurons, which are the norm's channels then.
    """

    def __init__(self, block: nn.Module, path: str, norm: str, *, first: bool):
        layer: Any = block.get_submodule(path)
        transposed = is_transposed(layer)
        known = isinstance(layer, nn.Linear | nn.Conv2d) or transposed
        if not known or getattr(layer, "groups", 1) != 1:
            raise InputError(
                f"a hidden layer is {layer}; expected a linear layer or a convolution in one group"
            )
        if not layer.weight.is_floating_point():
            raise InputError(f"a hidden layer is quantised ({type(layer).__name__})")
        self.layer, self.flip, self.norm = layer, transposed == first, _batch_norm(block, norm)
        given, taken = ("out_features", "out_channels", "nf"), ("in_features", "in_channels", "nx")
        self.sizes, self.axis = (given, 0) if first else (taken, 1)

    def get(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The weights of each neuron [M, …] and the bias, those of evaluation mode; |γ|, β, v."""
        weight, bias, norm = _widened(self.layer.weight), None, self.norm
        weight = weight.transpose(0, 1) if self.flip else weight
        if getattr(self.layer, "bias", None) is not None:
            bias = _widened(self.layer.bias)
        if norm is None:
            return weight, bias, None
        numbers = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
        gamma, beta, mean, variance = map(_widened, numbers)
        scale = gamma / (variance + norm.eps).sqrt()
        shift = beta - mean * scale + (0 if bias is None else bias * scale)
        channels = torch.stack([gamma.abs(), beta, variance], 1)
        return weight * self._along(scale, weight), shift, channels

    def put(self, weight: Tensor, bias: Tensor | None, channels: Tensor | None) -> None:
        """Puts in M neurons; the sizes that the layer says of itself follow.

        Without channels, and where γ = 0, so that no weights are left, the norm's statistics do
        nothing: mean 0 and variance 1, the scale 1 and the bias what the layer adds.
        """
        norm = self.norm
        if norm is not None and bias is not None:
            one = torch.ones_like(bias)
            nothing = torch.stack([(1 + norm.eps) ** 0.5 * one, bias, one], 1)
            rows = nothing if channels is None else channels.to(bias)
            scale = rows[:, 0] / (rows[:, 2] + norm.eps).sqrt()
            known = (scale >= torch.finfo(scale.dtype).tiny) & (channels is not None)
            gamma, beta, variance = torch.where(known[:, None], rows, nothing).T
            scale = torch.where(known, scale, one)
            norm.num_features = len(bias)
            values = {"weight": gamma, "bias": beta, "running_var": variance}
            for name, value in (values | {"running_mean": (beta - bias) / scale}).items():
                _replace_value(norm, name, value)
            weight, bias = weight / self._along(scale, weight), torch.zeros_like(bias)
        _replace_value(self.layer, "weight", weight.transpose(0, 1) if self.flip else weight)
        there = getattr(self.layer, "bias", None) is not None
        if bias is not None and (there or bool(bias.any())):
            _replace_value(self.layer, "bias", bias)
        for name in self.sizes:
            if hasattr(self.layer, name):
                setattr(self.layer, name, len(weight))

    def _along(self, values: Tensor, weight: Tensor) -> Tensor:
        """The norm's channels [n] shaped to multiply the weights."""
        return values.reshape([-1 if i == self.axis else 1 for i in range(weight.dim())])


def _replace_value(module: nn.Module, name: str, value: Tensor) -> None:
    """Puts in a value of another size; in half precision where the parameter or buffer was."""
    old = getattr(module, name)
    dtype = value.dtype if old is None or is_wide(old) else old.dtype
    value = value.detach().to(dtype).contiguous().clone()
    if name not in module._buffers:
        learns = old is None or old.requires_grad
        value = nn.Parameter(value, requires_grad=learns)
    setattr(module, name, value)


def is_wide(x: Tensor) -> bool:
    """True for a tensor of more than half precision."""
    return x.dtype.itemsize >= 4


def _widened(x: Tensor) -> Tensor:
    """In float32 what has half precision, detached."""
    return x.detach() if is_wide(x) else x.detach().float()


def norm_at(block: nn.Module, path: str) -> nn.Module | None:
    """The norm at a path of a block; None where there is none."""
    norm = block.get_submodule(path) if path else nn.Identity()
    return None if isinstance(norm, nn.Identity) else norm


def _batch_norm(block: nn.Module, path: str) -> Any:
    norm = norm_at(block, path)
    whole = isinstance(norm, nn.BatchNorm2d) and norm.affine and norm.running_mean is not None
    if norm is not None and not whole:
        raise InputError(
            f"{path} of {type(block).__name__} is a {type(norm).__name__}, which couples the "
            "hidden neurons or normalises their sum: the block is not a mean of particles; "
            'expected no norm ("none"), or a batch norm ("batch") with scale, bias and running '
            "statistics, read as in evaluation mode"
        )
    return norm


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
    def read(self, block: nn.Module) -> BlockParticles:
        """The particles of a block; batch norms are folded in as they are in evaluation mode."""
        sigma = block.get_submodule(self.activation)
        if next(sigma.parameters(), None) is not None:
            raise InputError(f"the activation {type(sigma).__name__} has parameters; expected none")
        inner: Tensor | None = None
        columns, offset, outer = NeuronLayer(block, self.columns, self.last_norm, first=False).get()
        parts = {"u": columns}
        for path, name, shift in zip(self.rows, "wv", "bc", strict=False):
            parts[name], bias, inner = NeuronLayer(block, path, self.norm, first=True).get()
            if bias is not None:
                parts[shift] = bias
        activation = repr(sigma).replace("inplace=True", "").replace("approximate='none'", "")
        shapes = tuple((name, tuple(part.shape[1:])) for name, part in parts.items())
        layout = ParticleLayout(shapes, activation)
        copied = None if offset is None else offset.clone()
        return BlockParticles(layout, layout.join(parts), copied, Norms(inner, outer))

    @torch.no_grad()
    def write(self, block: nn.Module, reading: BlockParticles) -> None:
        """Gives a block these particles, any number of them, and its batch norms theirs."""
        parts, norms = reading.layout.split(reading.particles), reading.norms
        for path, name, shift in zip(self.rows, "wv", "bc", strict=False):
            layer = NeuronLayer(block, path, self.norm, first=True)
            layer.put(parts[name], parts.get(shift), norms.inner)
        layer = NeuronLayer(block, self.columns, self.last_norm, first=False)
        layer.put(parts["u"], reading.offset, norms.outer)


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
            reading = neurons.read(block)
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
