"""Changing a network's depth: the same curve of controls, sampled at more or fewer nodes."""

import copy
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TypeVar, overload

import torch
from torch import nn
from torch.optim import Optimizer

from deeplimit._anatomy import Anatomy, Stack, anatomy, check_rebuilt
from deeplimit._anatomy.checks import check_count
from deeplimit.errors import InputError
from deeplimit.memory import OBJECTS, require
from deeplimit.ode.optimiser_state import (
    ONE,
    Origin,
    Origins,
    carry_over,
    checked_optimiser,
    mixed,
    scaled,
)
from deeplimit.ode.stages import averageable, blocks_of, branch_ends, check_untied, stages

Model = TypeVar("Model", bound=nn.Module)
Mean = dict[int, Fraction]  # the blocks that a new one is the mean of, with their weights


@overload
def refine(model: Anatomy, factor: int, *, optimizer: Optimizer | None = None) -> nn.Module: ...
@overload
def refine(model: Model, factor: int, *, optimizer: Optimizer | None = None) -> Model: ...
def refine(
    model: nn.Module | Anatomy, factor: int, *, optimizer: Optimizer | None = None
) -> nn.Module:
    """Makes a network of the same class, m times as deep, that computes nearly the same.

    In every stage N layers become mN and the step h becomes h/m. The controls are interpolated
    piecewise linearly through θ_n at s_n = nh,

        θ'_{nm+j} = (1 − j/m) θ_n + (j/m) θ_{n+1},    j = 0 … m−1,

    on the last interval of Euler constantly, θ_{N−1}; Heun's N + 1 nodes become mN + 1. Floating
    buffers, such as the statistics of a batch norm, go the same way; others are those of θ_n. Where
    the step is 1 by definition (a CIFAR ResNet, models of transformers, timm, torchvision) the ends
    of the residual branches are divided by m, `Anatomy.branch_ends`. Layers that belong to no stage
    (`stages`), such as those that change the state's shape, stay as they are.

        deeper = refine(model, 2, optimizer=optimizer)

    For controls smooth in depth the output changes by O(1/N) for Euler and O(1/N²) for Heun, for
    any other it may change by anything: `smoothness` tells. Source: [SAP22] arXiv 2205.14612.

    Args:
        model: left as it is; its anatomy will do.
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
            into memory; a model that `stages` does not take, one on the meta device, quantised,
            with layers that share parameters (`untie` it) or whose forward was replaced
            (`use_adjoint`); one where the ends of the residual branches are not known; an optimiser
            of another class or of another model.
    """
    check_count("factor", factor)
    return _resampled(model, lambda stage: _finer(stage, factor), Fraction(1, factor), optimizer)


@overload
def coarsen(model: Anatomy, factor: int, *, optimizer: Optimizer | None = None) -> nn.Module: ...
@overload
def coarsen(model: Model, factor: int, *, optimizer: Optimizer | None = None) -> Model: ...
def coarsen(
    model: nn.Module | Anatomy, factor: int, *, optimizer: Optimizer | None = None
) -> nn.Module:
    """Takes every mth control, θ'_n = θ_{nm}, with step hm: N/m layers, the inverse of `refine`.

    `coarsen(refine(model, m), m)` is the model itself, to the last bit where m is a power of 2;
    else what was multiplied, the step or the ends of branches, is so to rounding. The optimiser's
    state of layers that are left out is lost.

        shallower = coarsen(model, 2)

    Args:
        model: as for `refine`.
        factor: m, which divides the number of layers of every stage.
        optimizer: as for `refine`.

    Raises:
        InputError: as `refine`, or a stage that m does not divide.
    """
    check_count("factor", factor)
    averageable(model)
    depths = [stage.horizon for stage in _changing(anatomy(model))]
    common = math.gcd(*depths)
    if common % factor:
        possible = [str(m) for m in range(2, common + 1) if common % m == 0]
        raise InputError(
            f"factor is {factor}, the stages have {', '.join(map(str, depths))} layers; "
            + (f"what divides them: {', '.join(possible)}" if possible else "nothing divides them")
        )

    def every_mth(stage: Stack) -> list[Mean]:
        return [{n: ONE} for n in range(0, len(stage.blocks), factor)]

    return _resampled(model, every_mth, Fraction(factor), optimizer)


def _finer(stage: Stack, m: int) -> list[Mean]:
    parameters = [p for block in stage.blocks for p in block.parameters() if p.is_cpu]
    size = m * (sum(p.nbytes for p in parameters) + OBJECTS * len(stage.blocks))
    what = f"a stage of {m * stage.horizon} layers does not fit into memory"
    require(size, what, "give a smaller factor")
    last = len(stage.blocks) - 1
    places = [(n, Fraction(j, m)) for n in range(stage.horizon) for j in range(m)]
    places += [(n, Fraction(0)) for n in range(stage.horizon, last + 1)]
    return [{n: 1 - t, n + 1: t} if t and n < last else {n: ONE} for n, t in places]


@dataclass(frozen=True)
class Place:
    """A place of the new model.

    Attributes:
        mean: of which blocks of the old model, all counted; the first is copied.
        step: by what the step of this layer is multiplied.
        ends: the parameters that are multiplied with it; empty where the step is a number.
    """

    mean: Mean
    step: Fraction = ONE
    ends: frozenset[str] = frozenset()


def _changing(read: Anatomy) -> tuple[Stack, ...]:
    """The stages whose depth can change; all of those whose step is a number, since it is one."""
    long = {stage.index: stage for stage in stages(read)}
    chains = [stack for stack in read.stacks if not stack.adds]
    for stack in chains:
        if stack.index not in long and stack.horizon > 1:
            raise InputError(
                f"the blocks of stage {stack.index} differ in class or shape; its depth is fixed"
            )
    return tuple((long | {stack.index: stack for stack in chains}).values())


@torch.no_grad()
def _resampled(
    model: nn.Module | Anatomy,
    means_of: Callable[[Stack], Sequence[Mean]],
    step: Fraction,
    optimizer: Optimizer | None,
) -> nn.Module:
    """The model with these blocks in its stages and its step multiplied; `refine` says the rest."""
    inner = checked_optimiser(optimizer, averageable(model))
    read = anatomy(model)
    runs, blocks = _changing(read), blocks_of(read)
    check_untied(read.model, blocks)
    _check_forward(read.model)
    adding = all(run.adds for run in runs)
    ends = _ends(read, runs) if adding else [frozenset[str]()] * len(runs)
    numbers = {id(block): n for n, block in enumerate(blocks)}
    at = {n: [Place({n: ONE})] for n in range(len(blocks))}  # blocks of no stage keep theirs
    for run, names in zip(runs, ends, strict=True):
        own = [numbers[id(block)] for block in run.blocks]
        at |= {n: [] for n in own}
        for mean in means_of(run):
            shifted = {own[0] + n: weight for n, weight in mean.items()}
            at[own[0]].append(Place(shifted, step, names))
    places = [place for here in at.values() for place in here]
    counts = Counter(next(iter(place.mean)) for place in places)
    times = [counts[n] for n in range(len(blocks))]
    new = read.repeated(times) if adding else _stepped(read, times, step)
    origins: Origins = {}
    for place, block in zip(places, blocks_of(new), strict=True):
        origins |= _fill(block, [blocks[n] for n in place.mean], place)
    if adding:
        check_rebuilt(read, new)
    if inner is not None:
        # What stands around the blocks is the same in both, in the same order: names need not be,
        # as those of what follows the blocks in an nn.Sequential.
        held = {id(p) for block in blocks for p in block.parameters()}
        before = [p for p in read.model.parameters() if id(p) not in held]
        after = [p for p in new.parameters() if p not in origins]
        origins |= {p: Origin(((q, ONE),)) for q, p in zip(before, after, strict=True)}
        carry_over(inner, read.model, new, origins)
    return new


def _ends(read: Anatomy, runs: Sequence[Stack]) -> list[frozenset[str]]:
    try:
        read.check_removable([runs[0].first])
    except InputError as error:
        raise InputError(f"its depth cannot be changed: {error}") from error
    return branch_ends(read, runs)


def _check_forward(model: nn.Module) -> None:
    """Raises InputError where a copy of a block would call another block's forward."""
    for module in model.modules():
        if {"forward", "run_step"} & vars(module).keys():
            raise InputError(
                f"the forward of a {type(module).__name__} in this {type(model).__name__} was "
                "replaced, as use_adjoint does; call use_backprop(model) first, and use_adjoint "
                "on the new model"
            )


def _stepped(read: Anatomy, times: Sequence[int], step: Fraction) -> nn.Module:
    """The model with block n times[n] times in a row, and its step multiplied."""
    counts, made = iter(times), []
    for stack in read.stacks:
        pairs = zip(stack.blocks, counts, strict=False)
        blocks = tuple(copy.deepcopy(block) for block, count in pairs for _ in range(count))
        h = stack.step * step.numerator / step.denominator
        made.append(replace(stack, blocks=blocks, step=h))
    return read.with_stacks(made)


def _fill(block: nn.Module, sources: Sequence[nn.Module], place: Place) -> Origins:
    """Gives a block the mean of others, and says where its parameters are from."""
    weights = tuple(place.mean.values())
    origins: Origins = {}
    for name, parameter in block.named_parameters():
        means = [source.get_parameter(name) for source in sources]
        scale = "size" if name in place.ends else "gradient"
        origin = Origin(tuple(zip(means, weights, strict=True)), **{scale: place.step})
        parameter.copy_(scaled(mixed(means, weights), origin.size))
        origins[parameter] = origin
    for name, buffer in block.named_buffers():
        if buffer.is_floating_point():
            buffer.copy_(mixed([source.get_buffer(name) for source in sources], weights))
    return origins
