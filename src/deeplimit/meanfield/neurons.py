"""The hidden neurons of a block as particles ω = (u, w, b): read from its layers, put back."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from deeplimit.errors import InputError


@dataclass(frozen=True)
class Form:
    """What a particle of a layer is.

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
        """How many of them, the first ones, are the output weight u."""
        return numbers_in(self.parts[0][1])

    def join(self, parts: dict[str, Tensor]) -> Tensor:
        """[M, p] from a tensor [M, *shape] for each part."""
        return torch.cat(
            [parts[name].reshape(len(parts[name]), -1) for name, _ in self.parts], dim=1
        )

    def split(self, particles: Tensor) -> dict[str, Tensor]:
        """The inverse of `join`."""
        sizes = [numbers_in(shape) for _, shape in self.parts]
        pieces = particles.split(sizes, dim=1)
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
    """Where in a block its hidden neurons are: columns · σ(norm(rows x)), paths in the block.

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
    """Where the hidden neurons of a block are.

    Raises:
        InputError: it is not of a kind known to be a mean of particles.
    """
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
class Reading:
    """A block's neurons with the step and the count left in: φ(x) = Σ_i ψ(x, ω_i) + offset.

    Attributes:
        particles: [M, p], detached copies; those of half precision, for which u = N·M·h·V may be
            too large, in float32.
        offset: the output bias [d], or None.
    """

    form: Form
    particles: Tensor
    offset: Tensor | None


@torch.no_grad()
def read(block: nn.Module, neurons: Neurons) -> Reading:
    """The particles of a block; batch norms are folded in as they are in evaluation mode.

    Raises:
        InputError: layers of other classes, a norm that couples neurons, a learned activation.
    """
    sigma = block.get_submodule(neurons.activation)
    if next(sigma.parameters(), None) is not None:
        raise InputError(f"the activation {type(sigma).__name__} has parameters; expected none")
    layers = [_Layer(block.get_submodule(path)) for path in neurons.rows]
    last = _Layer(block.get_submodule(neurons.columns))
    parts = {"u": last.columns}
    for layer, name in zip(layers, ("w", "v"), strict=False):
        parts[name] = layer.rows
        bias = layer.bias
        scale, shift = _affine(block, neurons.norm)
        if scale is not None and shift is not None:
            parts[name] = layer.rows * _along(scale, layer.rows, 0)
            bias = shift + (0 if bias is None else bias * scale)
        if bias is not None:
            parts["b" if name == "w" else "c"] = bias
    offset = last.bias
    scale, shift = _affine(block, neurons.last_norm)
    if scale is not None and shift is not None:
        parts["u"] = parts["u"] * _along(scale, parts["u"], 1)
        offset = shift + (0 if offset is None else offset * scale)
    form = Form(tuple((name, tuple(x.shape[1:])) for name, x in parts.items()), _name_of(sigma))
    return Reading(form, form.join(parts).clone(), None if offset is None else offset.clone())


@torch.no_grad()
def write(block: nn.Module, neurons: Neurons, reading: Reading) -> None:
    """Gives a block these particles, any number of them, in place.

    A batch norm gets statistics that do nothing, mean 0 and variance 1; its scale and bias are 1
    and what the layer adds.
    """
    parts = reading.form.split(reading.particles)
    for path, name in zip(neurons.rows, ("w", "v"), strict=False):
        bias = parts.get("b" if name == "w" else "c")
        layer = _Layer(block.get_submodule(path))
        if neurons.norm and _neutralise(block, neurons.norm, bias, len(reading.particles)):
            bias = torch.zeros_like(bias) if bias is not None and layer.has_bias else None
        layer.set_rows(parts[name], bias)
    last, offset = _Layer(block.get_submodule(neurons.columns)), reading.offset
    if neurons.last_norm and _neutralise(
        block, neurons.last_norm, offset, reading.form.parts[0][1][0]
    ):
        offset = torch.zeros_like(offset) if offset is not None and last.has_bias else None
    last.set_columns(parts["u"], offset)


def particle_parameters(block: nn.Module, neurons: Neurons) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters, with their names in the block, that particles and offset replace."""
    for path in neurons.layers:
        for name, parameter in block.get_submodule(path).named_parameters(recurse=False):
            yield f"{path}.{name}", parameter


def particle_buffers(block: nn.Module, neurons: Neurons) -> Iterator[str]:
    """The names of the batch norms' buffers, which are folded into the particles too."""
    for path in neurons.layers:
        for name, _ in block.get_submodule(path).named_buffers(recurse=False):
            yield f"{path}.{name}"


class _Layer:
    """A linear or convolutional layer, by the hidden neurons on one side of it."""

    def __init__(self, layer: nn.Module):
        self.layer: Any = layer
        self.transposed = type(layer).__name__ == "Conv1D" and hasattr(layer, "nf")
        known = isinstance(layer, nn.Linear | nn.Conv2d) or self.transposed
        if not known or getattr(layer, "groups", 1) != 1:
            raise InputError(
                f"a hidden layer is {layer}; expected a linear layer or a convolution in one group"
            )
        if not cast(Tensor, layer.weight).is_floating_point():
            raise InputError(f"a hidden layer is quantised ({type(layer).__name__})")

    @property
    def rows(self) -> Tensor:
        """[M, *shape]: what each neuron reads."""
        weight = widened(self.layer.weight.detach())
        return weight.T if self.transposed else weight

    @property
    def columns(self) -> Tensor:
        """[M, d, …]: what each neuron writes."""
        weight = widened(self.layer.weight.detach())
        return weight if self.transposed else weight.transpose(0, 1)

    @property
    def bias(self) -> Tensor | None:
        return widened(self.layer.bias.detach()) if self.has_bias else None

    @property
    def has_bias(self) -> bool:
        return getattr(self.layer, "bias", None) is not None

    def set_rows(self, rows: Tensor, bias: Tensor | None) -> None:
        """With M neurons; the sizes that the layer says of itself follow."""
        self._set(rows.T if self.transposed else rows, bias)
        for name in ("out_features", "out_channels", "nf"):
            if hasattr(self.layer, name):
                setattr(self.layer, name, len(rows))

    def set_columns(self, columns: Tensor, bias: Tensor | None) -> None:
        """With M neurons."""
        self._set(columns if self.transposed else columns.transpose(0, 1), bias)
        for name in ("in_features", "in_channels", "nx"):
            if hasattr(self.layer, name):
                setattr(self.layer, name, len(columns))

    def _set(self, weight: Tensor, bias: Tensor | None) -> None:
        _replace(self.layer, "weight", weight)
        if bias is not None:
            _replace(self.layer, "bias", bias)


def _replace(module: nn.Module, name: str, value: Tensor) -> None:
    old = getattr(module, name)
    learns = old is None or old.requires_grad
    dtype = value.dtype if old is None or is_wide(old) else old.dtype
    value = value.detach().to(dtype).contiguous().clone()
    setattr(module, name, nn.Parameter(value, requires_grad=learns))


def _norm(block: nn.Module, path: str) -> nn.BatchNorm2d | None:
    norm = block.get_submodule(path) if path else nn.Identity()
    if isinstance(norm, nn.Identity):
        return None
    whole = isinstance(norm, nn.BatchNorm2d) and norm.affine and norm.running_mean is not None
    if not whole:
        raise InputError(
            f"{path} of {type(block).__name__} is a {type(norm).__name__}, which couples the "
            "hidden neurons or normalises their sum: the block is not a mean of particles; "
            'expected no norm ("none"), or a batch norm ("batch") with scale, bias and running '
            "statistics, read as in evaluation mode"
        )
    return cast(nn.BatchNorm2d, norm)


def _affine(block: nn.Module, path: str) -> tuple[Tensor | None, Tensor | None]:
    """Scale and shift of a batch norm in evaluation mode; None for no norm."""
    norm = _norm(block, path)
    if norm is None or norm.running_mean is None or norm.running_var is None:
        return None, None
    scale = norm.weight.detach() / (norm.running_var + norm.eps).sqrt()
    return scale, norm.bias.detach() - norm.running_mean * scale


def _neutralise(block: nn.Module, path: str, bias: Tensor | None, channels: int) -> bool:
    """Makes a batch norm x ↦ x + bias in evaluation mode; False where there is no norm."""
    norm = _norm(block, path)
    if norm is None or bias is None or norm.running_mean is None or norm.running_var is None:
        return False
    norm.num_features = channels
    norm.running_mean = torch.zeros_like(bias)
    norm.running_var = torch.ones_like(bias)
    _replace(norm, "weight", torch.full_like(bias, (1 + norm.eps) ** 0.5))
    _replace(norm, "bias", bias)
    return True


def _along(values: Tensor, like: Tensor, axis: int) -> Tensor:
    """The values [n] shaped to multiply an axis."""
    return values.reshape([-1 if i == axis else 1 for i in range(like.dim())])


def _name_of(sigma: nn.Module) -> str:
    return repr(sigma).replace("inplace=True", "").replace("approximate='none'", "")


def is_wide(x: Tensor) -> bool:
    """Whether a tensor has more than half precision."""
    return x.dtype.itemsize >= 4


def widened(x: Tensor) -> Tensor:
    """In float32 what has half precision."""
    return x if is_wide(x) else x.float()


def numbers_in(shape: tuple[int, ...]) -> int:
    """Their product."""
    return int(torch.Size(shape).numel())
