"""What a block is called with: the state, and everything else."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from deeplimit.gradient.errors import AdjointError

CACHES = ("past_key_values", "past_key_value", "layer_past", "cache_params")


def state_of(output: Any) -> Tensor | None:
    """The state in a block's output: the output itself, or the first of a tuple."""
    if isinstance(output, tuple | list) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None


def is_cache(value: Any) -> bool:
    """A key-value cache of transformers, by what it can do."""
    return hasattr(value, "get_seq_length") and hasattr(value, "update")


class Arguments:
    """The arguments of one call, with a hole where the state was.

    The state is the first positional argument, or else the first tensor among the keywords.
    """

    __slots__ = ("_args", "_kwargs", "_place", "_versions")

    def __init__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]):
        place: int | str | None = 0
        if not args:
            place = next((k for k, v in kwargs.items() if isinstance(v, Tensor)), None)
        elif not isinstance(args[0], Tensor):
            place = None
        self._place = place
        self._args, self._kwargs = args, dict(kwargs)
        self._versions: list[tuple[Tensor, int]] = []

    @property
    def state(self) -> Tensor | None:
        """The state, as long as it is there."""
        place = self._place
        if place is None:
            return None
        value = self._args[place] if isinstance(place, int) else self._kwargs[place]
        assert isinstance(value, Tensor) or value is None
        return value

    def complete(self) -> None:
        """After the forward pass: forgets the state and caches, and lets go of the graph.

        What a replay needs of another tensor is its numbers. With its graph it would hold the
        graph of earlier blocks, which hold this call: memory that is never freed.
        """
        args, kwargs = self._with(None, self._args, self._kwargs)
        self._args = tuple(_without_graph(value) for value in args)
        self._kwargs = {name: _without_graph(value) for name, value in kwargs.items()}
        for name in CACHES:
            if name in kwargs:
                self._kwargs[name] = None
        if kwargs.get("use_cache"):
            self._kwargs["use_cache"] = False
        self._versions = [(t, t._version) for t in self.tensors()]

    def tensors(self) -> Iterator[Tensor]:
        """The tensors among the arguments, and in the tuples, lists and dicts among them."""
        yield from _tensors_in((self._args, self._kwargs))

    def filled_cache(self, layer: int | None) -> bool:
        """Whether a key-value cache already holds something of this layer."""
        for value in (*self._args, *self._kwargs.values()):
            if is_cache(value):
                if layer is None or value.get_seq_length(layer) > 0:
                    return True
            elif isinstance(value, tuple) and value and isinstance(value[0], tuple):
                return True  # the old form: a tuple of keys and values per layer
        return False

    def at(self, x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) with this state: as they came, or once complete without caches.

        A cache would grow by a replay.
        """
        return self._with(x, self._args, self._kwargs)

    def _with(
        self, x: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        place = self._place
        if isinstance(place, int):
            return (*args[:place], x, *args[place + 1 :]), kwargs
        assert place is not None
        return args, kwargs | {place: x}

    def check(self, name: str) -> None:
        """Raises AdjointError if another tensor argument was changed in place since."""
        if any(t._version != v for t, v in self._versions):
            raise AdjointError(
                f"{name}: one of its other arguments (a mask, an embedding) was changed in place "
                "between forward and backward; change a copy of it"
            )


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(item)


def _without_graph(value: Any) -> Any:
    if is_cache(value):
        return None
    if isinstance(value, Tensor):
        return value.detach().requires_grad_(value.requires_grad)
    if type(value) in (tuple, list):
        return type(value)(_without_graph(item) for item in value)
    if type(value) is dict:
        return {key: _without_graph(item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):  # a named one
        return type(value)(*map(_without_graph, value))
    return value


def layer_index(modules: Iterable[torch.nn.Module]) -> int | None:
    """Which layer of a cache a block uses: transformers' modules know it as layer_idx."""
    found = (getattr(m, "layer_idx", None) for m in modules)
    return next((i for i in found if isinstance(i, int)), None)
