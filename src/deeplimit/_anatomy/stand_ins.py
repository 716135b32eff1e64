"""Stand-ins for a block for a while: in front of its hooks, or where its cost is charged."""

import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from deeplimit.errors import InputError

PLACE = "_compiled_call_impl"  # what nn.Module calls first, where it is there
PASSING = threading.RLock()  # while functions stand in for the blocks that a network passes

StandIn = Callable[..., Any]
BlockCost = Callable[[Tensor, Tensor], Tensor]  # of the states that enter and leave


class StandingIn:
    """Stands in for a module, whose `own` call it is not."""

    def __init__(self, function: StandIn, own: StandIn):
        self.function, self.own = function, own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the function returns."""
        return self.function(*args, **kwargs)


@contextmanager
def standing_in(stand_ins: Mapping[nn.Module, StandIn]) -> Iterator[None]:
    """Calls these functions for these modules: no hook of a module runs, and nothing of it else.

    What torch.compile made of a model around them would call the modules themselves; meanwhile it
    is not used.
    """
    kept = [(module, vars(module).get(PLACE)) for module in stand_ins]
    for module, function in stand_ins.items():
        vars(module)[PLACE] = StandingIn(function, own_call(module))
    compiled = "torch._dynamo" in sys.modules
    try:
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            yield
    finally:
        for module, before in kept:
            if before is None:
                vars(module).pop(PLACE, None)
            else:
                vars(module)[PLACE] = before


@contextmanager
def standing_aside(model: nn.Module) -> Iterator[None]:
    """A model runs its own modules, once no other thread has put functions in their places."""
    with PASSING:
        placed = [(vars(module), vars(module).get(PLACE)) for module in model.modules()]
        stand_ins = [(own, one) for own, one in placed if isinstance(one, StandingIn)]
        for own, one in stand_ins:
            own[PLACE] = one.own
        try:
            yield
        finally:
            for own, one in stand_ins:
                own[PLACE] = one


class ForwardStandIn:
    """Stands among a module's own attributes for the forward of its class, until it is removed.

    Attributes:
        block: the module.
        original: what stood there before, such as a compiled forward.
    """

    def __init__(self, block: nn.Module):
        self.block = block
        self.original: StandIn | None = vars(block).get("forward")

    @property
    def own(self) -> StandIn:
        """The function that is called without it."""
        return self.original or partial(type(self.block).forward, self.block)

    def put(self) -> None:
        """Puts it there."""
        vars(self.block)["forward"] = self

    def remove(self) -> None:
        """Puts back what was there."""
        if self.original is None:
            del vars(self.block)["forward"]
        else:
            vars(self.block)["forward"] = self.original


def own_call(module: nn.Module) -> StandIn:
    """The function that a call of a module runs where nothing stands in for it."""
    placed: StandIn = vars(module).get(PLACE) or module._call_impl  # noqa: SLF001
    return placed.own if isinstance(placed, StandingIn) else placed


def state_among(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The state in a block's arguments: the first that is a tensor of numbers with a fraction.

    An InputError where it is a nested tensor, which has no rows for samples.
    """
    if args and isinstance(args[0], Tensor):
        x: Tensor | None = args[0]
    else:
        given = (v for v in kwargs.values() if isinstance(v, Tensor) and v.is_floating_point())
        x = next(given, None)
    if x is not None and x.is_nested:
        raise InputError(
            "nested tensors enter its blocks, which have no rows for samples: set "
            "use_nested_tensor = False on the TransformerEncoder"
        )
    return x


def state_of(output: Any) -> Tensor | None:
    """The state in what a block returns: the tensor, or the first of several."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        output = tuple(output.values())
    if isinstance(output, tuple | list):
        output = output[0] if output else None
    return output if isinstance(output, Tensor) else None


def version(x: Tensor | None) -> int:
    """Counts how often a tensor was written over; in inference mode nobody does."""
    return 0 if x is None or x.is_inference() else x._version


def with_argument(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], before: Tensor | None, x: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A block's arguments with another state in place of the one before."""
    named = {name: x if v is before else v for name, v in kwargs.items()}
    return tuple(x if v is before else v for v in args), named


def with_state(output: Any, x: Tensor, others: Callable[[Any], Any] = lambda v: v) -> Any:
    """A block's output with another state in it; what else is in it stays, or becomes `others`."""
    kind = type(output)
    if isinstance(output, Mapping):
        first, *rest = output
        return kind(**{first: x}, **{name: others(output[name]) for name in rest})
    if isinstance(output, tuple | list):
        make = kind._make if hasattr(kind, "_make") else kind
        return make([x, *map(others, output[1:])])
    return x


def said(value: Any) -> Any:
    """A value without tensors, such as height and width; 0 of a number's, a loss; else None."""
    if isinstance(value, Tensor) and value.is_floating_point() and not value.dim():
        return torch.zeros_like(value, requires_grad=False)
    if isinstance(value, tuple | list):
        parts = [said(part) for part in value]
        return None if any(part is None for part in parts) else type(value)(parts)
    return value if isinstance(value, int | float | str) else None


def form_of(output: Any) -> Callable[[Tensor], Any]:
    """A function that puts a state in the form of an output, of which sizes stay.

    Other tensors become None: a model that needs what else its blocks give fails, and is not
    answered wrongly.
    """
    return partial(with_state, with_state(output, torch.empty(0), said))


class ReplayedBlock(ForwardStandIn):
    """Replays its block's forward in the backward pass.

    Attributes:
        running_costs: of the calls that come, one after the other; where there is one, a call
            with gradients charges it for the block's input and output, inside the replay.
        paid: what was charged.
    """

    def __init__(self, block: nn.Module):
        super().__init__(block)
        self.running_costs: Iterator[BlockCost | None] = iter(())
        self.paid: list[Tensor] = []


@contextmanager
def collected(block: nn.Module, costs: Sequence[BlockCost | None]) -> Iterator[list[Tensor]]:
    """Collects cost(x, y) of the states x → y of a block, inside its replay where it has one.

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

    def leaves(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        cost = next(turns, None)
        if cost is not None and torch.is_grad_enabled():
            x, y = state_among(args, kwargs), state_of(output)
            paid.append(cost(cast(Tensor, x), cast(Tensor, y)))

    handle = block.register_forward_hook(leaves, with_kwargs=True)
    try:
        yield paid
    finally:
        handle.remove()
