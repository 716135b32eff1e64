"""Residual functions φ(x, θ), all equilibria-preserving: φ = 0 when the last layer's are 0.

A layer whose control vanishes then leaves the state alone, so that the turnpike is an equilibrium
of the network ([PF24] arXiv 2405.19013).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deeplimit._anatomy.chain import layers_of
from deeplimit.errors import InputError

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "silu": nn.SiLU,
}


def _group_norm(channels: int) -> nn.Module:
    groups = next(g for g in (8, 4, 2, 1) if channels % g == 0)
    return nn.GroupNorm(groups, channels)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "group": _group_norm,
    "none": nn.Identity,
}


Entry = TypeVar("Entry")


def choose(table: Mapping[str, Entry], name: str, what: str) -> Entry:
    """The entry of a table, or an error that lists the names it has."""
    if name not in table:
        raise InputError(f"{what} is {name!r}; expected one of {', '.join(table)}")
    return table[name]


class LinearResidual(nn.Linear):
    """φ(x, θ) = θ x, with θ of shape [d, d] (`weight`). x: [..., d]."""

    def __init__(self, width: int):
        super().__init__(width, width, bias=False)


class TwoLayerResidual(nn.Module):
    """φ(x, θ) = V σ(W x + b): a layer of `hidden` particles (u_i, w_i, b_i). x: [..., d].

    W [hidden, d] and b [hidden] are `inner`, V [d, hidden] is `outer`; V = 0 gives φ = 0.

    Args:
        width: d, the size of the state.
        hidden: number of particles.
        activation: σ, a name in ACTIVATIONS.
    """

    def __init__(self, width: int, hidden: int, activation: str = "relu"):
        super().__init__()
        self.inner = nn.Linear(width, hidden)
        self.activation = choose(ACTIVATIONS, activation, "the activation")()
        self.outer = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """φ(x)."""
        y: Tensor = self.outer(self.activation(self.inner(x)))
        return y


class ConvolutionalResidual(nn.Module):
    """φ(x, θ) = norm(conv(σ(norm(conv x)))), 3×3 convolutions. x: [B, C, H, W].

    With a norm its last scale and bias decide: both 0 give φ = 0. Without a norm ("none") the last
    convolution, which has a bias then, does.

    Args:
        channels: C, the channels of the state.
        hidden: channels in between.
        norm: "batch", "group" or "none".
        activation: σ, a name in ACTIVATIONS.
    """

    def __init__(self, channels: int, hidden: int, norm: str = "batch", activation: str = "relu"):
        super().__init__()
        make_norm = choose(NORMS, norm, "the norm")
        bias = norm == "none"
        self.conv1 = nn.Conv2d(channels, hidden, 3, padding=1, bias=bias)
        self.norm1 = make_norm(hidden)
        self.activation = choose(ACTIVATIONS, activation, "the activation")()
        self.conv2 = nn.Conv2d(hidden, channels, 3, padding=1, bias=bias)
        self.norm2 = make_norm(channels)

    def forward(self, x: Float[Tensor, "batch c h w"]) -> Float[Tensor, "batch c h w"]:
        """φ(x)."""
        y: Tensor = self.norm2(self.conv2(self.activation(self.norm1(self.conv1(x)))))
        return y


@torch.no_grad()
def rescale_last_layer(block: nn.Module, factor: float) -> None:
    """Multiplies φ by a factor: the parameters of the block's last layer, a norm or not."""
    for parameter in layers_of(block)[-1].parameters(recurse=False):
        parameter.mul_(factor)


def parameter_groups(blocks: Sequence[nn.Module]) -> dict[str, tuple[nn.Parameter, ...]]:
    """For each parameter's name within a block that parameter of every block, in order."""
    every = [dict(block.named_parameters()) for block in blocks]
    for n, own in enumerate(every):
        unlike = (
            f"the parameter {other} {list(q.shape)} where block {n} has {name} {list(p.shape)}"
            for (name, p), (other, q) in zip(own.items(), every[0].items(), strict=False)
            if name != other or p.shape != q.shape
        )
        counts = f"{len(every[0])} parameters, block {n} has {len(own)}"
        what = next(unlike, counts if len(own) != len(every[0]) else None)
        if what is not None:
            raise InputError(
                f"block 0 has {what}; expected blocks whose parameters have the same names and "
                "shapes"
            )
        check_values((f"{n}.{name}", p) for name, p in own.items())
    return {name: tuple(own[name] for own in every) for name in (every[0] if every else ())}


def check_values(named: Iterable[tuple[str, Tensor]]) -> None:
    """Raises InputError where a parameter is on the meta device or not finite."""
    for name, parameter in named:
        if parameter.is_meta:
            raise InputError(
                f"the parameter {name} is on the meta device and has no values; load the model's "
                "weights, or build it on the CPU"
            )
        if not bool(torch.isfinite(parameter).all()):
            raise InputError(
                f"the parameter {name} has numbers that are not finite; take weights from before "
                "the training diverged"
            )
