"""A model's own forward without some of its blocks, and with states put in: bypass and inject."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from deeplimit._anatomy.evaluation import RunningStatistics
from deeplimit._anatomy.stacks import Block
from deeplimit._anatomy.stand_ins import (
    StandIn,
    in_turn,
    own_call,
    standing_in,
    state_among,
    state_of,
    with_argument,
)
from deeplimit.errors import InputError

# Of the logits' rounding, what the same head may make of the same state in another call. Sums in
# half precision are rounded once, at their end.
SLACK, HALF_SLACK = 100, 4


@contextmanager
def _instead(blocks: Sequence[Block], functions: Sequence[StandIn | None]) -> Iterator[None]:
    """Calls functions for blocks, of which one module may be several; where one is None, itself."""
    turns: dict[nn.Module, list[StandIn | None]] = {}
    for block, function in zip(blocks, functions, strict=True):
        turns.setdefault(block.module, []).append(function)
    with standing_in({module: in_turn(module, own) for module, own in turns.items() if any(own)}):
        yield


@contextmanager
def bypassing(blocks: Sequence[Block], gone: Iterable[int]) -> Iterator[None]:
    """Those of the blocks that are gone return their input, in the form of their output."""

    def bypass(block: Block, *args: Any, **kwargs: Any) -> Any:
        return block.form(cast(Tensor, state_among(args, kwargs)))

    gone = set(gone)
    with _instead(
        blocks, [partial(bypass, b) if n in gone else None for n, b in enumerate(blocks)]
    ):
        yield


@contextmanager
def passing(
    blocks: Sequence[Block], first: int, x: Tensor | None, last: int
) -> Iterator[list[Tensor]]:
    """Runs blocks first … last − 1 alone, from x or the model's own state; collects x_last."""
    left: list[Tensor] = []

    def stand_in(n: int, own: StandIn, *args: Any, **kwargs: Any) -> Any:
        block, h = blocks[n], cast(Tensor, state_among(args, kwargs))
        if n == first and x is not None:
            args, kwargs = with_argument(args, kwargs, h, x)
            h = x
        if n == last:
            left.append(h)
        if first <= n < last:
            output = own(*args, **kwargs)
            if n == last - 1 == len(blocks) - 1:
                left.append(cast(Tensor, state_of(output)))
            return output
        return block.form(h if block.shortcut is None else block.shortcut(h))

    functions = [partial(stand_in, n, own_call(b.module)) for n, b in enumerate(blocks)]
    with _instead(blocks, functions):
        yield left


def injected(
    model: nn.Module,
    blocks: Sequence[Block],
    run: Callable[[], Tensor],
    at: Mapping[int, Tensor],
    statistics: RunningStatistics | None = None,
    read: int | None = None,
) -> Tensor:
    """The logits of states that are put in at the end of their stages, all blocks bypassed.

    States of earlier stages come first in the answer. What the model carries from its stem is
    dropped where the first states come in. The random state and running statistics are afterwards
    what they were. With `read`, a stage, what enters it is returned in place of the logits; an
    InputError where a stage does not go on from the one before.
    """
    last = {b.stage: b for b in blocks}
    rows, entered = 0, -1
    taken: list[Tensor] = []

    def bypass(block: Block, *args: Any, **kwargs: Any) -> Any:
        nonlocal rows, entered
        h = cast(Tensor, state_among(args, kwargs))
        if block.stage != entered:
            entered = block.stage
            if rows and len(h) != rows:
                raise InputError(
                    f"stage {entered} does not go on from the one before, so that they are no one "
                    "stack; name one list of blocks with blocks=…"
                )
            if entered == read:
                taken.append(h)
        if block is last[block.stage]:
            h = put(block.stage, h)
        if block.shortcut is not None:
            h = block.shortcut(h)
            if block is blocks[-1]:
                h = put(block.stage + 1, h)
        return block.form(h)

    def put(stage: int, h: Tensor) -> Tensor:
        nonlocal rows
        if stage in at:
            h = torch.cat([h, at[stage]]) if rows else at[stage]
            rows = len(h)
        return h

    functions = [partial(bypass, b) for b in blocks]
    statistics = statistics or RunningStatistics(model.modules())
    with (
        torch.random.fork_rng(devices_of(model)),
        statistics.use(),
        _instead(blocks, functions),
    ):
        logits = run()
    return logits if read is None else taken[0]


def devices_of(model: nn.Module) -> list[int]:
    """The devices other than the CPU whose random state a forward may change."""
    initialised = cast(Any, torch.cuda).is_initialized()
    # No walk through a large model for each call of its head where there is no such device.
    found = {p.device for p in model.parameters()} if initialised else set()
    return sorted({d.index or 0 for d in found if d.type == "cuda"})


def slack_of(dtype: torch.dtype) -> float:
    """Bounds the difference of two sums of the same numbers, relative to the largest."""
    return (HALF_SLACK if dtype.itemsize < 4 else SLACK) * torch.finfo(dtype).eps


def gap(a: Tensor | None, b: Tensor) -> str | None:
    """Says in words by what two answers differ; None where they are equal but for rounding.

    NaN is no agreement; infinite logits, of tokens that may not be said, are equal to themselves.
    """
    if a is None or a.shape != b.shape:
        return f"in shape, {None if a is None else list(a.shape)} and {list(b.shape)}"
    if b.numel() == 0:
        return None
    largest = float(b.abs().masked_fill_(b.isinf(), 0).max())
    limit = slack_of(b.dtype) * (1 + largest)
    difference = a.to(torch.promote_types(b.dtype, torch.float32)) - b
    apart = float(difference.masked_fill_(a == b, 0).abs_().max())
    return None if apart <= limit else f"by {apart:.2g}"


def by_stage(states: Sequence[Tensor], stages: Sequence[int]) -> dict[int, Tensor]:
    """The states of each stage, one after the other."""
    pairs = list(zip(states, stages, strict=True))
    return {m: torch.cat([s for s, at in pairs if at == m]) for m in sorted(set(stages))}
