"""The geodesic between two networks: a network at every t ([BPV24] arXiv 2403.12887)."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from deeplimit._anatomy.checks import check_number
from deeplimit._anatomy.evaluation import Inputs
from deeplimit.errors import InputError
from deeplimit.meanfield.alignment import aligned
from deeplimit.meanfield.frame import Frame, listed
from deeplimit.meanfield.grid import merged_grid
from deeplimit.meanfield.measure import LayerwiseMeasure, Network, as_measure
from deeplimit.meanfield.norms import moved_norms
from deeplimit.meanfield.transport import CotDistance, Plan, belongs, cot_distance

FRAMES = ("equal", "interpolate")


def cot_geodesic(
    a: Network,
    b: Network,
    t: float,
    *,
    frame: str = "equal",
    align: bool = False,
    batch: Inputs | None = None,
    transport: CotDistance | None = None,
) -> LayerwiseMeasure:
    """The point μ_t of a geodesic of d from a (t = 0) to b (t = 1); `.network()` is its network.

    With γ_s an optimal coupling of the layers at depth s,

        μ_t(·|s) = ((1 − t) ω + t ω')_# γ_s,      d(μ_s, μ_t) = |s − t| d(a, b).

    Equal numbers of equal atoms move along straight lines to their matches, in the order of a.
    Otherwise the atoms are those of the coupling's support, with its weights: at most M + M' − 1 of
    them per layer, exact at every t. A network of fewer neurons is what `narrow` makes of it; that
    is no longer the geodesic. The batch norms' channels of coupled neurons are averaged likewise
    (|γ|, β and the running variance), whatever `frame` is; this acts in training mode alone.

    For unequal depths the layers are the cells of the merged grid, at every t. The measures are
    exact there too: μ_0 and μ_1 are those of a and b, and the distances are as above. The output of
    `.network()` at t = 0 and 1 is not that of a and b: a layer that the grid divides in parts of θh
    and (1 − θ)h takes two steps where the network made one, which adds θ(1 − θ)h² φ′(x)φ(x) + O(h³)
    to the state, O(1/N) in all, the error of Euler's method. By how much, on a batch x:

        (cot_geodesic(a, b, 0.0, transport=transport).network()(x) - a(x)).abs().max()

    Where a's depth is a multiple of b's no layer of a is divided, and its end is the network's to
    rounding, as both ends are for equal depths.

    Source: [BPV24] arXiv 2403.12887.

    Args:
        a: a network, or its measure.
        b: another, of any width and depth, with particles of the same kind and size.
        t: in [0, 1].
        frame: what becomes of stem, heads, norms, attention and output biases. With "equal" they
            must be so; with "interpolate" they move linearly, (1 − t) of a's and t of b's, which
            is not part of the geodesic. Without frames (measures of particles alone) there is none.
        align: b is taken in the basis of the residual stream in which its states are nearest to
            a's: the orthogonal Q of min Σ_n |x_n^a − Q x_n^b|² over the states of a batch
            (Procrustes), with u, w, stem and head turned along, so that b's function is the same.
            Legitimate where nothing acts on single coordinates of the stream: linear layers before
            and behind it, no norm and no activation on it. Elsewhere (states that are the logits or
            the data, layer norms, batch norms) the basis is fixed, and it is refused. d is then the
            distance to that b; `align_streams` gives it.
        batch: the inputs on which both are run to align them.
        transport: `cot_distance(a, b, plans=True)`, where several t are wanted; by Sinkhorn the
            path is no geodesic.

    Raises:
        InputError: t outside [0, 1], different state dimensions or activations, frames that differ,
            blocks that cannot be divided in depth, a basis that is fixed, plans that do not fit.
    """
    expected = "t in [0, 1], from the first network to the other"
    t = check_number("t", t, expected, lambda v: 0 <= v <= 1)
    if frame not in FRAMES:
        raise InputError(f"frame is {frame!r}; expected one of {', '.join(FRAMES)}")
    start, end = as_measure(a), as_measure(b)
    if align:
        if batch is None:
            raise InputError("align=True needs batch=inputs, on which both networks are run")
        if transport is not None:
            raise InputError("align=True changes b: give transport of align_streams(a, b, batch)")
        end = aligned(start, end, batch)
    mixed = mixed_frame([start, end], [1 - t, t], frame)
    plans = _plans(start, end, transport)
    layers, masses, norms = [], [], []
    for (n, m), plan in zip(plans.layers, plans.plans or (), strict=True):
        between = partial(_between, plan, t)
        layers.append(between([start.layers[n], end.layers[m]]))
        masses.append(torch.from_numpy(plan.masses))
        norms.append(moved_norms([start.norms[n], end.norms[m]], [1 - t, t], between))
    return LayerwiseMeasure(layers, masses, plans.breakpoints, frame=mixed, norms=norms)


def _between(plan: Plan, t: float, ends: Sequence[Tensor]) -> Tensor:
    """(1 − t) x + t y of the atoms that a plan couples."""
    x, y = ends
    rows, columns = (torch.from_numpy(k).to(x.device) for k in (plan.rows, plan.columns))
    return (1 - t) * x[rows] + t * y[columns].to(x)


def mixed_frame(
    measures: list[LayerwiseMeasure], weights: list[float], policy: str
) -> Frame | None:
    """Σ_k λ_k of the frames, on the merged grid; None where none of the measures has one.

    Raises:
        InputError: some have none, they are of different networks, or differ and should be equal.
    """
    frames = [measure.frame for measure in measures]
    there = [frame for frame in frames if frame is not None]
    if not there:
        return None
    if len(there) < len(frames):
        raise InputError("one of the measures has no frame; make it with frame=model")
    grid = merged_grid(*(measure.breakpoints for measure in measures))
    first, *others = (frame.on(grid) for frame in there)
    for other in others:
        different = first.difference(other)
        if different:
            raise InputError(
                f"the networks differ in {different}; expected networks that differ in width, "
                "depth and values only"
            )
        unequal = first.unequal(other)
        if unequal and policy == "equal":
            raise InputError(
                f"the networks differ in {listed(unequal)}, which no particles are: train them "
                "with these shared (deeplimit train DATA --frame RUN), align them first where the "
                "basis of their streams is free (align_streams, --align), or give the frame "
                '"interpolate", which moves them linearly'
            )
    return first.mixed(others, weights) if policy == "interpolate" else first


def _plans(a: LayerwiseMeasure, b: LayerwiseMeasure, given: CotDistance | None) -> CotDistance:
    """The couplings; those given, if they are of these measures."""
    if given is None:
        return cot_distance(a, b, plans=True)
    if not isinstance(given, CotDistance) or given.plans is None:
        raise InputError("transport has no plans: give cot_distance(a, b, plans=True)")
    if not belongs(given, a, b):
        raise InputError(
            "transport: these are couplings of other networks; leave transport out or give "
            "cot_distance(a, b, plans=True)"
        )
    return given
