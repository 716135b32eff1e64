"""What a configuration says of single layers, brought up to date after a change of depth."""

from collections.abc import Callable
from typing import Any

COUNTS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")


def set_layers(config: Any, kept: list[int], before: int) -> None:
    """Rewrites a configuration of one stack of layers in place.

    The count of layers is the new one; of lists with an entry for each layer those of the layers
    kept remain; what tells layers apart otherwise is in the table `UNUSUAL`.

    Args:
        config: any object with attributes.
        kept: the old layers that stand there now, in order; one may be there several times.
        before: how many layers there were.
    """
    for name, value in list(vars(config).items()):
        if name in UNUSUAL:
            UNUSUAL[name](config, name, kept, before)
        elif name in COUNTS and value == before:
            setattr(config, name, len(kept))
        elif "layer" in name and isinstance(value, list | tuple) and len(value) == before:
            setattr(config, name, type(value)(value[i] for i in kept))


def _first(config: Any, name: str, kept: list[int], before: int) -> None:
    """So many layers at the beginning are of another kind: so many of them as are left."""
    value = getattr(config, name)
    if isinstance(value, int) and value < before:
        setattr(config, name, sum(i < value for i in kept))


def _indices(config: Any, name: str, kept: list[int], before: int) -> None:
    """The numbers of layers of another kind."""
    value = getattr(config, name)
    if isinstance(value, list | tuple):
        setattr(config, name, type(value)(j for j, i in enumerate(kept) if i in value))


def _dense(config: Any, name: str, kept: list[int], before: int) -> None:
    """Layers are dense that `mlp_only_layers` lists or `decoder_sparse_step` does not divide.

    A cut from the middle keeps no such rhythm: then all dense layers are listed.
    """
    listed, step = set(config.mlp_only_layers or ()), getattr(config, "decoder_sparse_step", 1)
    if kept != list(range(len(kept))) and step > 1:
        listed |= {i for i in range(before) if (i + 1) % step}
        config.decoder_sparse_step = 1
    config.mlp_only_layers = [j for j, i in enumerate(kept) if i in listed]


def _attention_types(config: Any, name: str, kept: list[int], before: int) -> None:
    """[[kinds, repetitions], …], which GPT-Neo unfolds."""
    kinds = [kind for part, times in getattr(config, name) for _ in range(times) for kind in part]
    if len(kinds) == before:
        setattr(config, name, [[[kinds[i] for i in kept], 1]])


UNUSUAL: dict[str, Callable[[Any, str, list[int], int], None]] = {
    "max_window_layers": _first,
    "first_k_dense_replace": _first,
    "mlp_only_layers": _dense,
    "attention_types": _attention_types,
    "moe_layers": _indices,
    "cross_attention_layers": _indices,
}
