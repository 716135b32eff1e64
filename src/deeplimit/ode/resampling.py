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

from deeplimit.errors import InputError
from deeplimit.network import Anatomy, ResidualChain, ResidualClassifier, anatomy
from deeplimit.network.anatomy import check_rebuilt
from deeplimit.ode.blocks import blocks_in, blocks_of, chains_of, check_untied, check_values
from deeplimit.ode.branches import branch_ends
from deeplimit.ode.optimiser_state import carry_over, checked_optimiser
from deeplimit.ode.origins import ONE, Origin, Origins, mixed, scaled
from deeplimit.ode.stages import Stage, stages

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


def changing(model: nn.Module) -> tuple[Stage, ...]:
    """The stages whose depth can change; of a network of our own all, since they have one step.

    Raises:
        InputError: as `stages`, or a chain whose blocks are not alike.
    """
    long = {stage.index: stage for stage in stages(model)}
    chains = chains_of(model)
    if chains is None:
        return tuple(long.values())
    found, first = [], 0
    for m, chain in enumerate(chains):
        if m not in long and chain.horizon > 1:
            raise InputError(
                f"the blocks of stage {m} differ in class or shape; its depth is fixed"
            )
        short = Stage(m, first, tuple(chain), chain.step, chain.scheme, adds=False)
        found.append(long.get(m, short))
        first += chain.horizon
    return tuple(found)


@torch.no_grad()
def resampled(
    model: Model,
    nodes_of: Callable[[Stage], Sequence[Node]],
    step: Fraction,
    optimizer: Optimizer | None,
) -> Model:
    """The model with these nodes in its stages and its step multiplied; `refine` says the rest."""
    check_values(model)
    inner = None if optimizer is None else checked_optimiser(optimizer, model)
    runs = changing(model)
    read = anatomy(model) if chains_of(model) is None else None
    blocks = blocks_of(model) if read is None else blocks_in(read)
    check_untied(model, blocks)
    _check_forward(model)
    ends = [frozenset[str]()] * len(runs) if read is None else _ends(read, runs)
    places = _places(blocks, runs, ends, nodes_of, step)
    counts = Counter(place.node.n for place in places)
    times = [counts[n] for n in range(len(blocks))]
    new = _with_chains(model, times, step) if read is None else read.repeated(times)
    others = blocks_of(new)
    origins: Origins = {}
    for place, block in zip(places, others, strict=True):
        weights = place.weights
        origins |= _fill(block, [blocks[n] for n in weights], tuple(weights.values()), place)
    if read is not None:
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


def _ends(read: Anatomy, runs: Sequence[Stage]) -> list[frozenset[str]]:
    try:
        read.check_removable([runs[0].first])
    except InputError as error:
        raise InputError(f"its depth cannot be changed: {error}") from error
    return branch_ends(read, runs)


def _places(
    blocks: Sequence[nn.Module],
    runs: Sequence[Stage],
    ends: Sequence[frozenset[str]],
    nodes_of: Callable[[Stage], Sequence[Node]],
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


def _with_chains(model: nn.Module, times: Sequence[int], step: Fraction) -> nn.Module:
    """A network of our own, block n times[n] times in a row."""
    blocks = blocks_of(model)
    new = copy.deepcopy(model, dict.fromkeys(map(id, blocks)))
    counts = iter(zip(blocks, times, strict=True))
    chains = chains_of(new) or []
    for chain in chains:
        mine = [next(counts) for _ in chain._modules]
        copies = [copy.deepcopy(block) for block, count in mine for _ in range(count)]
        chain._modules.clear()
        ResidualChain.extend(chain, copies)
        chain.step = chain.step * step.numerator / step.denominator
    if isinstance(new, ResidualClassifier):
        new.architecture = replace(
            new.architecture,
            depths=tuple(chain.horizon for chain in chains),
            step=chains[0].step,
        )
    return new


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
