"""A model's configuration builds the model: proven by doing it."""

import copy
import inspect
import re
from typing import Any

import torch
from torch import Tensor, nn

from deeplimit._anatomy.anatomy import Anatomy
from deeplimit._anatomy.evaluation import evaluating
from deeplimit._anatomy.injection import gap
from deeplimit.errors import InputError

SHOWN = 6
# What evaluation does not see: a rate of stochastic depth follows from the number of layers.
_UNTOLD = re.compile("^training$|drop")


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
    with evaluating(model), evaluating(rebuilt), torch.no_grad():
        a, b = (structure.runner(one)(x) for one in (model, rebuilt))
        apart = gap(a, b)
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
