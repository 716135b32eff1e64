"""Changing a network's depth: the same curve of controls, sampled at more or fewer nodes."""

import math
from fractions import Fraction
from typing import TypeVar

from torch import nn
from torch.optim import Optimizer

from deeplimit._anatomy import Stack, anatomy
from deeplimit.errors import InputError
from deeplimit.memory import OBJECTS, require
from deeplimit.ode.blocks import check_values, check_whole
from deeplimit.ode.resampling import Node, changing, resampled

Model = TypeVar("Model", bound=nn.Module)


def refine(model: Model, factor: int, *, optimizer: Optimizer | None = None) -> Model:
    """A network of the same class, m times as deep, that computes nearly the same.

    In every stage N layers become mN and the step h becomes h/m. The controls are interpolated
    piecewise linearly through θ_n at s_n = nh,

        θ'_{nm+j} = (1 − j/m) θ_n + (j/m) θ_{n+1},    j = 0 … m−1,

    on the last interval of Euler constantly, θ_{N−1}; Heun's N + 1 nodes become mN + 1. Floating
    buffers, such as the statistics of a batch norm, go the same way; others are those of θ_n. Where
    the step is 1 by definition (a CIFAR ResNet, models of transformers, timm, torchvision, other
    families) the ends of the residual branches are divided by m, `Anatomy.branch_ends`. Layers that
    belong to no stage (`stages`), such as those that change the state's shape, stay as they are.

    For controls smooth in depth the output changes by O(1/N) for Euler and O(1/N²) for Heun, for
    any other it may change by anything: `smoothness` tells. Source: [SAP22]
    arXiv 2205.14612.

    Args:
        model: left as it is.
        factor: m ≥ 1.
        optimizer: SGD, Adam or AdamW of `torch.optim`; changed in place: it then trains the new
            model. Its state is interpolated like the controls and rescaled with the gradients, as
            are learning rate, weight decay and ε, so that its next step changes the new network's
            output as it would have changed the old one's, to first order. Parameter groups are
            divided where need be (make a learning-rate scheduler anew), and a parameter goes into
            the group of the θ_n on its left. Gradients shrink: a limit on their norm means
            something else afterwards.

    Returns:
        The new model, independent of the first, in its mode, precision and place. A configuration
        or architecture is brought up to date: saved and loaded it is the same network.

    Raises:
        InputError: a factor that is no whole number ≥ 1, or so large that the network does not fit
            into memory; a model that `stages` does not take, one
            on the meta device, quantised, with layers that share parameters (`untie` it) or whose
            forward was replaced (`use_adjoint`); one where the ends of the residual branches are
            not known; an optimiser of another class or of another model.
    """
    check_whole("factor", factor)
    return resampled(model, lambda stage: _finer(stage, factor), Fraction(1, factor), optimizer)


def coarsen(model: Model, factor: int, *, optimizer: Optimizer | None = None) -> Model:
    """The inverse of `refine`: every mth control, θ'_n = θ_{nm}, with step hm; N/m layers.

    `coarsen(refine(model, m), m)` is the model itself, to the last bit where m is a power of 2;
    else what was multiplied, the step or the ends of branches, is so to rounding. The optimiser's
    state of layers that are left out is lost.

    Args:
        model: as for `refine`.
        factor: m, which divides the number of layers of every stage.
        optimizer: as for `refine`.

    Raises:
        InputError: as `refine`, or a stage that m does not divide.
    """
    check_whole("factor", factor)
    check_values(model)
    depths = [stage.horizon for stage in changing(anatomy(model))]
    common = math.gcd(*depths)
    if common % factor:
        possible = [str(m) for m in range(2, common + 1) if common % m == 0]
        raise InputError(
            f"factor is {factor}, the stages have {', '.join(map(str, depths))} layers; "
            + (f"what divides them: {', '.join(possible)}" if possible else "nothing divides them")
        )
    return resampled(
        model,
        lambda stage: [Node(n) for n in range(0, len(stage.blocks), factor)],
        Fraction(factor),
        optimizer,
    )


def _finer(stage: Stack, m: int) -> list[Node]:
    parameters = [p for block in stage.blocks for p in block.parameters() if p.is_cpu]
    size = m * (sum(p.nbytes for p in parameters) + OBJECTS * len(stage.blocks))
    what = f"a stage of {m * stage.horizon} layers does not fit into memory"
    require(size, what, "give a smaller factor")
    last = len(stage.blocks) - 1
    every = [(n, Fraction(j, m)) for n in range(stage.horizon) for j in range(m)]
    nodes = [Node(n, t) if n < last else Node(n) for n, t in every]
    return [*nodes, *(Node(n) for n in range(stage.horizon, last + 1))]
