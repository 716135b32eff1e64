"""One control for groups of layers, and back: each layer its own."""

import copy
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from typing import TypeVar, overload

import torch
from torch import nn
from torch.optim import Optimizer

from deeplimit._anatomy import Anatomy
from deeplimit._anatomy.chain import ResidualChain, chains_in
from deeplimit._anatomy.checks import check_count
from deeplimit.errors import InputError
from deeplimit.ode.optimiser_state import ONE, Origin, Origins, carry_over, checked_optimiser, mixed
from deeplimit.ode.stages import averageable, blocks_of, check_untied, stages

Model = TypeVar("Model", bound=nn.Module)


@overload
def tie(model: Anatomy, every: int, *, optimizer: Optimizer | None = None) -> nn.Module: ...
@overload
def tie(model: Model, every: int, *, optimizer: Optimizer | None = None) -> Model: ...
@torch.no_grad()
def tie(model: nn.Module | Anatomy, every: int, *, optimizer: Optimizer | None = None) -> nn.Module:
    """Makes a network of the same class in which m consecutive layers share one control.

    In every stage layers 0 … m−1, m … 2m−1, … share the mean of their controls; the last group is
    smaller where m does not divide their number. Of Heun's N + 1 controls these are groups of
    controls. Parameters are shared, not modules: names in the state_dict, buffers and what a layer
    knows of its place stay. The function stays where the controls of each group are equal; where
    they are smooth in depth it changes by O(1/N²), since what a group's layers deviate from their
    mean adds up to 0. Source: [SAP22] arXiv 2205.14612, Table 2.

        smaller = tie(model, 2, optimizer=optimizer)

    `deeplimit.network.save`, and a run folder, store every layer's copy: what is loaded again
    computes the same and is tied no more. `save_pretrained` of transformers refuses shared
    parameters; save `untie(model)`. A model switched by `use_adjoint` stays switched.

    Args:
        model: left as it is; its anatomy will do.
        every: m ≥ 1; 1 ties nothing.
        optimizer: as for `refine`. The gradient of a shared control is the sum of the group's, so
            moments are added up; learning rates are such that the step is the mean of the group's.

    Raises:
        InputError: as `refine`, but that any residual network with an anatomy will do.
    """
    check_count("every", every)
    module = averageable(model)
    inner = checked_optimiser(optimizer, module)
    runs, blocks = stages(model), blocks_of(model)
    check_untied(module, blocks)
    new = copy.deepcopy(module)
    others = blocks_of(new)
    numbers = {id(block): n for n, block in enumerate(blocks)}
    found = [[numbers[id(block)] for block in run.blocks] for run in runs]
    groups = [run[n : n + every] for run in found for n in range(0, len(run), every)]
    groups += [[n] for n in set(range(len(blocks))).difference(*found)]  # of no stage
    origins: Origins = {}
    for group in groups:
        origins |= _share([blocks[n] for n in group], [others[n] for n in group])
    if inner is not None:
        carry_over(inner, module, new, origins)
    return new


@overload
def untie(model: Anatomy, *, optimizer: Optimizer | None = None) -> nn.Module: ...
@overload
def untie(model: Model, *, optimizer: Optimizer | None = None) -> Model: ...
@torch.no_grad()
def untie(model: nn.Module | Anatomy, *, optimizer: Optimizer | None = None) -> nn.Module:
    """Makes a network of the same class, and the same function, whose layers share no control.

    Every parameter that several layers share becomes a copy of its own in each; [SAP22] arXiv
    2205.14612, Table 2, trains tied, unties, and fine-tunes with the adjoint.

        own = untie(tied, optimizer=optimizer)

    Args:
        model: left as it is; its anatomy will do.
        optimizer: as for `refine`. A copy's gradient is, to first order, the shared one's divided
            by the number of layers m; moments and learning rates go with it.

    Raises:
        InputError: a model that `anatomy` does not read, without values or quantised; an optimiser
            of another class or of another model; layers that are calls of one module.
    """
    module = averageable(model)
    inner = checked_optimiser(optimizer, module)
    blocks = blocks_of(model)
    new = copy.deepcopy(module)
    for _, chain in chains_in(new):
        _separate(chain)
    others = blocks_of(new)
    if len(set(others)) < len(others):
        raise InputError(
            f"the layers of this {type(module).__name__} are calls of one module, which cannot "
            "have a control for each"
        )
    holders = Counter(p for block in blocks for p in set(block.parameters()))
    origins: Origins = {}
    for block, other in zip(blocks, others, strict=True):
        own: dict[nn.Parameter, nn.Parameter] = {}
        for name, source in block.named_parameters(remove_duplicate=False):
            if holders[source] > 1:
                _put(other, name, own.setdefault(source, copy.deepcopy(source)))
            part = Fraction(1, holders[source])
            origins[other.get_parameter(name)] = Origin(((source, ONE),), gradient=part)
    if inner is not None:
        carry_over(inner, module, new, origins)
    return new


def _share(blocks: Sequence[nn.Module], others: Sequence[nn.Module]) -> Origins:
    """Gives the others one control, the blocks' mean, and says where its parameters are from.

    The gradient of what m layers share is the sum of theirs, m times their mean.
    """
    origins: Origins = {}
    weights = (Fraction(1, len(blocks)),) * len(blocks)
    for name, parameter in others[0].named_parameters():
        sources = [block.get_parameter(name) for block in blocks]
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
