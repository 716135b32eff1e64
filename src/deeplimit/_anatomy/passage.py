"""Passage: a model's own forward through some of its layers, from states that are put in."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

from torch import Tensor, nn

from deeplimit._anatomy.stacks import Block
from deeplimit._anatomy.stand_ins import (
    StandIn,
    in_turn,
    own_call,
    standing_in,
    state_among,
    state_of,
)


@contextmanager
def passing(
    blocks: Sequence[Block], first: int, x: Tensor | None, last: int
) -> Iterator[list[Tensor]]:
    """Runs blocks first … last − 1 alone in each forward inside; collects x_last.

    Args:
        blocks: all blocks of a model, in order.
        first: the first block that runs.
        x: the state that enters it; None for the model's own, with `first` 0.
        last: the first block that does not run any more.
    """
    left: list[Tensor] = []

    def stand_in(n: int, own: StandIn, *args: Any, **kwargs: Any) -> Any:
        h = cast(Tensor, state_among(args, kwargs))
        if n == first and x is not None:
            h = x
        if n == last:
            left.append(h)
        block = blocks[n]
        if first <= n < last:
            output = own(*_with_state(args, h), **_named(args, kwargs, h))
            if n == last - 1 == len(blocks) - 1:
                left.append(cast(Tensor, state_of(output)))
            return output
        return block.form(h if block.shortcut is None else block.shortcut(h))

    turns: dict[nn.Module, list[StandIn | None]] = {}
    for n, block in enumerate(blocks):
        turns.setdefault(block.module, []).append(partial(stand_in, n, own_call(block.module)))
    with standing_in({module: in_turn(module, own) for module, own in turns.items()}):
        yield left


def _with_state(args: tuple[Any, ...], x: Tensor) -> tuple[Any, ...]:
    return (x, *args[1:]) if args and isinstance(args[0], Tensor) else args


def _named(args: tuple[Any, ...], kwargs: Mapping[str, Any], x: Tensor) -> dict[str, Any]:
    """The arguments by name, the state among them where it is given so."""
    if args and isinstance(args[0], Tensor):
        return dict(kwargs)
    given = (k for k, v in kwargs.items() if isinstance(v, Tensor) and v.is_floating_point())
    return {**kwargs, next(given): x}
