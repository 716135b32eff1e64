"""A model with other lists of blocks, proven to be what it is said to be."""

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from deeplimit._anatomy.anatomy import Anatomy
from deeplimit._anatomy.calling import FAILS, call, told
from deeplimit._anatomy.config_depth import set_depths
from deeplimit._anatomy.evaluation import evaluating
from deeplimit._anatomy.injection import bypassing, gap
from deeplimit._anatomy.lists import relisted
from deeplimit._anatomy.stacks import Block
from deeplimit.errors import InputError


def with_times(
    model: nn.Module, blocks: Sequence[Block], times: Sequence[int], *, shared: bool = False
) -> nn.Module:
    """A copy with block n times[n] times in a row, and what it says of itself brought up to date.

    `shared` leaves its parameters the model's own: to try something.
    """
    other = relisted(model, [(b.container, b.module) for b in blocks], times, shared=shared)
    names = {module: name for name, module in model.named_modules()}
    lists: dict[nn.Module, list[int]] = {}
    for n, block in enumerate(blocks):
        lists.setdefault(block.container, []).append(n)
    before: dict[str, int] = {}
    kept: dict[str, list[int]] = {}
    for container, own in lists.items():
        counts = [times[n] for n in own]
        if len({blocks[n].module for n in own}) == len(own):  # else calls of one, which are counted
            by_block = {blocks[n].module: times[n] for n in own}
            counts = [by_block.get(child, 1) for child in container.children()]
        before[names[container]] = len(counts)
        kept[names[container]] = [i for i, count in enumerate(counts) for _ in range(count)]
    set_depths(other, before, kept)
    return other


def check_kept(
    structure: Anatomy, blocks: Sequence[Block], smaller: nn.Module, removed: Iterable[int]
) -> None:
    """A smaller model is, on the example, the model with the layers removed bypassed.

    Raises:
        InputError: it does not run, or the layers kept do something else.
    """
    model, example = structure.model, structure.example()
    gone = sorted(removed)
    if not gone or any(p.is_meta for p in model.parameters()):
        return
    layers, name = ", ".join(map(str, gone)), type(model).__name__
    with torch.random.fork_rng(devices=[]), torch.no_grad(), evaluating(model), evaluating(smaller):
        torch.manual_seed(0)
        with bypassing(blocks, gone):
            expected = structure.run(example)
        torch.manual_seed(0)
        try:
            own = call(smaller, example)
        except FAILS as error:
            raise InputError(
                f"{name} does not run without layers {layers} ({told(error)})"
            ) from error
    apart = gap(own, expected)
    several = len({b.module for b in blocks}) < len(blocks)
    if apart is not None and several:
        raise InputError(
            f"the layers of {name} are calls of one {type(blocks[0].module).__name__}, and nothing "
            "that it says of itself is their number, so that none can be removed; read it from a "
            "configuration, or from an attribute such as num_layers"
        )
    if apart is not None:
        raise InputError(
            f"without layers {layers} the other layers of {name} do something else: its answers "
            f"differ {apart}. They depend on their place; only layers at the end can be removed"
        )
