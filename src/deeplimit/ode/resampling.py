"""A model with other nodes on its curves of controls, and where each of its parameters is from."""

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TypeVar, cast

import torch
from torch import nn
from torch.optim import Optimizer

from deeplimit._anatomy import Stack, check_rebuilt
from deeplimit.errors import InputError
from deeplimit.network import Anatomy, anatomy
from deeplimit.ode.blocks import blocks_of, check_untied, check_values
from deeplimit.ode.branches import branch_ends
from deeplimit.ode.optimiser_state import carry_over, checked_optimiser
from deeplimit.ode.origins import ONE, Origin, Origins, mixed, scaled
from deeplimit.ode.stages import stages

Model = TypeVar("Model", bound=nn.Module)
ZERO = Fraction(0)


@dataclass(frozen=True)
class Node:
    """The control (1 − t) θ_n + t θ_{n+1}, 0 ≤ t < 1; n counts the blocks of a stage."""

    n: int
    t: Fraction = ZERO


@dataclass(frozen=True)
class Place:
    """What stands at a place of the new model: a node among all old blocks.

    Attributes:
        node: n counts all blocks of the old model.
        step: by what the step of this layer is multiplied.
        ends: the parameters that are multiplied with it; empty where the step is a number.
    """

    node: Node
    step: Fraction = ONE
    ends: frozenset[str] = frozenset()

    @property
    def weights(self) -> dict[int, Fraction]:
        """The blocks it is a mean of, with their weights."""
        node = self.node
        return {node.n: 1 - node.t, node.n + 1: node.t} if node.t else {node.n: ONE}


def changing(read: Anatomy) -> tuple[Stack, ...]:
    """The stages whose depth can change; all of those whose step is a number, since it is one.

    Raises:
        InputError: as `stages`, or a chain whose blocks are not alike.
    """
    long = {stage.index: stage for stage in stages(read)}
    chains = [stack for stack in read.stacks if not stack.adds]
    for stack in chains:
        if stack.index not in long and stack.horizon > 1:
            raise InputError(
                f"the blocks of stage {stack.index} differ in class or shape; its depth is fixed"
            )
    return tuple((long | {stack.index: stack for stack in chains}).values())


@torch.no_grad()
def resampled(
    model: Model,
    nodes_of: Callable[[Stack], Sequence[Node]],
    step: Fraction,
    optimizer: Optimizer | None,
) -> Model:
    """The model with these nodes in its stages and its step multiplied; `refine` says the rest."""
    check_values(model)
    inner = None if optimizer is None else checked_optimiser(optimizer, model)
    read = anatomy(model)
    runs = changing(read)
    blocks = blocks_of(read)
    check_untied(model, blocks)
    _check_forward(model)
    adding = all(run.adds for run in runs)
    ends = _ends(read, runs) if adding else [frozenset[str]()] * len(runs)
    places = _places(blocks, runs, ends, nodes_of, step)
    counts = Counter(place.node.n for place in places)
    times = [counts[n] for n in range(len(blocks))]
    new = read.repeated(times) if adding else _stepped(read, times, step)
    others = blocks_of(new)
    origins: Origins = {}
    for place, block in zip(places, others, strict=True):
        weights = place.weights
        origins |= _fill(block, [blocks[n] for n in weights], tuple(weights.values()), place)
    if adding:
        check_rebuilt(read, new)
    if inner is not None:
        carry_over(inner, model, new, outside(model, new, [*blocks, *others]) | origins)
    return cast(Model, new)


def outside(old: nn.Module, new: nn.Module, blocks: Iterable[nn.Module]) -> Origins:
    """The origins of the parameters of the new model that are in none of both models' blocks."""
    inside = {p for block in blocks for p in block.parameters()}
    before = {name: p for name, p in old.named_parameters() if p not in inside}
    after = {name: p for name, p in new.named_parameters() if p not in inside}
    return {p: Origin(((before[name], ONE),)) for name, p in after.items()}


def _ends(read: Anatomy, runs: Sequence[Stack]) -> list[frozenset[str]]:
    try:
        read.check_removable([runs[0].first])
    except InputError as error:
        raise InputError(f"its depth cannot be changed: {error}") from error
    return branch_ends(read, runs)


def _places(
    blocks: Sequence[nn.Module],
    runs: Sequence[Stack],
    ends: Sequence[frozenset[str]],
    nodes_of: Callable[[Stack], Sequence[Node]],
    step: Fraction,
) -> list[Place]:
    """All places of the new model; blocks that belong to no stage keep theirs."""
    numbers = {id(block): n for n, block in enumerate(blocks)}
    starts = {numbers[id(run.blocks[0])]: i for i, run in enumerate(runs) if run.blocks}
    places, n = [], 0
    while n < len(blocks):
        if n not in starts:
            places.append(Place(Node(n)))
            n += 1
            continue
        run, names = runs[starts[n]], ends[starts[n]]
        places += [Place(Node(n + node.n, node.t), step, names) for node in nodes_of(run)]
        n += len(run.blocks)
    return places


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


def _fill(
    block: nn.Module, sources: Sequence[nn.Module], weights: tuple[Fraction, ...], place: Place
) -> Origins:
    """Gives a block the mean of others, and says where its parameters are from."""
    origins: Origins = {}
    every = [dict(source.named_parameters()) for source in sources]
    for name, parameter in block.named_parameters():
        means = [found[name] for found in every]
        pairs = tuple(zip(means, weights, strict=True))
        scale = "size" if name in place.ends else "gradient"
        origin = Origin(pairs, **{scale: place.step})
        parameter.copy_(scaled(mixed(means, weights), origin.size))
        origins[parameter] = origin
    buffers = [dict(source.named_buffers()) for source in sources]
    for name, buffer in block.named_buffers():
        if buffer.is_floating_point():
            buffer.copy_(mixed([found[name] for found in buffers], weights))
    return origins
