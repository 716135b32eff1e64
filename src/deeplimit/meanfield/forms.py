"""One network in other forms: wider, in another basis of its stream, or narrower, near to it."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import cast, overload

import torch
from torch import Tensor, nn

from deeplimit._anatomy import Anatomy, anatomy
from deeplimit._anatomy.checks import check_count
from deeplimit._anatomy.evaluation import Inputs, evaluating
from deeplimit.errors import InputError
from deeplimit.extras import need
from deeplimit.meanfield.couplings import squared_distances
from deeplimit.meanfield.frame import Frame, check_batch
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


def align_streams(a: Network, b: Network, batch: Inputs) -> LayerwiseMeasure:
    """Turns b into the basis of its residual stream that is nearest to a's; b's own function stays.

    The states x_n^b of a batch meet those of a at equal depth s; of Procrustes' problem

        min Σ_n Σ_k |x_n^a(k) − Q x_n^b(k)|²   over orthogonal Q

    the solution turns u to Q u, w to Q w, the stem to Q stem and the head W to W Qᵀ. Legitimate for
    a `ResidualClassifier` whose state is neither data nor logits and has no norm: of kind "vector"
    with a linear stem, or "convolutional" of one stage with norm "none", where Q mixes channels.
    ReLU, layer norms and batch norms on the stream itself fix its basis.

        >>> turned = align_streams(model, other, x)
        >>> bool((turned.network()(x) - other(x)).abs().max() < 1e-12)
        True

    Source: Schönemann 1966 for Procrustes' problem, solved by one singular value decomposition.

    Raises:
        InputError: another network; networks of different state dimensions; samples that the
            networks do not take.
    """
    a, b = as_measure(a), as_measure(b)
    for frame in (b.frame, a.frame):
        if frame is None or not frame.divisible or _around(frame.template) is None:
            raise InputError(
                "the basis of this network's residual stream is fixed (its states are logits or "
                "data, or norms and activations act on their coordinates), so that no rotation of "
                "it is another form of the same network; align only a ResidualClassifier of kind "
                "'vector' with a linear stem, or 'convolutional' of one stage with norm 'none'"
            )
    x, y = _states(a, batch), _states(b, batch)
    if x[0].shape[1] != y[0].shape[1]:
        raise InputError(f"the states have {x[0].shape[1]} and {y[0].shape[1]} numbers or channels")
    depth = max(len(x), len(y)) - 1
    mine, theirs = (
        torch.cat([own[round(n * (len(own) - 1) / depth)] for n in range(depth + 1)])
        for own in (x, y)
    )
    u, _, v = torch.linalg.svd(mine.T @ theirs)  # of max tr(Q Σ x^b x^aᵀ): samples are rows here
    return _turned(b, cast(Frame, b.frame), u @ v)


def _around(model: nn.Module) -> tuple[nn.Module, nn.Linear] | None:
    """The layers that alone make and read the state, of one stage, with no norm or activation."""
    read = anatomy(model)
    if len(read.stacks) > 1 or read.stem_and_head is None:
        return None
    stem, head = map(_acting, read.stem_and_head)
    if not (stem and isinstance(stem[-1], nn.Linear | nn.Conv2d)):
        return None
    return (stem[-1], head[0]) if len(head) == 1 and isinstance(head[0], nn.Linear) else None


def _acting(module: nn.Module) -> list[nn.Module]:
    """Its layers, less those that act on all coordinates of the state alike."""
    layers = module if isinstance(module, nn.Sequential) else [module]
    return [m for m in layers if not isinstance(m, nn.Identity | nn.AdaptiveAvgPool2d | nn.Flatten)]


@torch.no_grad()
def _states(measure: LayerwiseMeasure, batch: Inputs) -> list[Tensor]:
    """x_0 … x_N as rows: [K, d], of images every pixel one."""
    with evaluating(measure.network()) as network:
        read = anatomy(network)
        stem, _ = _around(network) or (None, None)
        shape = cast(Tensor, read.example()).shape[1:] if isinstance(stem, nn.Linear) else ()
        check_batch(read, batch, shape)
        states, _ = read.states(batch)
    return [x.movedim(1, -1).flatten(0, -2).cpu().double() for x in states]


@torch.no_grad()
def _turned(b: LayerwiseMeasure, frame: Frame, rotation: Tensor) -> LayerwiseMeasure:
    """The same network with Q x in place of its states x."""

    def turn(values: Tensor, axis: int) -> Tensor:
        q = rotation.to(values)
        turned: Tensor = torch.tensordot(values, q, dims=([axis], [1]))
        return turned.movedim(-1, axis)

    layers = []
    for particles, layout in zip(b.layers, frame.layouts, strict=True):
        parts = layout.split(particles)
        layers.append(layout.join(parts | {name: turn(parts[name], 1) for name in ("u", "w")}))
    template = copy.deepcopy(frame.template)
    stem, head = cast(tuple[nn.Module, nn.Linear], _around(template))
    for parameter in stem.parameters():
        parameter.copy_(turn(parameter, 0))
    head.weight.copy_(turn(head.weight, 1))
    places = tuple(
        place if place.offset is None else replace(place, offset=turn(place.offset, 0))
        for place in frame.places
    )
    other = replace(frame, template=template, places=places)
    return LayerwiseMeasure(layers, b.masses, b.breakpoints, frame=other)
