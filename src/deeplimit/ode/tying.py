"""One control for groups of layers, and back: each layer its own."""

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from deeplimit._anatomy.chain import chains_in
from deeplimit.errors import InputError
from deeplimit.network import ResidualChain
from deeplimit.ode.blocks import blocks_of, check_untied, check_values, check_whole
from deeplimit.ode.optimiser_state import carry_over, checked_optimiser
from deeplimit.ode.origins import ONE, Origin, Origins, mixed
from deeplimit.ode.resampling import outside
from deeplimit.ode.stages import stages

Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def tie(model: Model, every: int, *, optimizer: Optimizer | None = None) -> Model:
    """A network of the same class in which groups of m consecutive layers share one control.

    In every stage layers 0 … m−1, m … 2m−1, … share the mean of their controls; the last group is
    smaller where m does not divide their number. Of Heun's N + 1 controls these are groups of
    controls. Parameters are shared, not modules: names in the state_dict, buffers and what a layer
    knows of its place stay. The function stays where the controls of each group are equal; where
    they are smooth in depth it changes by O(1/N²), since what a group's layers deviate from their
    mean adds up to 0. Source: [SAP22] arXiv 2205.14612, Table 2.

    `deeplimit.network.save`, and a run folder, store every layer's copy: what is loaded again
    computes the same and is tied no more. `save_pretrained` of transformers refuses shared
    parameters; save `untie(model)`. A model switched by `use_adjoint` stays switched.

    Args:
        model: left as it is.
        every: m ≥ 1; 1 ties nothing.
        optimizer: as for `refine`. The gradient of a shared control is the sum of the group's, so
            moments are added up; learning rates are such that the step is the mean of the group's.

    Raises:
        InputError: as `refine`, but that any residual network with an anatomy will do.
    """
    check_whole("every", every)
    check_values(model)
    inner = None if optimizer is None else checked_optimiser(optimizer, model)
    runs = stages(model)
    blocks = blocks_of(model)
    check_untied(model, blocks)
    new = copy.deepcopy(model)
    others = blocks_of(new)
    numbers = {id(block): n for n, block in enumerate(blocks)}
    origins: Origins = {}
    for group in _groups([[numbers[id(b)] for b in stage.blocks] for stage in runs], every, blocks):
        origins |= _share([blocks[n] for n in group], [others[n] for n in group])
    if inner is not None:
        carry_over(inner, model, new, outside(model, new, [*blocks, *others]) | origins)
    return new


@torch.no_grad()
def untie(model: Model, *, optimizer: Optimizer | None = None) -> Model:
    """A network of the same class, and the same function, in which no layers share a control.

    Every parameter that several layers share becomes a copy of its own in each; [SAP22] arXiv
    2205.14612, Table 2, trains tied, unties, and fine-tunes with the adjoint.

    Args:
        model: left as it is.
        optimizer: as for `refine`. A copy's gradient is, to first order, the shared one's divided
            by the number of layers m; moments and learning rates go with it.

    Raises:
        InputError: a model that `anatomy` does not read, without values or quantised; an optimiser
            of another class or of another model; layers that are calls of one module.
    """
    check_values(model)
    inner = None if optimizer is None else checked_optimiser(optimizer, model)
    blocks = blocks_of(model)
    new = copy.deepcopy(model)
    for _, chain in chains_in(new):
        _separate(chain)
    others = blocks_of(new)
    if len(set(others)) < len(others):
        raise InputError(
            f"the layers of this {type(model).__name__} are calls of one module, which cannot have "
            "a control for each"
        )
    holders = Counter(p for block in blocks for p in set(block.parameters()))
    origins: Origins = {}
    for block, other in zip(blocks, others, strict=True):
        own: dict[nn.Parameter, nn.Parameter] = {}
        for name, source in block.named_parameters(remove_duplicate=False):
            if holders[source] > 1:
                if source not in own:
                    own[source] = copy.deepcopy(source)
                _put(other, name, own[source])
            part = Fraction(1, holders[source])
            origins[other.get_parameter(name)] = Origin(((source, ONE),), gradient=part)
    if inner is not None:
        carry_over(inner, model, new, outside(model, new, [*blocks, *others]) | origins)
    return new


def _groups(
    runs: Sequence[Sequence[int]], every: int, blocks: Sequence[nn.Module]
) -> Iterator[Sequence[int]]:
    """The numbers of blocks that are to share; a block of no stage by itself."""
    rest = set(range(len(blocks)))
    for run in runs:
        rest -= set(run)
        yield from (run[start : start + every] for start in range(0, len(run), every))
    yield from ([n] for n in rest)


def _share(blocks: Sequence[nn.Module], others: Sequence[nn.Module]) -> Origins:
    """Gives the others one control, the blocks' mean, and says where its parameters are from.

    The gradient of what m layers share is the sum of theirs, m times their mean.
    """
    origins: Origins = {}
    every = [dict(block.named_parameters()) for block in blocks]
    weights = tuple(Fraction(1, len(blocks)) for _ in blocks)
    for name, parameter in others[0].named_parameters():
        sources = [found[name] for found in every]
        parameter.copy_(mixed(sources, weights))
        pairs = tuple(zip(sources, weights, strict=True))
        origins[parameter] = Origin(pairs, gradient=Fraction(len(blocks)))
    for name, parameter in others[0].named_parameters(remove_duplicate=False):
        for other in others[1:]:
            _put(other, name, parameter)
    return origins


def _put(block: nn.Module, name: str, parameter: nn.Parameter) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(block.get_submodule(path), leaf, parameter)


def _separate(chain: ResidualChain) -> None:
    """Gives every step of a chain a module of its own."""
    seen: set[nn.Module] = set()
    for i, block in enumerate(chain):
        chain[i] = copy.deepcopy(block) if block in seen else block
        seen.add(block)
