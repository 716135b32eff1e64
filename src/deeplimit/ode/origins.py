"""Where the parameters of a network of another depth come from, and on what scale they live."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn

ONE = Fraction(1)


@dataclass(frozen=True)
class Origin:
    """A parameter's value is ρ Σ w_i θ_i; its gradient is, to first order, γ Σ w_i ∂L/∂θ_i.

    Attributes:
        sources: the θ_i with their weights w_i, which add up to 1; the first says in which of an
            optimiser's groups the parameter belongs.
        gradient: γ.
        size: ρ, so that an update of ρ Σ w_i δθ_i does what the δθ_i did.
    """

    sources: tuple[tuple[nn.Parameter, Fraction], ...]
    gradient: Fraction = ONE
    size: Fraction = ONE

    @property
    def weights(self) -> tuple[Fraction, ...]:
        """The w_i."""
        return tuple(weight for _, weight in self.sources)


Origins = dict[nn.Parameter, Origin]


def mixed(tensors: Sequence[Tensor], weights: Sequence[Fraction]) -> Tensor:
    """Σ w_i t_i, a new tensor; to the last bit the first where all are equal."""
    first = tensors[0].detach()
    if all(torch.equal(first, tensor) for tensor in tensors[1:]):
        return first.clone()
    if len(tensors) == 2:
        return torch.lerp(first, tensors[1].detach(), float(weights[1]))
    terms = (scaled(t.detach(), w) for t, w in zip(tensors, weights, strict=True))
    return torch.stack(list(terms)).sum(0)


def scaled(tensor: Tensor, by: Fraction) -> Tensor:
    """Tensor times `by`, rounded once where that is m or 1/m."""
    if by == 1:
        return tensor
    return tensor / by.denominator if by.numerator == 1 else tensor * by.numerator / by.denominator
