"""One basis for the residual streams of two networks: the orthogonal map between their states."""

import copy
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from deeplimit._anatomy import anatomy
from deeplimit._anatomy.evaluation import Inputs, evaluating
from deeplimit.errors import InputError
from deeplimit.meanfield.frame import Frame, check_batch
from deeplimit.meanfield.measure import LayerwiseMeasure, Network, as_measure


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
