"""Where the residual branches of a model's blocks end, checked before anything is built on it."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from deeplimit._anatomy import Stack
from deeplimit._anatomy.evaluation import evaluating
from deeplimit._anatomy.stand_ins import state_among, state_of
from deeplimit.errors import InputError
from deeplimit.network import Anatomy


def branch_ends(read: Anatomy, runs: Sequence[Stack]) -> list[frozenset[str]]:
    """The names, in a block of each stage, of the parameters in which its branches end.

    On a copy of the model they are set to 0: every block must then return its input, on the states
    of an example (after a ReLU these are ≥ 0, as in any run of the model).

    Raises:
        InputError: the anatomy does not say them, there is no example, or a block still does
            something.
    """
    every = [_names(read, stage) for stage in runs]
    clone = copy.deepcopy(read.model)
    structure = read.like(clone)
    example = structure.fitting_example()
    if example is None:
        raise InputError(
            f"{type(read).__name__} has no example of its model's input, on which the ends of the "
            "residual branches are checked; override example"
        )
    layers = structure.layers
    blocks = [layers[n].controls[0] for stage in runs for n in stage.layers]
    with evaluating(clone), torch.no_grad(), _changes(blocks) as changes:
        for stage, names in zip(runs, every, strict=True):
            for n in stage.layers:
                for name in names:
                    layers[n].controls[0].get_parameter(name).zero_()
        structure.run(example)
    named = [names for stage, names in zip(runs, every, strict=True) for _ in stage.layers]
    for block, names, change in zip(blocks, named, changes, strict=True):
        if not change <= 10 * torch.finfo(next(block.parameters()).dtype).eps:
            raise InputError(
                f"where the residual branches of {type(block).__name__} end is not known: with "
                f"{', '.join(sorted(names))} at 0 it still changes its input by {change:.2g} of "
                "it, as a block with a norm behind the addition does, or one whose last norm "
                "multiplies by 1 + weight; so its step cannot be changed, nor the depth; tie and "
                "untie work"
            )
    return every


def _names(read: Anatomy, stage: Stack) -> frozenset[str]:
    first = stage.blocks[0]
    ends = set(read.branch_ends(first))
    return frozenset(name for name, p in first.named_parameters() if p in ends)


@contextmanager
def _changes(blocks: Sequence[nn.Module]) -> Iterator[list[float]]:
    """Collects max |block(x) − x| / max |x| while the model runs."""
    found: list[float] = []

    def compare(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        x, y = cast(Tensor, state_among(args, kwargs)), cast(Tensor, state_of(output))
        if x.shape != y.shape:
            found.append(float("inf"))
            return
        found.append(float((y - x).abs().max() / x.abs().max().clamp(min=1e-30)))

    handles = [block.register_forward_hook(compare, with_kwargs=True) for block in blocks]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
