"""Where the last branch of a block ends, found by trial, and a linear map folded into it."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from deeplimit._anatomy import Anatomy

# Of the rounding of the largest number, what a sum in another order may be off by; in half
# precision less, else everything would agree.
SLACK, HALF_SLACK = 100, 4
TRIED = 8  # modules of a block, from its end


@dataclass(frozen=True)
class End:
    """A module whose output m a block adds to the state: x = y + gain ⊙ m, or ReLU(y + m).

    Attributes:
        name: of the module, in the model.
        module: the module, with weights that nothing else uses.
        convolution: of a batch norm the convolution that it normalises, where a map can be folded
            into both; else None.
        axis: the dimension of m in which the channels are.
        state_axis: the same of the state.
        gain: per channel, float64.
        rest: what gives y where a ReLU follows: a shortcut, or the block itself (its input).
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
        """Whether a constant can be added."""
        return getattr(self.module, "bias", None) is not None

    @property
    def mixes(self) -> bool:
        """Whether channels can be mixed."""
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


def find_end(structure: Anatomy, n: int, x: Any) -> End | str:
    """The last module of layer n that can be folded into, tried on a batch; or why there is none.

    From the block's end on, those modules with a weight are tried: where random numbers added to
    its output come out of the block again, each channel times a constant, it ends a branch.
    """
    layer = structure.layers[n]
    if len(layer.controls) > 1:
        return f"the step of layer {n} uses {len(layer.controls)} blocks"
    block = layer.controls[0]
    seen = _Calls(structure.model, block)
    with seen:
        out = left(structure, n, lambda: structure.run(x))
    if out is None:
        return f"layer {n} gives no state"
    uses: dict[int, int] = {}
    for _, p in structure.model.named_parameters(remove_duplicate=False):
        uses[id(p)] = uses.get(id(p), 0) + 1
    for name, module in list(reversed(seen.order))[:TRIED]:
        own = list(module.parameters(recurse=False))
        m = seen.outputs[module]
        if seen.counts[module] > 1 or any(uses[id(p)] > 1 for p in own) or not m.numel():
            continue
        channels = _channels(module)
        if _axis(module, m, channels) is None:
            continue
        end = _tried(structure, n, x, out, name, module, seen) or _clipped(out, name, module, seen)
        if end is not None:
            return end
    return f"where the last branch of {type(block).__name__} ends is not found in its modules"


class _Calls:
    """Watches the modules with a weight inside a block, and its shortcut, in a forward."""

    def __init__(self, model: nn.Module, block: nn.Module):
        self.model, self.block = model, block
        self.order: list[tuple[str, nn.Module]] = []
        self.counts: dict[nn.Module, int] = {}
        self.outputs: dict[nn.Module, Tensor] = {}
        self.inputs: dict[nn.Module, Tensor] = {}

    def __enter__(self) -> None:
        inside = set(self.block.modules())
        self._handles = []
        for name, module in self.model.named_modules():
            if module in inside:
                hook = self._watching(name)
                self._handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _watching(self, name: str) -> Callable[..., None]:
        def called(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self.counts[module] = self.counts.get(module, 0) + 1
            given = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
            if given is not None:
                self.inputs[module] = given
            if isinstance(output, Tensor):
                self.outputs[module] = output
                if self.counts[module] == 1 and _channels(module):
                    self.order.append((name, module))

        return called


def _channels(module: nn.Module) -> int:
    """The channels d of a module whose output a map can be folded into; 0 of another."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
        return 0
    if isinstance(module, nn.Linear | nn.Conv2d):
        return weight.shape[0]
    if _transposed(module):
        return weight.shape[1]
    return len(weight) if weight.dim() == 1 else 0


def _transposed(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _axis(module: nn.Module, m: Tensor, channels: int) -> int | None:
    images = isinstance(module, nn.Conv2d | nn.GroupNorm | _BatchNorm)
    axes = (1,) if images else (-1, 1)
    return next((k for k in axes if m.dim() > 1 and m.shape[k] == channels), None)


class _LeftError(Exception):
    """The state wanted has left its layer; what follows need not run."""


def left(structure: Anatomy, n: int, run: Callable[[], Any]) -> Tensor | None:
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


def _tried(
    structure: Anatomy, n: int, x: Any, out: Tensor, name: str, module: nn.Module, seen: _Calls
) -> End | None:
    """The end x = y + gain ⊙ m, if noise added to m comes out of the block so."""
    m = seen.outputs[module]
    axis = cast(int, _axis(module, m, _channels(module)))
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(m.shape, generator=generator).to(m)
    shape = [1] * m.dim()
    shape[axis] = -1
    size = float(out.double().square().mean().sqrt()) or 1.0
    gain = torch.ones(m.shape[axis], dtype=torch.float64, device=m.device)
    for _ in range(2):  # again with noise that comes out as large as the state is
        added = noise * (size / gain).reshape(shape).to(m)
        with _adding(module, added):
            other = left(structure, n, lambda: structure.run(x))
        if other is None:
            return None
        found: int | None = None
        given = _rows(added, axis)
        for state_axis in dict.fromkeys((axis, -1, 1)):
            if out.dim() < 2 or out.shape[state_axis] != m.shape[axis]:
                continue
            before = _rows(out, state_axis)
            if before.shape != given.shape:
                continue
            change = _rows(other, state_axis) - before
            gain = (change * given).sum(0) / given.square().sum(0)
            if bool((gain == 0).any()) or not bool(gain.isfinite().all()):
                continue
            apart = (change - gain * given).abs().max()
            if bool(apart <= _rounding(m, float(before.abs().max() + change.abs().max()))):
                found = state_axis
                break
        if found is None:
            return None
        state_found = found
    # A plain sum has this gain, and not what its rounding says.
    near = (gain - 1).abs().max() <= math.sqrt(torch.finfo(m.dtype).eps)
    gain = torch.ones_like(gain) if near else gain
    return End(name, module, _convolution(module, seen), axis, state_found, gain)


def _clipped(out: Tensor, name: str, module: nn.Module, seen: _Calls) -> End | None:
    """The end x = ReLU(y + m), with y the block's input or its shortcut's output."""
    m = seen.outputs[module]
    if m.shape != out.shape or bool(out.min() < 0):
        return None
    block = seen.block
    shortcuts = [getattr(block, k, None) for k in ("downsample", "shortcut")]
    given = [(s, seen.outputs.get(s)) for s in shortcuts if isinstance(s, nn.Module)]
    for rest, y in [*given, (block, seen.inputs.get(block))]:
        if y is None or y.shape != m.shape or rest is module:
            continue
        apart = float(((y + m).relu() - out).abs().max())
        if apart <= _rounding(m, float(out.max())):
            axis = cast(int, _axis(module, m, _channels(module)))
            gain = torch.ones(m.shape[axis], dtype=torch.float64, device=m.device)
            return End(name, module, _convolution(module, seen), axis, axis, gain, rest)
    return None


def _convolution(module: nn.Module, seen: _Calls) -> nn.Conv2d | None:
    """What a batch norm normalises by its running statistics, if that is a convolution's output."""
    if not isinstance(module, _BatchNorm) or module.running_mean is None:
        return None
    given = seen.inputs.get(module)
    for name, before in seen.order:
        alone = seen.counts[before] == 1 and isinstance(before, nn.Conv2d)
        if alone and name and seen.outputs[before] is given:
            return cast(nn.Conv2d, before)
    return None


def _rounding(m: Tensor, largest: float) -> float:
    slack = HALF_SLACK if m.dtype.itemsize < 4 else SLACK
    return slack * torch.finfo(m.dtype).eps * largest


@contextmanager
def _adding(module: nn.Module, noise: Tensor) -> Iterator[None]:
    handle = module.register_forward_hook(lambda _, __, output: output + noise)
    try:
        yield
    finally:
        handle.remove()


def fold(end: End, a: Tensor, c: Tensor, covariance: Tensor, offset: float = 0.0) -> None:
    """Changes an end in place so that it gives m + (a m + c) / gain in place of m.

    Of a batch norm behind a convolution the latter takes the map, and the norm's running statistics
    become those of what it normalises then, so that it can be trained on.

    Args:
        end: to be changed.
        a: [d, d], diagonal where the end does not mix channels.
        c: [d], zero where it has no bias.
        covariance: of m, [d, d].
        offset: what a norm adds to its weight before it multiplies by it.
    """
    module = cast(Any, end.module)
    t = torch.eye(len(c), dtype=a.dtype, device=a.device) + a / end.gain[:, None]
    e = c / end.gain
    weight = module.weight.double()
    if end.convolution is not None:
        _fold_convolution(module, end.convolution, t, e, covariance)
        return
    if weight.dim() == 1:
        new = (weight + offset) * t.diagonal() - offset
    elif _transposed(module):
        new = weight @ t.T
    else:
        new = torch.einsum("ij,j...->i...", t, weight)
    bias = t @ module.bias.double() + e if end.biased else None
    with torch.no_grad():
        module.weight.copy_(new)
        if bias is not None:
            module.bias.copy_(bias)


def _fold_convolution(
    norm: Any, convolution: nn.Conv2d, t: Tensor, e: Tensor, covariance: Tensor
) -> None:
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight.double()
    td = t * scale
    variance = (t @ covariance @ t.T).diagonal().clamp(min=0)
    with torch.no_grad():
        convolution.weight.copy_(torch.einsum("ij,j...->i...", td, convolution.weight.double()))
        if convolution.bias is not None:
            convolution.bias.copy_(td @ convolution.bias.double())
        norm.running_mean.copy_(td @ norm.running_mean.double())
        norm.running_var.copy_(variance)
        norm.weight.copy_((norm.running_var.double() + norm.eps).sqrt())
        norm.bias.copy_(t @ norm.bias.double() + e)
