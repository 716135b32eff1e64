"""The parameters of alike blocks by their name in a block: θ_0, θ_1, … number by number."""

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from deeplimit.errors import InputError


def parameter_groups(blocks: Sequence[nn.Module]) -> dict[str, tuple[nn.Parameter, ...]]:
    """For each parameter's name within a block that parameter of every block, in order.

    Raises:
        InputError: the blocks' parameters have other names or shapes, are on the meta device, or
            are not finite.
    """
    every = [dict(block.named_parameters()) for block in blocks]
    for n, own in enumerate(every):
        for (name, p), (other, q) in zip(own.items(), every[0].items(), strict=False):
            if name != other or p.shape != q.shape:
                raise InputError(
                    f"block 0 has the parameter {other} {list(q.shape)} where block {n} has {name} "
                    f"{list(p.shape)}; expected blocks whose parameters have the same names and "
                    "shapes"
                )
        if len(own) != len(every[0]):
            raise InputError(
                f"block 0 has {len(every[0])} parameters, block {n} has {len(own)}; expected "
                "blocks whose parameters have the same names and shapes"
            )
        check_values((f"{n}.{name}", p) for name, p in own.items())
    return {name: tuple(own[name] for own in every) for name in (every[0] if every else ())}


def check_values(named: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Whether parameters have values.

    Raises:
        InputError: one is on the meta device or has a number that is not finite.
    """
    for name, parameter in named:
        if parameter.is_meta:
            raise InputError(
                f"the parameter {name} is on the meta device and has no values; load the model's "
                "weights, or build it on the CPU"
            )
        if not bool(torch.isfinite(parameter).all()):
            raise InputError(
                f"the parameter {name} has numbers that are not finite; take weights from before "
                "the training diverged"
            )
