"""The stages of a model that are dynamical systems, and what their blocks must be to change."""

import copy
from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from deeplimit._anatomy import Anatomy, Stack, anatomy, model_of
from deeplimit._anatomy.evaluation import evaluating
from deeplimit.errors import InputError
from deeplimit.network.blocks import check_values


def stages(model: nn.Module | Anatomy) -> tuple[Stack, ...]:
    """The stages of a model that have at least two layers whose blocks are alike.

    A chain is one stage; of blocks that add their input it is the longest run, in each stage, of
    one class and of parameters of the same names and shapes.
    """
    read = anatomy(model)
    fixed = set(read.fixed)
    found = [run for stack in read.stacks if (run := stack.alike(fixed)) is not None]
    long = tuple(run for run in found if run.horizon > 1)
    if not long:
        there = "alike layers in its stages: " + ", ".join(str(run.horizon) for run in found)
        there = there if found else "it has no layers, or those of a stage differ"
        raise InputError(
            f"{type(read.model).__name__} has no stage of two layers or more whose blocks have the "
            f"same class and the same shapes of parameters ({there}): its controls are no "
            "points of one curve in depth; give a network with two alike layers in a stage"
        )
    return long


def longest_stage(model: nn.Module | Anatomy) -> Stack:
    """The stage with the most layers, the first of these."""
    return max(stages(model), key=lambda stage: stage.horizon)


def blocks_of(model: nn.Module | Anatomy) -> list[nn.Module]:
    """All residual blocks in order; of a chain by Heun's method one more than its steps."""
    return [block for stack in anatomy(model).stacks for block in stack.blocks]


def with_values(model: nn.Module | Anatomy) -> nn.Module:
    """The model, or the one that an anatomy reads; its parameters have values."""
    module = model_of(model)
    check_values(module.named_parameters())
    return module


def averageable(model: nn.Module | Anatomy) -> nn.Module:
    """The model, or the one that an anatomy reads; its parameters can be averaged."""
    module = with_values(model)
    floating = all(p.is_floating_point() for p in module.parameters())
    if getattr(module, "is_quantized", False) or not floating:
        raise InputError(
            f"{type(module).__name__} is quantised; change the model it was made from, then "
            "quantise the result"
        )
    return module


def check_untied(model: nn.Module, blocks: Iterable[nn.Module]) -> None:
    """Raises InputError where blocks share a parameter."""
    seen: set[nn.Parameter] = set()
    for block in blocks:
        own = set(block.parameters())
        if own & seen:
            raise InputError(
                f"layers of this {type(model).__name__} share parameters; give untie(model)"
            )
        seen |= own


def branch_ends(read: Anatomy, runs: Sequence[Stack]) -> list[frozenset[str]]:
    """The names, in a block of each stage, of the parameters in which its branches end.

    On a copy of the model they are set to 0: every block must then return its input, on the states
    of an example (after a ReLU these are ≥ 0, as in any run of the model).
    """
    every = []
    for run in runs:
        ends = set(read.branch_ends(run.blocks[0]))
        named = run.blocks[0].named_parameters()
        every.append(frozenset(name for name, p in named if p in ends))
    structure = read.like(copy.deepcopy(read.model))
    example = structure.fitting_example()
    if example is None:
        raise InputError(
            f"{type(read).__name__} has no example of its model's input, on which the ends of the "
            "residual branches are checked; override example"
        )
    names_of = {n: names for run, names in zip(runs, every, strict=True) for n in run.layers}
    blocks = {n: structure.layers[n].controls[0] for n in names_of}
    left: dict[int, Tensor] = {}
    for n in names_of:
        structure.register_leaving_hook(n, partial(left.__setitem__, n))
    with evaluating(structure.model), torch.no_grad(), structure.recording() as states:
        for n, names in names_of.items():
            for name in names:
                blocks[n].get_parameter(name).zero_()
        structure.run(example)
    for n, names in names_of.items():
        change = _change(states[n], left[n])
        if not change <= 10 * torch.finfo(next(blocks[n].parameters()).dtype).eps:
            raise InputError(
                f"where the residual branches of {type(blocks[n]).__name__} end is not known: with "
                f"{', '.join(sorted(names))} at 0 it still changes its input by {change:.2g} of "
                "it, as a block with a norm behind the addition does, or one whose last norm "
                "multiplies by 1 + weight; so its step cannot be changed, nor the depth; tie and "
                "untie work"
            )
    return every


def _change(x: Tensor, y: Tensor) -> float:
    """Max |y − x| / max |x|."""
    if x.shape != y.shape:
        return float("inf")
    return float((y - x).abs().max() / x.abs().max().clamp(min=1e-30))
