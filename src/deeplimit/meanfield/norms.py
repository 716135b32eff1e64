"""Batch norms of a block: folded into its neurons in evaluation mode, carried for training mode."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from deeplimit.errors import InputError
from deeplimit.meanfield.neuron_layer import replace_value, widened


@dataclass(frozen=True, eq=False)
class Norms:
    """What the batch norms of a layer are besides their affine map of evaluation mode.

    A channel γ (z − μ) / √(v + ε) + β has three numbers (|γ|, β, v); γ's sign is the weights', and
    μ is what leaves evaluation mode as the particles have it, so that these numbers act in training
    mode alone. They are no part of a particle, nor of d.

    Attributes:
        inner: [M, 3], the channel of each particle; None where there is no norm, or none is known.
        outer: [d, 3], of the norm behind the second layer, |γ| and β as densities in depth.
    """

    inner: Tensor | None = None
    outer: Tensor | None = None

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


def moved_norms(
    norms: Sequence[Norms],
    weights: Sequence[float],
    move: Callable[[Sequence[Tensor]], Tensor],
) -> Norms:
    """The norms of a layer made of others: what became of the particles becomes of their channels.

    Mean |γ|, β and v: a mean of neurons keeps in training mode the mean and the spread that they
    have, which the mean of their weights alone loses (REPAIR, arXiv 2211.08403).

    Args:
        norms: of the layers.
        weights: λ_k of the norms behind the second layer.
        move: values [M_k, q] of the particles of each layer to those [M, q] of the new one.
    """
    inner = [n.inner for n in norms if n.inner is not None]
    outer = [n.outer for n in norms if n.outer is not None]
    return Norms(
        move(inner) if len(inner) == len(norms) else None,
        sum((w * x.to(outer[0]) for w, x in zip(weights, outer, strict=True)), 0 * outer[0])
        if len(outer) == len(norms)
        else None,
    )


def fold(
    block: nn.Module, path: str, weight: Tensor, axis: int, bias: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Weight and bias of a layer with the norm behind it in evaluation mode; |γ|, β, v.

    Raises:
        InputError: a norm that couples neurons, or one without scale, bias or running statistics.
    """
    norm = _batch_norm(block, path)
    if norm is None:
        return weight, bias, None
    gamma, beta, mean, variance = (
        widened(cast(Tensor, x).detach())
        for x in (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    )
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
    nothing = torch.stack(
        [torch.full_like(bias, (1 + norm.eps) ** 0.5), bias, torch.ones_like(bias)], 1
    )
    rows = nothing if channels is None else channels.to(bias)
    scale = rows[:, 0] / (rows[:, 2] + norm.eps).sqrt()
    known = (scale >= torch.finfo(scale.dtype).tiny) & (channels is not None)
    gamma, beta, variance = torch.where(known[:, None], rows, nothing).T
    scale = torch.where(known, scale, torch.ones_like(scale))
    norm.num_features = len(bias)
    values = {
        "weight": gamma,
        "bias": beta,
        "running_mean": (beta - bias) / scale,
        "running_var": variance,
    }
    for name, value in values.items():
        replace_value(norm, name, value)
    return weight / _along(scale, weight, axis), torch.zeros_like(bias)


def _batch_norm(block: nn.Module, path: str) -> nn.BatchNorm2d | None:
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


def _along(values: Tensor, like: Tensor, axis: int) -> Tensor:
    """The values [n] shaped to multiply an axis."""
    return values.reshape([-1 if i == axis else 1 for i in range(like.dim())])
