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


def with_times(
    model: nn.Module, blocks: Sequence[Block], times: Sequence[int], *, shared: bool = False
) -> nn.Module:
    """A copy with block n times[n] ≥ 0 times in a row, and what it says of itself up to date.

    Blocks left out are not copied; one repeated shares nothing but what it shared before. What else
    stands in a list stays where it is. With `shared` parameters are the model's own, for a trial.
    """
    once = Counter(block.module for block in blocks)  # one called again and again stays as it is
    count = {b.module: n for b, n in zip(blocks, times, strict=True) if once[b.module] == 1}
    memo: dict[int, Any] = {id(block): None for block, n in count.items() if not n}
    if shared:
        memo |= {id(t): t for t in (*model.parameters(), *model.buffers())}
    other = copy.deepcopy(model, memo)
    names = {module: name for name, module in model.named_modules()}
    lists: dict[nn.Module, list[int]] = {}
    for n, block in enumerate(blocks):
        lists.setdefault(block.container, []).append(n)
    before: dict[str, int] = {}
    kept: dict[str, list[int]] = {}
    for container, own in lists.items():
        name, counts = names[container], [times[n] for n in own]  # calls of one, which are counted
        if all(blocks[n].module in count for n in own):
            wanted = {name: count.get(child, 1) for name, child in container.named_children()}
            counts, mine = list(wanted.values()), other.get_submodule(name)
            if any(n != 1 for n in counts):
                _repeat(mine, wanted, other)
            for i, child in enumerate(mine.children()):  # some know their place, for a cache
                for module in child.modules():
                    for key in INDEX:
                        if isinstance(vars(module).get(key), int):
                            setattr(module, key, i)
        before[name] = len(counts)
        kept[name] = [i for i, n in enumerate(counts) for _ in range(n)]
    set_depths(other, before, kept)
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


def _copied(block: nn.Module, model: nn.Module) -> nn.Module:
    """A copy of a block in its model: the configuration, say, stays one for all."""
    inside = set(block.modules())
    shared = [*vars(model).values(), *(m for m in model.modules() if m not in inside)]
    return copy.deepcopy(block, {id(value): value for value in shared})


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
