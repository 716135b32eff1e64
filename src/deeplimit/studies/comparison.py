"""Distances between networks: the layer-conditional distance of every two."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path

import torch
from torch import Tensor

from deeplimit.meanfield import CotDistance, LayerwiseMeasure, Plan, cot_distance
from deeplimit.meanfield.transport import check_comparable
from deeplimit.studies.measured_runs import MeasuredRun, blamed, measured
from deeplimit.terminal import ProgressCallback, silent

NUMBERS = 2**24  # of particles' differences at a time


@dataclass(frozen=True)
class ComparedNetwork:
    """One of the networks.

    Attributes:
        name: what it is called here.
        path: as it was given.
        depth: N.
        widths: M_n, its numbers of particles.
        numbers: of which a particle consists.
        size: (∫ ∫ |ω|² dμ(ω|s) ds)^{1/2}, its distance from the network of zeros.
    """

    name: str
    path: str
    depth: int
    widths: tuple[int, ...]
    numbers: tuple[int, ...]
    size: float


@dataclass(frozen=True)
class ComparedLayer:
    """Two layers that meet at some depth, and the coupling of their particles.

    Attributes:
        start, end: the part of [0, 1] in which they meet.
        first, second: their numbers in the two networks.
        distance: W_2.
        by_number: the distance with neuron i sent to neuron i instead; None for unequal widths.
        atoms: pairs of particles that the coupling has.
        unmoved: share of the mass that the coupling sends to the neuron of the same number; None
            for unequal widths.
        largest: the longest way of a particle.
    """

    start: float
    end: float
    first: int
    second: int
    distance: float
    by_number: float | None
    atoms: int
    unmoved: float | None
    largest: float


@dataclass(frozen=True)
class ComparedPair:
    """Two of the networks.

    Attributes:
        first, second: their numbers among those compared.
        distance: d; by Sinkhorn never below it.
        lower: d is at least this; equal to `distance` where the solver is exact.
        by_number: the distance of the parameters, neuron i against neuron i, with the particles'
            scale; None where widths or depths differ. It is never below d.
        layers: where they meet, from the input on.
    """

    first: int
    second: int
    distance: float
    lower: float
    by_number: float | None
    layers: tuple[ComparedLayer, ...]


@dataclass(frozen=True)
class Comparison:
    """Holds what `compare_runs` measures.

    Attributes:
        networks: as given.
        pairs: every two of them, (0, 1), (0, 2), …
        sinkhorn: the regularisation; None for the exact solver.
    """

    networks: tuple[ComparedNetwork, ...]
    pairs: tuple[ComparedPair, ...]
    sinkhorn: float | None = None

    def distance(self, i: int, j: int) -> float:
        """Returns the distance d of two of the networks."""
        if i == j:
            return 0.0
        wanted = min(i, j), max(i, j)
        return next(p.distance for p in self.pairs if (p.first, p.second) == wanted)


def compare_runs(
    specs: Sequence[str | Path],
    *,
    sinkhorn: float | None = None,
    seed: int = 0,
    trust: bool = False,
    tell: ProgressCallback = silent,
) -> Comparison:
    """Measures the layer-conditional distances of networks of any widths and depths, two by two.

    >>> compare_runs([first, second]).distance(0, 1) > 0
    True

    The arguments are those of `deeplimit.verbs.compare`.

    Raises:
        InputError: fewer than two networks, no such run, networks that are not means of particles
            or have different state dimensions or activations.
    """
    runs = measured(specs, seed, trust=trust)
    every = list(combinations(range(len(runs)), 2))
    for i, j in every:  # before any takes its time
        with blamed(runs[i].path, runs[j].path):
            check_comparable(runs[i].measure, runs[j].measure)
    pairs = []
    for k, (i, j) in enumerate(every):
        tell(f"{runs[i].name} and {runs[j].name}", k / len(every))
        pairs.append(_pair(i, j, runs, sinkhorn))
    return Comparison(tuple(map(_network, runs)), tuple(pairs), sinkhorn)


def compared_layers(
    a: LayerwiseMeasure, b: LayerwiseMeasure, found: CotDistance
) -> tuple[ComparedLayer, ...]:
    """Says what the couplings do, layer by layer."""
    cells = zip(found.layers, found.plans or (), found.per_layer, strict=True)
    ends, made = pairwise(found.breakpoints), []
    for ((n, m), plan, distance), (start, end) in zip(cells, ends, strict=True):
        x, y = a.layers[n].cpu().double(), b.layers[m].cpu().double()
        alike = x.shape == y.shape and a.is_uniform(n) and b.is_uniform(m)
        made.append(
            ComparedLayer(
                start=start,
                end=end,
                first=n,
                second=m,
                distance=distance,
                by_number=float((x - y).square().sum(1).mean().sqrt()) if alike else None,
                atoms=len(plan.rows),
                unmoved=float(plan.masses[plan.rows == plan.columns].sum()) if alike else None,
                largest=_longest(x, y, plan),
            )
        )
    return tuple(made)


def _longest(x: Tensor, y: Tensor, plan: Plan) -> float:
    """Finds the longest way of a particle; Sinkhorn's couplings have M·M′ atoms, so in parts."""
    few = max(1, NUMBERS // x.shape[1])
    rows = torch.split(torch.from_numpy(plan.rows), few)
    columns = torch.split(torch.from_numpy(plan.columns), few)
    parts = zip(rows, columns, strict=True)
    return math.sqrt(max(float((x[i] - y[j]).square().sum(1).max()) for i, j in parts))


def _network(run: MeasuredRun) -> ComparedNetwork:
    measure = run.measure
    squares = (
        length * float(mass @ layer.double().square().sum(1).cpu())
        for length, mass, layer in zip(measure.lengths, measure.masses, measure.layers, strict=True)
    )
    return ComparedNetwork(
        name=run.name,
        path=run.path,
        depth=measure.depth,
        widths=tuple(len(layer) for layer in measure.layers),
        numbers=tuple(sorted({layer.shape[1] for layer in measure.layers})),
        size=math.sqrt(math.fsum(squares)),
    )


def _pair(i: int, j: int, runs: Sequence[MeasuredRun], sinkhorn: float | None) -> ComparedPair:
    a, b = runs[i], runs[j]
    with blamed(a.path, b.path):
        found = cot_distance(a.measure, b.measure, plans=True, sinkhorn=sinkhorn)
    layers = compared_layers(a.measure, b.measure, found)
    by_number = None
    if a.measure.depth == b.measure.depth and all(c.by_number is not None for c in layers):
        squares = ((c.end - c.start) * (c.by_number or 0.0) ** 2 for c in layers)
        by_number = math.sqrt(math.fsum(squares))
    return ComparedPair(i, j, found.distance, found.lower, by_number, layers)
