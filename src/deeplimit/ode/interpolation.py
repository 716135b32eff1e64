"""The control θ(s) between the layers, θ(n h) = θ_n, and the vector field φ(·, θ(s)) it makes."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from deeplimit._anatomy import ReplayedBlock
from deeplimit.errors import InputError
from deeplimit.ode.recording import Call

INTERPOLATIONS = ("linear", "constant")
Control = dict[str, Tensor]


class Controls:
    """θ(s) on [s_n, s_{n+1}], s_n = n h: from θ_n to θ_{n+1} on a straight line, or θ_n all along.

    Parameters and, since they are part of a function in evaluation mode, floating-point buffers
    such as a batch norm's running statistics. Euler's N steps have the nodes θ_0 … θ_{N−1} only:
    θ is θ_{N−1} on the last interval. Heun's have θ_0 … θ_N. At a node θ is the limit from the
    side of the interval it is asked of.

    Args:
        blocks: the residual blocks, all of one class and of the same shapes.
        linear: piecewise linear; piecewise constant otherwise.

    Attributes:
        fixed: what is equal in all blocks, by its name in a block.

    Raises:
        InputError: buffers that cannot be interpolated differ.
    """

    def __init__(self, blocks: Sequence[nn.Module], linear: bool):
        every = [_tensors(block) for block in blocks]
        names = [n for n, first in every[0].items() if any(_differs(t[n], first) for t in every)]
        for name in names:
            if not every[0][name].is_floating_point():
                raise InputError(
                    f"the buffer {name!r} holds {every[0][name].dtype} that differ from block to "
                    "block; there is nothing between them"
                )
        self.fixed = {name: t for name, t in every[0].items() if name not in names}
        self._nodes = [{name: t[name] for name in names} for t in every]
        self._linear = linear

    def node(self, n: int) -> Control:
        """θ_n."""
        return self._nodes[n]

    def at(self, n: int, fraction: float) -> Control:
        """θ(s_n + fraction·h)."""
        left, right = self._ends(n)
        if left is right or fraction == 0:
            return left
        return {name: torch.lerp(a, right[name], fraction) for name, a in left.items()}

    def change(self, n: int) -> Control:
        """The change h θ′ inside the interval n: θ_{n+1} − θ_n, or 0."""
        left, right = self._ends(n)
        return {name: right[name] - a for name, a in left.items()}

    @property
    def size(self) -> int:
        """The numbers in one θ_n."""
        return sum(t.numel() for t in self._nodes[0].values())

    def _ends(self, n: int) -> tuple[Control, Control]:
        left = self._nodes[n]
        return left, self._nodes[n + 1] if self._linear and n + 1 < len(self._nodes) else left


class VectorField:
    """φ(x, θ) of a stage: its first block's function, with a control put in place of its own.

    Args:
        block: the first block of the stage, in evaluation mode and float64.
        controls: θ(s).
        call: what else the block is called with.
        adds: whether the block returns x + φ(x).
    """

    def __init__(self, block: nn.Module, controls: Controls, call: Call, adds: bool):
        self.controls = controls
        self._block, self._call, self._adds = block, call, adds
        if isinstance(vars(block).get("forward"), ReplayedBlock):
            del block.forward  # it has no forward-mode derivative, and here nothing is replayed

    def __call__(self, control: Control, x: Tensor) -> Tensor:
        """φ(x, θ)."""
        args, kwargs = self._call.with_state(x)
        y = functional_call(
            self._block, {**self.controls.fixed, **control}, args, kwargs, tie_weights=False
        )
        y = y[0] if isinstance(y, tuple) else y
        return y - x if self._adds else y


class PlainBatchNorm(TorchFunctionMode):
    """Batch norms by their formula: torch's have no derivative in their running statistics."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        own = _batch_norm if func is F.batch_norm else func
        return own(*args, **(kwargs or {}))


def _batch_norm(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """As `torch.nn.functional.batch_norm` in evaluation mode."""
    shape = (1, -1, *(1,) * (input.dim() - 2))
    scale = (running_var + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    y = (input - running_mean.view(shape)) * scale.view(shape)
    return y if bias is None else y + bias.view(shape)


def _tensors(block: nn.Module) -> Control:
    """Parameters and buffers, one that has several names under each of them.

    How many batches a norm has seen is no part of the function.
    """
    parameters = block.named_parameters(remove_duplicate=False)
    buffers = block.named_buffers(remove_duplicate=False)
    every: Iterable[tuple[str, Tensor]] = chain(parameters, buffers)
    return {n: t.detach() for n, t in every if not n.endswith("num_batches_tracked")}


def _differs(a: Tensor, b: Tensor) -> bool:
    return a is not b and not torch.equal(a, b)
