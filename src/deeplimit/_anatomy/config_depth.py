"""A configuration's words on single layers, brought up to date after a change of depth."""

import re
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

from torch import nn

COUNT = re.compile(r"(num|n)_(\w+_)?(layers?|blocks?)|(en|de)coder_(layers|depth)|depth|layers")


def set_depths(model: nn.Module, before: Mapping[str, int], kept: Mapping[str, list[int]]) -> None:
    """After a change of depth: brings up to date what a model says of itself, in place.

    That is the `config` nearest to the lists of blocks, and the model's own; of a model of timm
    the arguments that build it again.
    """
    mine: Any = getattr(model, "config", None)
    holders = {name: _around(model, name) for name in before}
    nearest = (next((m.config for m in own if _described(m)), None) for own in holders.values())
    configs = {id(c): c for c in (*nearest, mine) if hasattr(c, "__dict__")}
    for name, modules in holders.items():
        for module in modules:
            for key, value in list(vars(module).items()):
                if COUNT.fullmatch(key) and type(value) is int and value == before[name]:
                    setattr(module, key, len(kept[name]))
    for config in configs.values():
        _set(config, before, kept, apart=config is mine and len(configs) > 1)
    arguments = getattr(model, "_model_args", None)
    if isinstance(arguments, dict):
        told = SimpleNamespace(**arguments)
        _set(told, before, kept, apart=False)
        model._model_args = vars(told)  # type: ignore[assignment]  # noqa: SLF001
        entries: Any = getattr(model, "feature_info", None)  # of each block's output, or of some
        ((name, count), *more) = before.items()
        if isinstance(entries, list) and not more and len(entries) == count:
            model.feature_info = [  # type: ignore[assignment]
                entries[old] | {"module": f"{name}.{i}"} for i, old in enumerate(kept[name])
            ]


def _described(module: nn.Module) -> bool:
    return hasattr(getattr(module, "config", None), "__dict__")


def _around(model: nn.Module, name: str) -> list[nn.Module]:
    """The modules that hold a list, the innermost first."""
    parts = name.split(".")
    return [model.get_submodule(".".join(parts[:end])) for end in range(len(parts) - 1, -1, -1)]


def _set(
    config: Any, before: Mapping[str, int], kept: Mapping[str, list[int]], *, apart: bool
) -> None:
    """`apart`: there is another configuration, of the part alone that holds the lists."""
    counts = list(before.values())
    if len(counts) == 1:
        ((name, count),) = before.items()
        _set_layers(config, kept[name], count, name, apart=apart)
        return
    for name, value in list(vars(config).items()):
        told = isinstance(value, list | tuple) and re.search("depth|layer|block", name)
        if told and [n for n in value if n] == counts:
            left = iter(before)  # a list that is empty already stays so
            setattr(config, name, type(value)(n and len(kept[next(left)]) for n in value))


def _set_layers(config: Any, kept: list[int], before: int, path: str, *, apart: bool) -> None:
    """Rewrites a configuration of one stack of layers in place.

    The count of layers is the new one; of lists with an entry for each layer those of the layers
    kept remain; what tells layers apart otherwise is in the table `UNUSUAL`. Of a model with
    encoder and decoder the keys of the other one stay.
    """
    part, other = ("decoder", "encoder") if "decoder" in path else ("encoder", "decoder")
    counts = [
        name
        for name, value in vars(config).items()
        if COUNT.fullmatch(name) and type(value) is int and value == before
    ]
    mine = [name for name in counts if part in name]
    free = [name for name in counts if part not in name and other not in name]
    if part in path and (apart or part == "decoder") and mine:
        free = []
    for name in [*mine, *free] if part in path else free or mine:
        setattr(config, name, len(kept))
    for name, value in list(vars(config).items()):
        rule = UNUSUAL.get(name, _each if "layer" in name and other not in name else None)
        if rule is not None and (said := rule(config, value, kept, before)) is not None:
            setattr(config, "per_layer_config" if rule is _overrides else name, said)
    if hasattr(config, "stage_names") and hasattr(config, "out_indices"):
        _name_stages(config, kept)


def _name_stages(config: Any, kept: list[int]) -> None:
    """Where every layer is a stage: what a backbone puts out of those left, or the last stage."""
    before = len(config.stage_names)
    wanted = {index % before for index in config.out_indices}
    config.stage_names = ["stem", *(f"stage{n}" for n in range(1, len(kept) + 1))]
    # Of a layer that was repeated the last one puts out what it did.
    ends = {old: new for new, old in enumerate([0, *(n + 1 for n in kept)])}
    left = sorted(new for old, new in ends.items() if old in wanted)
    config.out_indices = left or [len(kept)]  # sets out_features too


# Of a configuration: what a key said, the layers kept, their number before ↦ what it says; or None.
Rule = Callable[[Any, Any, list[int], int], Any]


def _first(config: Any, value: Any, kept: list[int], before: int) -> Any:
    """So many layers at the beginning are of another kind: so many of them as are left."""
    counts = isinstance(value, int) and value < before
    return sum(i < value for i in kept) if counts else None


def _indices(config: Any, value: Any, kept: list[int], before: int) -> Any:
    """The numbers of layers of another kind."""
    several = isinstance(value, list | tuple)
    return type(value)(j for j, i in enumerate(kept) if i in value) if several else None


def _each(config: Any, value: Any, kept: list[int], before: int) -> Any:
    """A list with an entry for each layer."""
    every = isinstance(value, list | tuple) and len(value) == before
    return type(value)(value[i] for i in kept) if every else None


def _dense(config: Any, value: Any, kept: list[int], before: int) -> Any:
    """Layers are dense that `mlp_only_layers` lists or `decoder_sparse_step` does not divide.

    A cut from the middle keeps no such rhythm: then all dense layers are listed.
    """
    listed, step = set(value or ()), getattr(config, "decoder_sparse_step", 1)
    if kept != list(range(len(kept))) and step > 1:
        listed |= {i for i in range(before) if (i + 1) % step}
        config.decoder_sparse_step = 1
    return [j for j, i in enumerate(kept) if i in listed]


def _attention_types(config: Any, value: Any, kept: list[int], before: int) -> Any:
    """[[kinds, repetitions], …], which GPT-Neo unfolds."""
    kinds = [kind for part, times in value for _ in range(times) for kind in part]
    return [[[kinds[i] for i in kept], 1]] if len(kinds) == before else None


def _by_root(config: Any, value: Any, kept: list[int], before: int) -> Any:
    """A number that the model divides by the root of its depth: the quotient stays."""
    return value * (len(kept) / before) ** 0.5 if isinstance(value, int | float) else None


def _overrides(config: Any, value: Any, kept: list[int], before: int) -> Any:
    """The entries of transformers' `per_layer_config`, by the numbers of layers."""
    said: Any = getattr(value, "per_layer_overrides", None)
    several = isinstance(said, dict)
    return {j: dict(said[i]) for j, i in enumerate(kept) if i in said} if several else None


UNUSUAL: dict[str, Rule] = {
    "max_window_layers": _first,
    "first_k_dense_replace": _first,
    "mlp_only_layers": _dense,
    "attention_types": _attention_types,
    "moe_layers": _indices,
    "_heterogeneity_spec": _overrides,
    "attention_window": _each,
    "scale_depth": _by_root,
    "cross_attention_layers": _indices,
}
