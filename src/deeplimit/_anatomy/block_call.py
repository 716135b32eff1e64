"""One call of a block, made again with the outputs of its modules changed: what comes out."""

import math
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from deeplimit._anatomy.injection import slack_of
from deeplimit._anatomy.stacks import Watch
from deeplimit._anatomy.stand_ins import (
    state_among,
    state_of,
    with_argument,
    with_state,
)

if TYPE_CHECKING:
    from deeplimit._anatomy.anatomy import Anatomy

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class End:
    """A module whose output m a block adds to the state: x = y + gain ⊙ m, or ReLU(y + m).

    The gain is per channel, in float64; channels are in the dimension `axis` of m, `state_axis` of
    the state. Of a batch norm `convolution` is what it normalises, where a map can be folded into
    both; `rest` gives y where a ReLU follows: a shortcut, or the block itself (its input).
    """

    name: str
    module: nn.Module
    convolution: nn.Conv2d | None
    axis: int
    state_axis: int
    gain: Tensor
    rest: nn.Module | None = None

    @property
    def biased(self) -> bool:
        """True where a constant can be added."""
        return getattr(self.module, "bias", None) is not None

    @property
    def mixes(self) -> bool:
        """True where channels can be mixed."""
        weight = cast(Tensor, self.module.weight)
        return weight.dim() > 1 or self.convolution is not None

    def rows(self, m: Tensor) -> Tensor:
        """The output m as float64 [rows, d], those of a sample one after the other."""
        return _rows(m, self.axis)

    def state_rows(self, x: Tensor) -> Tensor:
        """A state likewise."""
        return _rows(x, self.state_axis)


def _rows(x: Tensor, axis: int) -> Tensor:
    return x.movedim(axis, -1).flatten(0, -2).double()


class _LeftError(Exception):
    """The state wanted has left its layer; what follows need not run."""


def left(structure: "Anatomy", n: int, run: Callable[[], Any]) -> Tensor | None:
    """The state that leaves layer n in a forward, which ends there."""
    found: list[Tensor] = []

    def leaves(x: Tensor) -> None:
        found.append(x)
        raise _LeftError

    handle = structure.register_leaving_hook(n, leaves)
    try:
        run()
    except _LeftError:
        pass
    finally:
        handle.remove()
    return found[-1] if found else None


class BlockCall:
    """One layer's call in a run of the model, which can be made again with outputs changed.

    x entered the block, `out` left it (None where the run showed none). `order` are its modules
    that were called once, as their calls ended, with the state in what each returned (`outputs`)
    and the state that each was given (`inputs`); `calls` has the last call of whatever ran.
    """

    def __init__(self, structure: "Anatomy", n: int, x: Any):
        self.structure, self.n = structure, n
        self.block = structure.layers[n].controls[0]
        self.names = {m: name for name, m in structure.model.named_modules()}
        self._without: dict[tuple[frozenset[nn.Module], nn.Module | None], Tensor] = {}
        watch = Watch(self.block.modules(), copies=True)
        self.out = watch.run(partial(left, structure, n, partial(structure.run, x)))
        every = self.calls = {m: calls[-1] for m, calls in watch.seen.items()}
        self.outputs = {m: at.left for m, at in every.items() if at.left is not None}
        self.inputs = {m: at.entered for m, at in every.items() if at.entered is not None}
        once = [m for m in watch.ended if len(watch.seen[m]) == 1 and m in self.outputs]
        self.order = [m for m in once if m is not self.block and self.outputs[m].numel()]
        own = every.get(self.block)
        self._call = ((), {}) if own is None else (own.args, own.kwargs)
        self.x = state_among(*self._call)

    def again(
        self,
        changes: Mapping[nn.Module, Change] | None = None,
        at: nn.Module | None = None,
        values: Mapping[str, Tensor] | None = None,
        read: nn.Module | None = None,
        x: Tensor | None = None,
    ) -> Tensor:
        """The state that leaves the layer, called again as it was."""
        args, kwargs = self._call
        if x is not None:
            args, kwargs = with_argument(args, kwargs, self.x, x)
        found: list[Tensor] = []

        def changed(change: Change, _: nn.Module, __: Any, output: Any) -> Any:
            return with_state(output, change(cast(Tensor, state_of(output))))

        def kept(_: nn.Module, __: Any, output: Any) -> None:
            found.append(cast(Tensor, state_of(output)).clone())

        def entered(_: nn.Module, args: Any, kwargs: Any) -> None:
            found.append(cast(Tensor, state_among(args, kwargs)).clone())

        with ExitStack() as stack:
            for module, change in (changes or {}).items():
                hook = partial(changed, change)
                stack.callback(module.register_forward_hook(hook).remove)
            if at is not None:
                stack.callback(at.register_forward_pre_hook(entered, with_kwargs=True).remove)
            if read is not None:
                stack.callback(read.register_forward_hook(kept).remove)

            def run(*args: Any, **kwargs: Any) -> Any:
                return functional_call(self.block, dict(values or {}), args, kwargs)

            stacks = [s for s in self.structure.stacks if self.n in s.layers and not s.adds]
            if stacks:
                out: Any = stacks[0].scheme.step([run], args[0], stacks[0].step)
            else:
                out = state_of(run(*args, **kwargs))
        return found[-1] if found else cast(Tensor, out)

    def follows(self, before: nn.Module, module: nn.Module) -> bool:
        """Tells whether a module is given what another one returned: that very tensor."""
        given, left = self.calls[module], state_of(self.calls[before].output)
        return left is not None and left is state_among(given.args, given.kwargs)

    def without(self, silent: Collection[nn.Module], at: nn.Module | None = None) -> Tensor:
        """The state that leaves with zeros in place of what these modules return."""
        key = frozenset(silent), at
        if key not in self._without:
            self._without[key] = self.again(dict.fromkeys(silent, torch.zeros_like), at)
        return self._without[key]

    def passed(
        self,
        module: nn.Module,
        silent: Collection[nn.Module] = (),
        at: nn.Module | None = None,
        *,
        clipped: bool = True,
    ) -> End | None:
        """The end x = y + gain ⊙ m, if noise added to what a module returns comes out so."""
        m, out = self.outputs[module], self.without(silent, at)
        axis = axis_of(module, m)
        own = (-1, 1) if axis is None else (axis,)
        run: Change = partial(self.added, module, silent, at=at)
        for axes in dict.fromkeys((k, s) for k in own for s in (k, -1, 1)):
            if not (m.dim() > 1 < out.dim() and m.shape[axes[0]] == out.shape[axes[1]]):
                continue
            if _rows(out, axes[1]).shape != _rows(m, axes[0]).shape:
                continue
            gain = _gain(run, out, m, axes)
            if gain is None and clipped and bool(out.min() >= 0):
                gain = _gain(run, out, m, axes, 10 * float(out.max() + m.abs().max()))
            if gain is not None:
                return End(self.names[module], module, None, *axes, gain)
        return None

    def added(
        self,
        module: nn.Module,
        silent: Collection[nn.Module],
        noise: Tensor,
        at: nn.Module | None = None,
    ) -> Tensor:
        """The state that leaves with something added to what a module returns."""
        changes: dict[nn.Module, Change] = dict.fromkeys(silent, torch.zeros_like)
        return self.again(changes | {module: partial(torch.add, noise)}, at)


def _gain(
    run: Change, out: Tensor, m: Tensor, axes: tuple[int, int], far: float = 0.0
) -> Tensor | None:
    """The factor per channel with which noise added to m comes out; None where there is more."""
    noise = torch.randn(m.shape, generator=torch.Generator().manual_seed(0)).to(m)
    shape = [1] * m.dim()
    shape[axes[0]] = -1
    size = float(out.double().square().mean().sqrt()) or 1.0
    gain = torch.ones(m.shape[axes[0]], dtype=torch.float64, device=m.device)
    before = _rows(run(torch.full_like(m, far)) if far else out, axes[1])
    for _ in range(2):  # again with noise that comes out as large as the state is
        added = noise * (size / gain).reshape(shape).to(m)
        other = run(added + far)
        if other.shape != out.shape:
            return None
        change, given = _rows(other, axes[1]) - before, _rows(added, axes[0])
        gain = (change * given).sum(0) / given.square().sum(0)
        if bool((gain == 0).any()) or not bool(gain.isfinite().all()):
            return None
        apart = (change - gain * given).abs().max()
        largest = float(before.abs().max() + change.abs().max())
        if not bool(apart <= slack_of(m.dtype) * largest):
            return None
    # A plain sum has this gain, and not what its rounding says.
    near = (gain - 1).abs().max() <= math.sqrt(torch.finfo(m.dtype).eps)
    return torch.ones_like(gain) if near else gain


def channels_of(module: nn.Module) -> int:
    """The channels d of a module whose output a map can be folded into; 0 of another."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
        return 0
    if isinstance(module, nn.Linear | nn.Conv2d):
        return weight.shape[0]
    if is_transposed(module):
        return weight.shape[1]
    return len(weight) if weight.dim() == 1 else 0


def is_transposed(module: nn.Module) -> bool:
    """Tells whether its weight is [in, out], as a Conv1D's of transformers."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def axis_of(module: nn.Module, m: Tensor) -> int | None:
    """The dimension of m in which the channels of a module are; None where it has none."""
    channels = channels_of(module)
    images = isinstance(module, nn.Conv2d | nn.GroupNorm | _BatchNorm)
    axes = (1,) if images else (-1, 1)
    return next((k for k in axes if m.dim() > 1 and m.shape[k] == channels), None)
