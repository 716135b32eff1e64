"""Layers whose step size goes to zero while the network trains, so that nothing jumps when cut."""

from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, SupportsIndex, cast

import torch
from torch import Tensor, nn

from deeplimit._anatomy import Anatomy, anatomy
from deeplimit._anatomy.anatomy import layer_numbers
from deeplimit._anatomy.checks import check_number
from deeplimit._anatomy.stand_ins import MethodStandIn, state_among, state_of, with_state
from deeplimit.errors import InputError


class FadedForward(MethodStandIn):
    """Stands in a block's own attributes for its forward: x + s·(y − x) in place of y.

    In place of a residual function φ, whose chain adds its input by itself: s·φ(x).

    Attributes:
        step: s, from 1 (the block as it is) to 0, with which the block is not run unless it has a
            key-value cache to fill or returns more than the state, or may.
        past: what takes a state past the block as if it did nothing; None for a residual function.
    """

    def __init__(self, block: nn.Module, past: Callable[[Tensor], Tensor] | None):
        super().__init__(block)
        self.past, self.step = past, 1.0
        self._state_alone = past is None  # whether the block is known to return nothing else

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The next state, or the update; what else the block returns stays as it is."""
        x = cast(Tensor, state_among(args, kwargs))
        # A block with a key-value cache is run: the cache's length is read off its layers.
        cached = any(hasattr(value, "get_seq_length") for value in (*args, *kwargs.values()))
        if self.step == 0 and self._state_alone and not cached:
            return torch.zeros_like(x) if self.past is None else self.past(x)
        y = self.own(*args, **kwargs)
        self._state_alone = isinstance(y, Tensor)
        if self.step == 1:
            return y
        state = cast(Tensor, state_of(y))
        if self.past is None:
            return with_state(y, self.step * state)
        past = self.past(x)
        return with_state(y, torch.lerp(past, state, self.step) if self.step else past)


class Fading:
    """These layers of a model, in place, have a step that can be lowered to zero:

        x_{n+1} = x_n + s·(Φ_n(x_n) − x_n)

    With s = 1 the model is what it was, with s = 0 it is `crop(model, remove=layers)` to the last
    bit: training while s goes from 1 to 0 leads from the one to the other without a jump. The
    parameters and the keys of the state_dict do not change. `end()` puts everything back, with what
    was learnt; used in a with statement it is called when that is left. To be combined with
    `use_adjoint`, fade first.

        >>> with Fading(model, [1, 2]) as fade:
        ...     fade.set_step(0.0)
        ...     faded = model(loader[0][0])
        >>> torch.equal(faded, crop(model, remove=[1, 2])(loader[0][0]))
        True

    Args:
        model: any that `anatomy` can read.
        layers: which, counted through all stages.

    Raises:
        InputError: a layer that does not exist, that the model cannot do without, or of a scheme
            whose steps share their controls (Heun).
    """

    def __init__(self, model: nn.Module | Anatomy, layers: Iterable[SupportsIndex]):
        structure = anatomy(model)
        self.layers = tuple(sorted(layer_numbers(layers)))
        structure.check_removable(self.layers)
        adding = {n for stack in structure.stacks if stack.adds for n in stack.layers}
        self._faded: list[FadedForward] = []
        for n in self.layers:
            block, *others = structure.layers[n].controls
            if isinstance(vars(block).get("forward"), FadedForward):
                raise InputError(f"layer {n} fades already; end that first")
            if others:
                raise InputError(f"layer {n} shares its controls with another: it cannot be faded")
            past = structure.past(n) if n in adding else None
            self._faded.append(FadedForward(block, past))
        for stand_in in self._faded:
            stand_in.put()

    def set_step(self, step: float) -> None:
        """Sets s of every layer, 1 … 0.

        Raises:
            InputError: another number.
        """
        expected = "a number from 0 to 1"
        step = check_number("a faded layer's step", step, expected, lambda s: 0 <= s <= 1)
        for stand_in in self._faded:
            stand_in.step = step

    def end(self) -> None:
        """Puts the blocks' own forward back."""
        for stand_in in self._faded:
            stand_in.remove()
        self._faded.clear()

    def __enter__(self) -> "Fading":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.end()
