"""Changing a network's width: particles split, or quantised in W_2."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import overload

import torch
from torch import Tensor, nn

from deeplimit._anatomy import Anatomy
from deeplimit._anatomy.checks import check_count
from deeplimit.extras import need
from deeplimit.meanfield.couplings import squared_distances
from deeplimit.meanfield.measure import Cell, LayerwiseMeasure, Network, as_measure, remade
from deeplimit.meanfield.particles import moved_norms
from deeplimit.tables import Shown, number, table


@dataclass(frozen=True, eq=False)
class Narrowed(Shown):
    """A network of fewer particles, and how far it is from the one it was made of.

    Attributes:
        measure: the narrow one; `measure.network()` is the network.
        distance: d of the two.
        per_layer: W_2 of each layer.
    """

    measure: LayerwiseMeasure
    distance: float
    per_layer: tuple[float, ...]

    def __str__(self) -> str:
        """The widths and the distance, and a row for each layer."""
        pairs = enumerate(zip(self.measure.layers, self.per_layer, strict=True))
        rows = [(str(n), str(len(layer)), number(w)) for n, (layer, w) in pairs]
        return (
            f"{self.measure} at d = {self.distance:.4g} from what it was made of\n"
            f"{table(('layer', 'particles', 'W_2'), rows)}"
        )


@overload
def widen(network: LayerwiseMeasure, factor: int) -> LayerwiseMeasure: ...
@overload
def widen(network: nn.Module | Anatomy, factor: int) -> nn.Module: ...
def widen(network: Network, factor: int) -> LayerwiseMeasure | nn.Module:
    """Makes every particle `factor` equal ones: another width, the same measure, the same function.

    In the network each neuron becomes k with the same w and b, and V/k. Trained on, equal particles
    stay equal (without dropout), so that the wide network does what the narrow one would with a
    learning rate scaled by N·M; break the tie by noise to use the width. The channel of a batch
    norm is copied with its neuron: the function is the same in evaluation and in training mode.

        >>> wide = widen(model, 2)
        >>> wide[0].inner.out_features, bool((wide(x) - model(x)).abs().max() < 1e-12)
        (8, True)

    Source: [BPV24] arXiv 2403.12887: a network's function is its measure's.

    Args:
        network: a network or a measure; left as it is.
        factor: k ≥ 1.

    Returns:
        A network from a network, a measure from a measure.

    Raises:
        InputError: a factor that is no whole number ≥ 1, and as `LayerwiseMeasure.of`.
    """
    check_count("factor", factor)

    def repeated(values: Sequence[Tensor]) -> Tensor:
        return values[0].repeat_interleave(factor, dim=0)

    measure = as_measure(network)
    cells: list[Cell] = [([(measure, n)], [1.0], repeated) for n in range(measure.depth)]
    masses = [mass.repeat_interleave(factor) / factor for mass in measure.masses]
    wide = remade(cells, masses, measure.breakpoints, measure.frame)
    return wide if isinstance(network, LayerwiseMeasure) else wide.network()


def narrow(network: Network, width: int, *, seed: int = 0) -> Narrowed:
    """Takes at most `width` weighted particles per layer, near the given ones in W_2.

    Per layer weighted k-means: atoms c_j with the mass of the particles nearest to them. For these
    weights sending each particle to its nearest atom is optimal, so that

        d² = Σ_n Δ_n Σ_i m_{n,i} min_j |ω_{n,i} − c_j|²

    is reported exactly; that the atoms are the best ones is not known (k-means ends in a local
    minimum). Its function changes as much as that distance allows: test it. A narrowed point of a
    geodesic is no longer on it. Layers that are narrow enough stay as they are. The batch norm's
    channel of an atom has the means of |γ|, β and running variance of its particles.

    Source: quantisation in W_2 is k-means (Pollard 1982); scikit-learn's `KMeans`.

        >>> small = narrow(model, 2)
        >>> bool(abs(small.distance / cot_distance(model, small.measure).distance - 1) < 1e-9)
        True

    Args:
        network: a network or a measure; left as it is.
        width: ≥ 1.
        seed: of the first atoms, k-means++.

    Raises:
        InputError: a width that is no whole number ≥ 1, a seed outside 0 … 2³² − 1, and as
            `LayerwiseMeasure.of`.
    """
    check_count("width", width)
    check_count("seed", seed, 0, 2**32 - 1)
    measure = as_measure(network)
    cells = list(zip(measure.layers, measure.masses, strict=True))
    found = [_quantised(layer, mass, width, seed) for layer, mass in cells]
    layers, masses, errors, nearest = zip(*found, strict=True)
    pairs = zip(measure.norms, measure.masses, masses, nearest, strict=True)
    norms = [moved_norms([norm], [1.0], partial(_means, *given)) for norm, *given in pairs]
    total = math.fsum(h * e for h, e in zip(measure.lengths, errors, strict=True))
    return Narrowed(
        LayerwiseMeasure(layers, masses, measure.breakpoints, frame=measure.frame, norms=norms),
        math.sqrt(total),
        tuple(map(math.sqrt, errors)),
    )


def _means(mass: Tensor, weights: Tensor, nearest: Tensor, values: Sequence[Tensor]) -> Tensor:
    """Values of the particles to their means by atom; those of an atom without mass are 0."""
    (x,) = values
    share = mass / weights[nearest].clamp(min=torch.finfo(weights.dtype).tiny)
    means = x.new_zeros(len(weights), x.shape[1])
    return means.index_add_(0, nearest.to(x.device), share.to(x)[:, None] * x)


def _quantised(
    layer: Tensor, mass: Tensor, width: int, seed: int
) -> tuple[Tensor, Tensor, float, Tensor]:
    """Atoms, their weights, W_2², and for each particle the number of its atom."""
    if len(layer) <= width:
        return layer, mass, 0.0, torch.arange(len(layer))
    x, p = layer.cpu().double().numpy(), mass.numpy()
    count = min(width, len({row.tobytes() for row in x}))
    k_means = need("sklearn.cluster", "measures").KMeans(count, n_init=1, random_state=seed)
    found = k_means.fit(x, sample_weight=p)
    atoms = torch.from_numpy(found.cluster_centers_).to(layer)
    costs = squared_distances(x, atoms.cpu().double().numpy())
    nearest = costs.argmin(1)
    weights = torch.zeros(count, dtype=torch.float64)
    weights.index_add_(0, torch.from_numpy(nearest), torch.from_numpy(p))
    error = math.fsum(p * costs[range(len(x)), nearest])
    return atoms, weights / weights.sum(), error, torch.from_numpy(nearest)
