"""Control costs beside the squared norm of the controls: the kinetic energy of the states."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import pairwise
from typing import Any, Literal, get_args

from torch import Tensor

from deeplimit._anatomy import Anatomy
from deeplimit._anatomy.checks import IGNORED
from deeplimit.control.token_losses import widened
from deeplimit.errors import InputError

ControlCost = Literal["squared", "kinetic"]


def check_kind(kind: str) -> None:
    """Raises InputError unless it is the name of a control cost."""
    if kind not in get_args(ControlCost):
        known = ", ".join(map(repr, get_args(ControlCost)))
        raise InputError(f"control_cost_kind is {kind!r}; expected one of {known}")


class KineticEnergy:
    """w·mean_i ‖x_{n+1}^i − x_n^i‖² of a batch, with x_{n+1} as it leaves layer n.

    Of states [B, L, d] the samples i are tokens: those whose target is not −100 where each has one,
    else those that the attention mask counts. Where the layer changes the shape it is 0.
    """

    def __init__(self, structure: Anatomy, x: Any, y: Any, weight: float):
        counts = x.get("attention_mask") if isinstance(x, Mapping) else None
        if structure.tokens and isinstance(y, Tensor) and y.dim() == 2:
            counts = y != IGNORED
        self._counts: Tensor | None = None if counts is None else counts != 0
        self._weight = weight

    def __call__(self, before: Tensor, after: Tensor) -> Tensor:
        """The energy of one layer."""
        if before.shape != after.shape:
            return widened(before).new_zeros(())
        squares = self._weight * (widened(after) - widened(before)).square()
        if before.dim() != 3:
            return squares.flatten(1).sum(1).mean()
        squares, counts = squares.sum(-1), self._counts
        if counts is None or counts.shape != squares.shape:
            return squares.mean()
        return squares.where(counts, 0.0).sum() / counts.sum().clamp(min=1)


@contextmanager
def ends_of_stages(structure: Anatomy) -> Iterator[dict[int, Tensor]]:
    """Collects, by n, the state as it leaves each layer behind which another stage begins."""
    stages = structure.state_stages
    left: dict[int, Tensor] = {}
    with ExitStack() as stack:
        for n in range(structure.horizon):
            if stages[n] != stages[n + 1]:
                handle = structure.register_leaving_hook(n, partial(left.__setitem__, n))
                stack.callback(handle.remove)
        yield left


def moves(states: Sequence[Tensor], ends: Mapping[int, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """The pairs (x_n, x_{n+1}) of all layers, with `ends_of_stages` where a stage ends."""
    for n, pair in enumerate(pairwise(states)):
        yield pair[0], ends.get(n, pair[1])
