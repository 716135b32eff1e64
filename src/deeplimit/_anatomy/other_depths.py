"""A model of another depth: other lists of blocks, proven to be what it is said to be.

It must be the model with blocks bypassed, and what the class builds from its configuration.
"""

import copy
import inspect
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deeplimit._anatomy.anatomy import Anatomy
from deeplimit._anatomy.config_depth import set_depths
from deeplimit._anatomy.injection import alike, bypassing, gap
from deeplimit._anatomy.inputs import FAILS, call, told
from deeplimit._anatomy.stacks import Block
from deeplimit.errors import InputError

INDEX = ("layer_idx", "layer_id")  # what a block calls its place, where it knows it
SHOWN = 6
# What evaluation does not see: a rate of stochastic depth follows from the number of layers.
_UNTOLD = re.compile("^training$|drop")


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
    model, x, gone = structure.model, structure.fitting_example(), sorted(removed)
    if not gone or x is None:
        return
    layers, name = ", ".join(map(str, gone)), type(model).__name__
    with alike(model), bypassing(blocks, gone):
        expected = structure.run(x)
    try:
        with alike(smaller):
            own = call(smaller, x)
    except FAILS as error:
        raise InputError(f"{name} does not run without layers {layers} ({told(error)})") from error
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


def check_rebuilt(structure: Anatomy, changed: nn.Module) -> None:
    """A model of another depth must be what its configuration says, so that it can be loaded.

    The class, built from the configuration as it would be read from a file, is given the weights,
    strictly and without a copy; its modules must say of themselves what the model's do, and on the
    family's example its logits must be the model's. What differs for the model as it was before is
    not held against the change. Models without a configuration pass; parameters and random state
    are left alone.
    """
    if not _described(changed):
        return
    found = _differences(structure, changed)
    if found:
        known = _differences(structure, structure.model)
        found = {name: what for name, what in found.items() if name not in known}
    if not found:
        return
    shown = [f"{name} ({what})" if what else name for name, what in list(found.items())[:SHOWN]]
    config = vars(changed.config)
    keys = [name for name in config if re.search("layer|depth|block", name) and name[0] != "_"]
    name = type(changed).__name__
    raise InputError(
        f"the {name} cannot be built again from its configuration: {', '.join(shown)} "
        f"differ{'s' if len(found) == 1 else ''}; what the configuration says of layers: "
        f"{', '.join(f'{key}={config[key]!r}' for key in keys)[:400]}. Its "
        "kinds of layers stand at places that follow a rule: only layers at the end can be "
        "removed, or as many as keep the rule"
    )


def _described(model: nn.Module) -> bool:
    """Tells whether the class is built from the model's `config` alone, as in transformers."""
    if getattr(model, "config", None) is None or not hasattr(model.config, "__dict__"):
        return False
    named = list(inspect.signature(type(model).__init__).parameters)[1:2]
    return hasattr(model, "save_pretrained") or named == ["config"]


def _differences(structure: Anatomy, model: nn.Module) -> dict[str, str]:
    """Differences of the model built again, layers without their numbers."""
    try:
        found = _unread(model.config)
        rebuilt = _built(model)
    except Exception as error:  # whatever a class says to its configuration
        return {"the class": (str(error).splitlines() or [type(error).__name__])[0]}
    found |= _unlike(model, rebuilt)
    mine, its = model.state_dict(), rebuilt.state_dict()
    for name in sorted({*mine, *its}):
        here, there = _shape(mine.get(name)), _shape(its.get(name))
        if here != there:
            found[_starred(name)] = f"{here}, built {there}"
    if found:
        return found
    rebuilt.load_state_dict(mine, strict=True, assign=True)
    buffers = dict(model.named_buffers())  # in no file, such as frequencies of rotary embeddings
    for name, buffer in list(rebuilt.named_buffers()):
        if name in buffers and buffers[name].shape == buffer.shape:
            place, _, key = name.rpartition(".")
            rebuilt.get_submodule(place)._buffers[key] = buffers[name]
    x = structure.fitting_example()
    if x is None:
        return found
    answers = []
    for one in (model, rebuilt):
        with alike(one):
            answers.append(structure.runner(one)(x))
    apart = gap(*answers)
    return {} if apart is None else {"the logits": apart}


def _unread(config: Any) -> dict[str, str]:
    """The keys that are otherwise once the configuration was written and read."""
    if not (hasattr(config, "to_dict") and hasattr(type(config), "from_dict")):
        return {}
    said = config.to_dict()
    again = type(config).from_dict(copy.deepcopy(said)).to_dict()
    return {
        f"config.{name}": f"{said.get(name)!r}, read {again.get(name)!r}"[:120]
        for name in said
        if said.get(name) != again.get(name)
    }


def _built(model: nn.Module) -> nn.Module:
    """The class built from the configuration, without memory or time for its parameters."""
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                return type(model)(copy.deepcopy(model.config))
        except Exception:  # a class that looks at the values of its tensors
            return type(model)(copy.deepcopy(model.config))


def _unlike(model: nn.Module, rebuilt: nn.Module) -> dict[str, str]:
    """Numbers, words and classes that the modules say otherwise, such as a layer's own window."""
    found = {}
    others = dict(rebuilt.named_modules())
    for name, module in model.named_modules():
        other = others.get(name)
        if other is None:
            continue  # its parameters say so, if it has any
        if type(module) is not type(other):
            words = f"{type(module).__name__}, built {type(other).__name__}"
            found[_starred(name)] = words
            continue
        its = vars(other)  # what these lack was of a kind of layer that is gone
        for key, value in vars(module).items():
            told = isinstance(value, int | float | str | None) and key[0] != "_" and key in its
            if told and not _UNTOLD.search(key) and value != its[key]:
                label = _starred(f"{name}.{key}".lstrip("."))
                found[label] = f"{value!r}, built {its[key]!r}"
    return found


def _starred(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def _shape(value: Tensor | None) -> str:
    return "not there" if value is None else "×".join(map(str, value.shape)) or "a number"
