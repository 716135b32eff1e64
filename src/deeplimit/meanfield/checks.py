"""Networks and batches looked at before anything is computed with them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from deeplimit._anatomy import Stack, chain_stacks
from deeplimit._anatomy.checks import shown
from deeplimit.errors import InputError
from deeplimit.network import Anatomy, anatomy


def particle_stacks(model: nn.Module) -> tuple[Stack, ...]:
    """The stages that divide a network's depth evenly; of blocks that add their input one for all.

    Raises:
        InputError: a model that `anatomy` cannot read, or whose layers share controls.
    """
    chains = chain_stacks(model)
    for stack in chains:
        if stack.scheme.nodes != 1:
            raise InputError(
                f"a step of {type(stack.scheme).__name__} uses two neighbouring controls, so that "
                "a layer is not a mean of particles; expected Euler()"
            )
    if chains:
        return tuple(stack for stack in chains if stack.blocks)
    return (Stack(0, 0, tuple(b for stack in anatomy(model).stacks for b in stack.blocks)),)


def check_batch(read: Anatomy, x: object, shape: Sequence[int]) -> None:
    """Raises InputError unless x is a batch of samples of this shape, in the model's precision.

    A stem standardises what is of lower precision to the model's own.
    """
    if not isinstance(x, Tensor):
        raise InputError(f"{shown(x)} given as the samples; expected a tensor, one row per sample")
    dtype = next(p.dtype for p in read.model.parameters())
    stem, _ = read.stem_and_head or (None, None)
    taken = x.dtype if isinstance(stem, nn.Identity) else torch.promote_types(x.dtype, dtype)
    if taken != dtype:
        raise InputError(
            f"samples of {x.dtype} given to a network of {dtype}; expected one precision: give "
            f"x.to({dtype})"
        )
    if x.shape[x.dim() - len(shape) :] != tuple(shape):
        size = ", ".join(map(str, shape))
        raise InputError(
            f"samples of shape {list(x.shape)} given; the network takes [samples, {size}]"
        )
