"""A copy of a model with blocks left out or repeated: shorter or longer lists, names counted on."""

import copy
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

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

    Args:
        model: left as it is.
        places: (list, block) of each.
        times: how often each is to stand there.
        shared: parameters and buffers are not copied.
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
