"""Layers whose step size goes to zero while the network trains, so that nothing jumps when cut."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from deeplimit.errors import InputError
from deeplimit.network import ResidualChain
from deeplimit.network.anatomy import anatomy


class Faded(nn.Module):
    """A residual block x ↦ y with a smaller step: x + s·(y − x); with s = 0 it is not run.

    In place of a residual function φ, whose chain adds its input by itself: s·φ(x).

    Attributes:
        block: the block.
        step: s, from 1 (the block as it is) to 0 (none).
        past: what takes a state past the block as if it did nothing; None for a residual function.
    """

    def __init__(self, block: nn.Module, past: Callable[[Tensor], Tensor] | None):
        super().__init__()
        self.block = block
        self.__dict__["past"] = past  # a part of the block: no module of this one
        self.step = 1.0

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The next state, or the update; what else the block returns stays as it is."""
        if self.step == 0:
            return torch.zeros_like(x) if self.past is None else self.past(x)
        y = self.block(x, *args, **kwargs)
        if self.step == 1:
            return y
        rest = y[1:] if isinstance(y, tuple) else None
        state = y if rest is None else y[0]
        if self.past is None:
            state = self.step * state
        else:
            state = torch.lerp(self.past(x), state, self.step)
        return state if rest is None else (state, *rest)

    def __getattr__(self, name: str) -> Any:
        """What models ask of their blocks beside running them."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)


class Fading:
    """All layers of a model that are being faded out.

    Attributes:
        layers: which, in order.
    """

    def __init__(self, layers: tuple[int, ...], faded: list[Faded]):
        self.layers, self._faded = layers, faded

    def set_step(self, step: float) -> None:
        """Sets s of every layer, 1 … 0.

        Raises:
            InputError: another number.
        """
        if not 0 <= step <= 1:
            raise InputError(f"a faded layer's step is {step}; expected a number from 0 to 1")
        for block in self._faded:
            block.step = float(step)


@contextmanager
def fading(model: nn.Module, layers: Iterable[int]) -> Iterator[Fading]:
    """For a while these layers of a model, in place, have a step that can be lowered to zero.

        x_{n+1} = x_n + s·(Φ_n(x_n) − x_n)

    With s = 1 the model is what it was, with s = 0 it is `crop(model, remove=layers)` to the last
    bit: training while s goes from 1 to 0 leads from the one to the other without a jump. When
    left, the blocks are back in their places, with what was learnt.

    Raises:
        InputError: a layer that does not exist, that the model cannot do without, or of a scheme
            whose steps share their controls (Heun).
    """
    structure = anatomy(model)
    wanted = tuple(sorted(set(layers)))
    structure.check_removable(wanted)
    places: list[tuple[nn.Module, str, nn.Module]] = []
    faded: list[Faded] = []
    homes = {
        id(child): (parent, name)
        for parent in model.modules()
        for name, child in parent._modules.items()
    }
    for n in wanted:
        controls = structure.layers[n].controls
        if len(controls) != 1:
            raise InputError(f"layer {n} shares its controls with another, so it cannot be faded")
        parent, name = homes[id(controls[0])]
        places.append((parent, name, controls[0]))
        past = None if isinstance(parent, ResidualChain) else structure.past(n)
        faded.append(Faded(controls[0], past))
    try:
        for (parent, name, block), stand_in in zip(places, faded, strict=True):
            stand_in.training = block.training
            parent._modules[name] = stand_in
        yield Fading(wanted, faded)
    finally:
        for parent, name, block in places:
            parent._modules[name] = block
