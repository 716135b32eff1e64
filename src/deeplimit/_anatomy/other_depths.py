"""A model with other lists of blocks, proven to be what it is said to be."""

import copy
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from deeplimit._anatomy.anatomy import Anatomy
from deeplimit._anatomy.config_depth import set_depths
from deeplimit._anatomy.evaluation import evaluating
from deeplimit._anatomy.injection import bypassing, gap
from deeplimit._anatomy.inputs import FAILS, call, told
from deeplimit._anatomy.stacks import Block
from deeplimit.errors import InputError

INDEX = ("layer_idx", "layer_id")  # what a block calls its place, where it knows it


def relisted(
    model: nn.Module,
    places: Sequence[tuple[nn.Module, nn.Module]],
    times: Sequence[int],
    *,
    shared: bool = False,
) -> nn.Module:
    """An independent copy with block i times[i] ≥ 0 times in a row.

    The blocks left out are not copied; one repeated shares nothing but what it shared before. What
    else stands in a list stays where it is.
    """
    once = Counter(block for _, block in places)  # one called again and again stays as it is
    count = {b: n for (_, b), n in zip(places, times, strict=True) if once[b] == 1}
    memo: dict[int, Any] = {id(block): None for block, n in count.items() if not n}
    if shared:
        memo |= {id(t): t for t in (*model.parameters(), *model.buffers())}
    other = copy.deepcopy(model, memo)
    names = {id(module): name for name, module in model.named_modules()}
    for container in dict.fromkeys(one for one, block in places if block in count):
        mine = other.get_submodule(names[id(container)])
        wanted = {name: count.get(child, 1) for name, child in container.named_children()}
        if any(n != 1 for n in wanted.values()):
            _repeat(mine, wanted, other)
        _number(mine)
    return other


def _repeat(container: nn.Module, times: Mapping[str, int], model: nn.Module) -> None:
    """The numbers that names end in count on from the first one's.

    Names without a number stay; what is repeated then has one appended.
    """
    first = re.search(r"\d+$", next(iter(container._modules), ""))
    start = int(first[0]) if first else 0
    there = []
    for name, block in container._modules.items():
        if block is not None:
            copies = [_copied(block, model) for _ in range(times[name] - 1)]
            there += [(name, i, one) for i, one in enumerate((block, *copies))]
    container._modules.clear()
    for number, (name, i, block) in enumerate(there, start):
        named = re.sub(r"\d+$", str(number), name)
        again = named == name and named in container._modules
        container._modules[f"{name}_{i}" if again else named] = block


def _number(container: nn.Module) -> None:
    """Blocks that know which they are, for a cache of keys and values, are told."""
    for i, block in enumerate(container.children()):
        for module in block.modules():
            for name in INDEX:
                if isinstance(vars(module).get(name), int):
                    setattr(module, name, i)


def _copied(block: nn.Module, model: nn.Module) -> nn.Module:
    """A copy of a block in its model: the configuration, say, stays one for all."""
    inside = set(block.modules())
    shared = [*vars(model).values(), *(m for m in model.modules() if m not in inside)]
    return copy.deepcopy(block, {id(value): value for value in shared})


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
    """A smaller model is, on the example, the model with the layers removed bypassed."""
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
