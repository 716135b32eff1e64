"""Changing a network's depth, or how many controls it has: its curve of controls sampled anew."""

import copy
import math
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import TypeVar

from deeplimit._anatomy import Anatomy, Stack, anatomy, check_rebuilt
from deeplimit._anatomy.chain import chains_in, with_steps
from deeplimit._anatomy.checks import check_count
from deeplimit._anatomy.evaluation import evaluating
from deeplimit.errors import InputError
from deeplimit.memory import OBJECTS, require
from deeplimit.ode.field import stages, with_values
from deeplimit.ode.optimiser_state import ONE, Origin, Origins, carry_over, checked_optimiser, mixed

Model = TypeVar("Model", bound=nn.Module, default=nn.Module)


@dataclass(frozen=True)
class Place:
    """What a block of the new model is made of."""

    mean: Mapping[int, Fraction]  # the old blocks that it is the mean of, with their weights
    step: Fraction = ONE  # the factor on its residual function
    ends: Collection[str] = ()  # the parameters that take this factor; none where the step does


def refine(model: Model | Anatomy, factor: int, *, optimizer: Optimizer | None = None) -> Model:
    """Makes a network of the same class, m times as deep, that computes nearly the same.

    In every stage N layers become mN and the step h becomes h/m. The controls are interpolated
    piecewise linearly through θ_n at s_n = nh,

        θ'_{nm+j} = (1 − j/m) θ_n + (j/m) θ_{n+1},    j = 0 … m−1,

    on the last interval of Euler constantly, θ_{N−1}; Heun's N + 1 nodes become mN + 1. Floating
    buffers, such as the statistics of a batch norm, go the same way; others are those of θ_n. Where
    the step is 1 by definition (a CIFAR ResNet, models of transformers, timm, torchvision) the ends
    of the residual branches are divided by m, `Anatomy.branch_ends`. Layers that belong to no stage
    (`stages`), such as those that change the state's shape, stay as they are.

        >>> finer = refine(chain, 2)
        >>> chain.horizon, finer.horizon, finer.step
        (4, 8, 0.125)

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
    return _resampled(model, Fraction(1, factor), optimizer)


def coarsen(model: Model | Anatomy, factor: int, *, optimizer: Optimizer | None = None) -> Model:
    """Takes every mth control, θ'_n = θ_{nm}, with step hm: N/m layers, the inverse of `refine`.

    `coarsen(refine(model, m), m)` is the model itself, to the last bit where m is a power of 2;
    else what was multiplied, the step or the ends of branches, is so to rounding. The optimiser's
    state of layers that are left out is lost. For controls smooth in depth the output changes by
    the order of the scheme, as in `refine`. Source: [SAP22] arXiv 2205.14612.

        >>> coarser = coarsen(chain, 2)
        >>> coarser.horizon, torch.equal(coarser[1].outer.weight, chain[2].outer.weight)
        (2, True)

    Args:
        model: as for `refine`.
        factor: m, which divides the number of layers of every stage.
        optimizer: as for `refine`.

    Raises:
        InputError: as `refine`, or a stage that m does not divide.
    """
    check_count("factor", factor)
    return _resampled(model, Fraction(factor), optimizer)


@torch.no_grad()
def tie(model: Model | Anatomy, every: int, *, optimizer: Optimizer | None = None) -> Model:
    """Makes a network of the same class in which m consecutive layers share one control.

    In every stage layers 0 … m−1, m … 2m−1, … share the mean of their controls,

        θ'_n = (1/m) Σ_j θ_{m⌊n/m⌋+j},    j = 0 … m−1;

    the last group is smaller where m does not divide their number. Of Heun's N + 1 controls these
    are groups of controls. Parameters are shared, not modules: names in the state_dict, buffers and
    what a layer knows of its place stay. The function stays where the controls of each group are
    equal; where they are smooth in depth it changes by O(1/N²), since what a group's layers deviate
    from their mean adds up to 0. Source: [SAP22] arXiv 2205.14612, Table 2.

        >>> weights = [block.outer.weight for block in tie(chain, 2)]
        >>> weights[0] is weights[1], weights[1] is weights[2]
        (True, False)

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
    module = _averageable(model)
    inner = checked_optimiser(optimizer, module)
    runs, blocks = stages(model), _blocks(model)
    _check_untied(module, blocks)
    numbers = {block: n for n, block in enumerate(blocks)}
    places = {n: Place({n: ONE}) for n in numbers.values()}
    memo: dict[int, Any] = {}
    for run in runs:
        for first in range(0, len(run.blocks), every):
            group = run.blocks[first : first + every]
            mean = {numbers[block]: Fraction(1, len(group)) for block in group}
            places |= dict.fromkeys(mean, Place(mean))
            for name, parameter in group[0].named_parameters():
                shared = copy.deepcopy(parameter)
                memo |= {id(block.get_parameter(name)): shared for block in group}
    new = copy.deepcopy(module, memo)  # which knows every copy then
    made = [memo[id(block)] for block in blocks]
    carry_over(inner, module, new, _filled(module, blocks, new, made, places.values()))
    return new


@torch.no_grad()
def untie(model: Model | Anatomy, *, optimizer: Optimizer | None = None) -> Model:
    """Makes a network of the same class, and the same function, whose layers share no control.

    Every parameter that m layers share becomes a copy of its own in each, θ'_n = θ; [SAP22] arXiv
    2205.14612, Table 2, trains tied, unties, and fine-tunes with the adjoint.

        >>> own = untie(tied := tie(chain, 2))
        >>> own[0].outer.weight is own[1].outer.weight, torch.equal(own(x), tied(x))
        (False, True)

    Args:
        model: left as it is; its anatomy will do.
        optimizer: as for `refine`. A copy's gradient is, to first order, the shared one's divided
            by the number of layers m; moments and learning rates go with it.

    Raises:
        InputError: a model that `anatomy` does not read, without values or quantised; an optimiser
            of another class or of another model; layers that are calls of one module.
    """
    module = _averageable(model)
    inner = checked_optimiser(optimizer, module)
    blocks = _blocks(model)
    new = copy.deepcopy(module)
    for _, chain in chains_in(new):  # each step a module of its own
        seen: set[nn.Module] = set()
        for i, block in enumerate(chain):
            chain[i] = copy.deepcopy(block) if block in seen else block
            seen.add(block)
    made = _blocks(new)
    if len(set(made)) < len(made):
        raise InputError(
            f"the layers of this {type(module).__name__} are calls of one module, which cannot "
            "have a control for each"
        )
    holders = _holders(made)
    for block in made:
        own: dict[nn.Parameter, nn.Parameter] = {}
        for name, shared in list(block.named_parameters(remove_duplicate=False)):
            if holders[shared] > 1:
                path, _, leaf = name.rpartition(".")
                parameter = own.setdefault(shared, copy.deepcopy(shared))
                setattr(block.get_submodule(path), leaf, parameter)
    places = [Place({n: ONE}) for n in range(len(blocks))]
    carry_over(inner, module, new, _filled(module, blocks, new, made, places))
    return new


@torch.no_grad()
def _resampled(model: Model | Anatomy, step: Fraction, optimizer: Optimizer | None) -> Model:
    """The model with the controls θ(k·step) in its stages; `refine` and `coarsen` say the rest."""
    inner = checked_optimiser(optimizer, _averageable(model))
    read = anatomy(model)
    runs, blocks = _changing(read), _blocks(read)
    depths = [run.horizon for run in runs]
    common = math.gcd(*depths)
    if common % step:
        possible = [str(m) for m in range(2, common + 1) if common % m == 0]
        raise InputError(
            f"factor is {step}, the stages have {', '.join(map(str, depths))} layers; "
            + (f"what divides them: {', '.join(possible)}" if possible else "nothing divides them")
        )
    alike = {n for run in runs for n in run.layers} | set(read.fixed)
    if others := [str(n) for n in range(read.horizon) if n not in alike]:
        warnings.warn(
            f"left as they are in {type(read.model).__name__}: layers {', '.join(others)}, whose "
            "blocks differ in class or shape from the others of their stage",
            stacklevel=4,
        )
    _check_untied(read.model, blocks)
    _check_forward(read.model)
    adding = all(run.adds for run in runs)
    ends = _branch_ends(read, runs) if adding else [frozenset[str]()] * len(runs)
    numbers = {block: n for n, block in enumerate(blocks)}
    at = {n: [Place({n: ONE})] for n in numbers.values()}
    for run, names in zip(runs, ends, strict=True):
        count, first = int(run.horizon / step), numbers[run.blocks[0]]
        if step < 1:
            own = sum(p.nbytes for block in run.blocks for p in block.parameters() if p.is_cpu)
            size = int((own + OBJECTS * len(run.blocks)) / step)
            what = f"a stage of {count} layers does not fit into memory"
            require(size, what, "give a smaller factor")
        at |= {numbers[block]: [] for block in run.blocks}
        for k in range(count + run.scheme.nodes - 1):
            n, t = divmod(first + k * step, 1)
            inside = t and n < numbers[run.blocks[-1]]  # behind the last control θ is constant
            at[n].append(Place({n: 1 - t, n + 1: t} if inside else {n: ONE}, step, names))
    if adding:
        new = read.repeated([len(here) for here in at.values()])
    else:
        stacks = []
        for stack in read.stacks:
            copies = tuple(copy.deepcopy(b) for b in stack.blocks for _ in at[numbers[b]])
            h = stack.step * step.numerator / step.denominator
            stacks.append(replace(stack, blocks=copies, step=h))
        new = read.with_stacks(stacks)
    made, places = _blocks(new), [place for here in at.values() for place in here]
    origins = _filled(read.model, blocks, new, made, places)
    for place, block in zip(places, made, strict=True):
        for name, buffer in block.named_buffers():
            if buffer.is_floating_point():
                values = [blocks[n].get_buffer(name) for n in place.mean]
                buffer.copy_(mixed(values, tuple(place.mean.values())))
    if adding:
        check_rebuilt(read, new)
    carry_over(inner, read.model, new, origins)
    return cast(Model, new)


def _filled(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    new: nn.Module,
    made: Sequence[nn.Module],
    places: Iterable[Place],
) -> Origins:
    """Gives the new model's blocks the means of these, and says where all parameters are from."""
    before, after, origins = _holders(blocks), _holders(made), Origins()
    for place, block in zip(places, made, strict=True):
        weights = tuple(place.mean.values())
        for name, parameter in block.named_parameters():
            if parameter not in origins:
                sources = [blocks[n].get_parameter(name) for n in place.mean]
                # The gradient of what m blocks share is the sum of theirs.
                shared = Fraction(after[parameter], before[sources[0]])
                factors = (shared, place.step) if name in place.ends else (shared * place.step, ONE)
                origins[parameter] = Origin(tuple(zip(sources, weights, strict=True)), *factors)
                parameter.copy_(mixed(sources, weights, origins[parameter].size))
    # What stands around the blocks is the same in both, in the same order: names need not be, as
    # those of what follows the blocks in an nn.Sequential.
    around = zip(_around(new, made), _around(model, blocks), strict=True)
    return {p: Origin(((q, ONE),)) for p, q in around} | origins


def _around(model: nn.Module, blocks: Sequence[nn.Module]) -> list[nn.Parameter]:
    """The parameters of a model outside these blocks."""
    inside = {m for block in blocks for m in block.modules()}
    outside = (m for m in model.modules() if m not in inside)
    return list(dict.fromkeys(p for m in outside for p in m.parameters(recurse=False)))


def _holders(blocks: Iterable[nn.Module]) -> Counter[nn.Parameter]:
    """How many of the blocks hold each of their parameters."""
    return Counter(p for block in blocks for p in set(block.parameters()))


def _changing(read: Anatomy) -> tuple[Stack, ...]:
    """The stages whose depth can change; all of those whose step is a number, since it is one."""
    long = {stage.index: stage for stage in stages(read)}
    chains = [stack for stack in read.stacks if stack.blocks and not stack.adds]
    for stack in chains:
        if stack.index not in long and stack.horizon > 1:
            raise InputError(
                f"the blocks of stage {stack.index} differ in class or shape; its depth is fixed"
            )
    return tuple((long | {stack.index: stack for stack in chains}).values())


def _branch_ends(read: Anatomy, runs: Sequence[Stack]) -> list[frozenset[str]]:
    """The names, in a block of each stage, of the parameters in which its branches end.

    On a copy of the model they are set to 0: every block must then return its input, on the states
    of an example (after a ReLU these are ≥ 0, as in any run of the model).
    """
    try:
        read.check_removable([runs[0].first])
    except InputError as error:
        raise InputError(f"its depth cannot be changed: {error}") from error
    every = []
    for run in runs:
        ends = set(read.branch_ends(run.blocks[0]))
        every.append(frozenset(n for n, p in run.blocks[0].named_parameters() if p in ends))
    other = read.like(copy.deepcopy(read.model))
    names_of = {n: names for run, names in zip(runs, every, strict=True) for n in run.layers}
    layers, left = other.layers, dict[int, Tensor]()
    for n, names in names_of.items():
        other.register_leaving_hook(n, partial(left.__setitem__, n))
        for name in names:
            layers[n].controls[0].get_parameter(name).zero_()
    with evaluating(other.model), other.recording() as states:
        other.run(other.fitting_example())
    for n, y in left.items():
        x, block, change = states[n], layers[n].controls[0], math.inf
        if x.shape == y.shape:
            change = float((y - x).abs().max() / x.abs().max().clamp(min=1e-30))
        if not change <= 10 * torch.finfo(next(block.parameters()).dtype).eps:
            raise InputError(
                f"where the residual branches of {type(block).__name__} end is not known: with "
                f"{', '.join(sorted(names_of[n]))} at 0 it still changes its input by {change:.2g} "
                "of it, as a block with a norm behind the addition does, or one whose last norm "
                "multiplies by 1 + weight; so its step cannot be changed, nor the depth; tie and "
                "untie work"
            )
    return every


def _blocks(model: nn.Module | Anatomy) -> list[nn.Module]:
    """All residual blocks in order; of a chain by Heun's method one more than its steps."""
    return [block for stack in anatomy(model).stacks for block in stack.blocks]


def _averageable(model: Model | Anatomy) -> Model:
    """The model, or the one that an anatomy reads; its parameters can be averaged."""
    module = cast(Model, with_values(model))
    floating = all(p.is_floating_point() for p in module.parameters())
    if getattr(module, "is_quantized", False) or not floating:
        raise InputError(
            f"{type(module).__name__} is quantised; change the model it was made from, then "
            "quantise the result"
        )
    return module


def _check_untied(model: nn.Module, blocks: Sequence[nn.Module]) -> None:
    if any(count > 1 for count in _holders(blocks).values()):
        raise InputError(
            f"layers of this {type(model).__name__} share parameters; give untie(model)"
        )


def _check_forward(model: nn.Module) -> None:
    """Raises InputError where a copy of a block would call another block's forward."""
    for module in with_steps(model):
        if "forward" in vars(module):
            raise InputError(
                f"the forward of a {type(module).__name__} in this {type(model).__name__} was "
                "replaced, as use_adjoint does; call use_backprop(model) first, and use_adjoint "
                "on the new model"
            )
