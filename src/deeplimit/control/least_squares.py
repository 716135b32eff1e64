"""Least squares of changes u ≈ A m + c from moments, and folding them into a branch's end."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from deeplimit._anatomy.block_call import End, is_transposed

RIDGES = (0.0, 1e-6, 1e-4, 1e-2, 1.0)
TINY = 1e-13  # of the largest eigenvalue: directions that the data do not have


@dataclass(frozen=True)
class Fit:
    """A map u = a m + c of one kind."""

    kind: str
    a: Tensor
    c: Tensor
    ridge: float = 0.0

    @property
    def named(self) -> tuple[str, float]:
        """Tells it from other fits of the same data."""
        return self.kind, self.ridge


class Moments:
    """Sums over rows, in float64: with z = (m, 1) z zᵀ and z uᵀ; ‖u‖², and ‖x‖² of the targets."""

    def __init__(self, d: int, device: torch.device):
        self.gram = torch.zeros(d + 1, d + 1, dtype=torch.float64, device=device)
        self.cross = self.gram[:, :d].clone()
        self.squares = self.size = 0.0

    @property
    def count(self) -> int:
        """The number of rows."""
        return int(self.gram[-1, -1])

    def add(self, m: Tensor, u: Tensor, x: Tensor) -> None:
        """Rows [n, d] more."""
        z = torch.cat([m, m.new_ones(len(m), 1)], 1)
        self.gram += z.T @ z
        self.cross += z.T @ u
        self.squares += float(u.square().sum())
        self.size += float(x.square().sum())

    def merge(self, other: "Moments") -> None:
        """Those of other rows more."""
        self.gram += other.gram
        self.cross += other.cross
        self.squares += other.squares
        self.size += other.size

    def covariance(self) -> Tensor:
        """Of m, [d, d]."""
        mean = self.gram[-1, :-1] / self.count
        return self.gram[:-1, :-1] / self.count - mean[:, None] * mean

    def residual(self, fit: Fit | None) -> float:
        """‖u − a m − c‖ / ‖x‖ over the rows; of None ‖u‖ / ‖x‖."""
        left = self.squares
        if fit is not None:
            w = torch.cat([fit.a, fit.c[:, None]], 1)
            left += float(((w @ self.gram) * w).sum() - 2 * (w * self.cross.T).sum())
        return (max(left, 0.0) / self.size) ** 0.5 if self.size else 0.0


def fits(moments: Moments, end: End) -> Iterator[Fit]:
    """The least-squares fits that an end can take: a scale, channels, and linear maps."""
    gram, cross, n, gain = moments.gram, moments.cross, moments.count, end.gain
    d = len(gain)
    none = gain.new_zeros(d)
    squares, products = gram.diagonal()[:-1], cross[:-1].diagonal()
    divisor = (gain.square() * squares).sum()
    scale = (gain * products).sum() / divisor if divisor > 0 else divisor
    yield Fit("scale", torch.diag(scale * gain), none)
    mean, means = (gram[-1, :-1] / n, cross[-1] / n) if end.biased else (none, none)
    variances, covariances = squares - n * mean.square(), products - n * mean * means
    there = variances > TINY * squares
    a = torch.where(there, covariances / torch.where(there, variances, 1.0), 0.0)
    yield Fit("channels", torch.diag(a), means - a * mean)
    if not end.mixes:
        return
    centred = gram[:-1, :-1] - n * mean[:, None] * mean
    values, vectors = torch.linalg.eigh(centred)
    turned = vectors.T @ (cross[:-1] - n * mean[:, None] * means)
    for ridge in RIDGES:
        if not ridge and n <= d:
            continue
        damped = values + ridge * centred.diagonal().mean()
        known = damped > TINY * values[-1].abs()
        inverse = torch.where(known, 1 / torch.where(known, damped, 1.0), 0.0)
        full = (vectors @ (inverse[:, None] * turned)).T
        yield Fit("linear", full, means - full @ mean, ridge)


def fold(end: End, a: Tensor, c: Tensor, covariance: Tensor, offset: float = 0.0) -> None:
    """Changes an end in place so that it gives m + (a m + c) / gain in place of m.

    Where it does not mix channels a is diagonal, and where it has no bias c is zero. A norm may add
    an `offset` to its weight before it multiplies by it. Of a batch norm behind a convolution the
    latter takes the map, and the norm's running statistics become those of what it normalises then,
    with the `covariance` of m, so that it can be trained on.
    """
    module = cast(Any, end.module)
    t = torch.eye(len(c), dtype=a.dtype, device=a.device) + a / end.gain[:, None]
    e = c / end.gain
    weight = module.weight.double()
    if end.convolution is not None:
        _fold_convolution(module, end.convolution, t, e, covariance)
        return
    if weight.dim() == 1:
        new = (weight + offset) * t.diagonal() - offset
    elif is_transposed(module):
        new = weight @ t.T
    else:
        new = torch.einsum("ij,j...->i...", t, weight)
    bias = t @ module.bias.double() + e if end.biased else None
    with torch.no_grad():
        module.weight.copy_(new)
        if bias is not None:
            module.bias.copy_(bias)


def _fold_convolution(
    norm: Any, convolution: nn.Conv2d, t: Tensor, e: Tensor, covariance: Tensor
) -> None:
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight.double()
    td = t * scale
    variance = (t @ covariance @ t.T).diagonal().clamp(min=0)
    with torch.no_grad():
        convolution.weight.copy_(torch.einsum("ij,j...->i...", td, convolution.weight.double()))
        if convolution.bias is not None:
            convolution.bias.copy_(td @ convolution.bias.double())
        norm.running_mean.copy_(td @ norm.running_mean.double())
        norm.running_var.copy_(variance)
        norm.weight.copy_((norm.running_var.double() + norm.eps).sqrt())
        norm.bias.copy_(t @ norm.bias.double() + e)
