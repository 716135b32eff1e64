"""Running costs of blocks: computed in a block's replay where it has one, else as it is entered."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from deeplimit._anatomy.stand_ins import state_among


@runtime_checkable
class ReplayedBlock(Protocol):
    """What may stand in a block's attributes for its forward: it replays it in the backward pass.

    Attributes:
        running_costs: of the calls that come, one after the other; where there is one, a call
            with gradients charges it for the block's input, inside the replay.
        paid: what was charged.
    """

    running_costs: Iterator[Callable[[Tensor], Tensor] | None]
    paid: list[Tensor]


@contextmanager
def charged(
    block: nn.Module, costs: Sequence[Callable[[Tensor], Tensor] | None]
) -> Iterator[list[Tensor]]:
    """Collects cost(x) for the inputs x of a block, inside its replay where it has one.

    Each call has its cost, or none.
    """
    turns = iter(costs)
    standing = vars(block).get("forward")
    if isinstance(standing, ReplayedBlock):
        standing.running_costs, standing.paid = turns, []
        try:
            yield standing.paid
        finally:
            standing.running_costs, standing.paid = iter(()), []
        return
    paid: list[Tensor] = []

    def enters(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cost = next(turns, None)
        if cost is not None and torch.is_grad_enabled():
            paid.append(cost(cast(Tensor, state_among(args, kwargs))))

    handle = block.register_forward_pre_hook(enters, with_kwargs=True)
    try:
        yield paid
    finally:
        handle.remove()
