"""The metric slope of the risk, and lengths in the metric of the flow."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from deeplimit.errors import InputError
from deeplimit.meanfield.coordinates import Coordinate, coordinates


def slope(model: nn.Module, *, others: float = 1.0) -> float:
    """‖∇L‖_μ of the risk L whose gradients the parameters have now, after `loss.backward()`.

        ‖∇L‖²_μ = N·M·Σ_{n,i} ‖∂L/∂ω_{n,i}‖²,    ω = (u, w, b),  u = N·M·h·V,

    summed over layers of widths M_n where these differ; in the parameters that a network holds
    Σ_n ‖∂L/∂V‖²/(N·M·h²) + N·M·(‖∂L/∂W‖² + ‖∂L/∂b‖²). What is trained besides belongs to the flow:
    a layer's bias c behind V adds ‖∂L/∂c‖²/(N·h²), other parameters add others·‖∂L/∂θ‖². Along the
    flow dL/dt = −‖∇L‖²_μ.

    Args:
        model: the network, as for `particle_flow`.
        others: as given to `particle_flow`; 0 for a flow of the particles alone.

    Frozen parameters and those without a gradient count as 0.

    Raises:
        InputError: a network that is not a mean of particles, no gradient at all, or values that
            are not finite.

    Source: [BPV24] arXiv 2403.12887.
    """
    return slope_of(coordinates(model, others))


@torch.no_grad()
def slope_of(every: Sequence[Coordinate]) -> float:
    """√(Σ rate ‖∂L/∂θ‖²), from the gradients that the parameters have now.

    Raises:
        InputError: none has one, or they are not finite.
    """
    with_gradient = [(c.rate, c.parameter.grad) for c in every if c.parameter.grad is not None]
    if not with_gradient:
        raise InputError("the parameters have no gradients; call loss.backward() first")
    value = math.sqrt(sum(rate * _square(grad) for rate, grad in with_gradient))
    if not math.isfinite(value):
        raise InputError(
            "the gradients have numbers that are not finite; take weights from before the training "
            "diverged, or a smaller lr"
        )
    return value


@torch.no_grad()
def length(changes: Iterable[tuple[Coordinate, Tensor]]) -> float:
    """√(Σ mass ‖dω‖²) of changes dθ of parameters: ω = scale · θ."""
    return math.sqrt(sum(_square(change) / c.rate for c, change in changes))


def _square(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x.double()).square())
