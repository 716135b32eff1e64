"""The layers of a block, by its hidden neurons: linear ones, convolutions, batch norms."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from deeplimit._anatomy.block_call import is_transposed
from deeplimit.errors import InputError

Move = Callable[[Sequence[Tensor]], Tensor]


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
    mean = None
    if len(outer) == len(norms):
        pairs = zip(weights, outer, strict=True)
        mean = sum((w * x.to(outer[0]) for w, x in pairs), 0 * outer[0])
    return Norms(move(inner) if len(inner) == len(norms) else None, mean)


class NeuronLayer:
    """A linear or convolutional layer by its hidden neurons: `first` where it gives them."""

    def __init__(self, block: nn.Module, path: str, *, first: bool):
        layer: Any = block.get_submodule(path)
        transposed = is_transposed(layer)
        known = isinstance(layer, nn.Linear | nn.Conv2d) or transposed
        if not known or getattr(layer, "groups", 1) != 1:
            raise InputError(
                f"a hidden layer is {layer}; expected a linear layer or a convolution in one group"
            )
        if not layer.weight.is_floating_point():
            raise InputError(f"a hidden layer is quantised ({type(layer).__name__})")
        self.layer, self.flip = layer, transposed == first
        given, taken = ("out_features", "out_channels", "nf"), ("in_features", "in_channels", "nx")
        self.sizes = given if first else taken

    def get(self) -> tuple[Tensor, Tensor | None]:
        """The weights of each neuron [M, …], and the layer's bias, if it has one."""
        weight, bias = _widened(self.layer.weight), getattr(self.layer, "bias", None)
        weight = weight.transpose(0, 1) if self.flip else weight
        return weight, None if bias is None else _widened(bias)

    def put(self, weight: Tensor, bias: Tensor | None) -> None:
        """Puts in M neurons; the sizes that the layer says of itself follow."""
        _replace_value(self.layer, "weight", weight.transpose(0, 1) if self.flip else weight)
        there = getattr(self.layer, "bias", None) is not None
        if bias is not None and (there or bool(bias.any())):
            _replace_value(self.layer, "bias", bias)
        for name in self.sizes:
            if hasattr(self.layer, name):
                setattr(self.layer, name, len(weight))


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


def fold(
    block: nn.Module, path: str, weight: Tensor, axis: int, bias: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Weight and bias of a layer with the norm behind it in evaluation mode; |γ|, β, v."""
    norm = _batch_norm(block, path)
    if norm is None:
        return weight, bias, None
    numbers = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    gamma, beta, mean, variance = map(_widened, numbers)
    scale = gamma / (variance + norm.eps).sqrt()
    shift = beta - mean * scale + (0 if bias is None else bias * scale)
    return (
        weight * _along(scale, weight, axis),
        shift,
        torch.stack([gamma.abs(), beta, variance], 1),
    )


def unfold(
    block: nn.Module,
    path: str,
    weight: Tensor,
    axis: int,
    bias: Tensor | None,
    channels: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """The inverse of `fold`: gives a norm its channels; weight and bias of the layer before it.

    Without channels, and where γ = 0, so that no weights are left, statistics do nothing: mean 0
    and variance 1, the scale 1 and the bias what the layer adds.
    """
    norm = _batch_norm(block, path)
    if norm is None or bias is None:
        return weight, bias
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
    return weight / _along(scale, weight, axis), torch.zeros_like(bias)


def _along(values: Tensor, like: Tensor, axis: int) -> Tensor:
    """The values [n] shaped to multiply an axis."""
    return values.reshape([-1 if i == axis else 1 for i in range(like.dim())])
