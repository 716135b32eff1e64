"""Whole models for the built-in recipes: stem → chains joined by projection shortcuts → head."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn

from deeplimit._anatomy.chain import SCHEMES, ResidualChain, Stack
from deeplimit._anatomy.evaluation import Inputs
from deeplimit._anatomy.of_blocks import OfBlocks
from deeplimit._anatomy.read_model import register
from deeplimit._anatomy.stacks import Block, itself
from deeplimit.errors import InputError
from deeplimit.network.blocks import (
    ACTIVATIONS,
    NORMS,
    ConvolutionalResidual,
    LinearResidual,
    TwoLayerResidual,
    choose,
    rescale_last_layer,
)
from deeplimit.network.shape import Kind, check_shape

ROUNDING = 2.0**-16  # of the standard deviation; what a stored mean may be off by


@dataclass(frozen=True)
class Architecture:
    """Everything needed to build a `ResidualClassifier`; plain values, kept beside its weights.

    Attributes:
        kind: "logit" (state = logits, constant width C), "vector" (constant width d, shared head)
            or "convolutional" (stem, one or several stages, pooled linear head).
        shape: shape of one input sample, (features,) or (channels, height, width).
        classes: C.
        depths: residual steps per stage; one stage for "logit" and "vector".
        width: d, or the channels of the first stage; each later stage doubles them and halves the
            resolution. C for "logit".
        hidden: particles (or hidden channels) per residual function; 0 for linear residuals. In
            stage m of a convolutional network it grows with the channels.
        activation, norm: names in blocks.ACTIVATIONS, blocks.NORMS (convolutional only).
        step: step size h.
        scheme: "euler" or "heun".
        reduction: how much the stem of a convolutional network shrinks the image, 1, 2, 4, ….
    """

    kind: str
    shape: tuple[int, ...]
    classes: int
    depths: tuple[int, ...]
    width: int
    hidden: int
    activation: str = "relu"
    norm: str = "batch"
    step: float = 1.0
    scheme: str = "euler"
    reduction: int = 4

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        object.__setattr__(self, "depths", tuple(self.depths))
        if self.kind not in get_args(Kind):
            raise InputError(
                f"the kind of network is {self.kind!r}; expected {', '.join(get_args(Kind))}"
            )
        if self.classes < 2:
            raise InputError(f"{self.classes} classes given; a classifier needs at least 2")
        if len(self.shape) not in (1, 3):
            raise InputError(
                f"samples of shape {self.shape} given; expected (features,) or "
                "(channels, height, width): reshape the data"
            )
        if self.kind == "convolutional" and len(self.shape) != 3:
            raise InputError(
                f"a convolutional network needs images (channels, height, width), the data has "
                f"samples of shape {self.shape}; use the kind 'vector'"
            )
        if self.kind == "logit" and self.width != self.classes:
            raise InputError(
                f"the state of a logit network is its logits: width {self.width} must be the "
                f"number of classes, {self.classes}"
            )
        sizes = {name: getattr(self, name) for name in ("width", "hidden", "reduction", "step")}
        check_shape(self.kind, self.depths, **sizes)

    def build(self) -> "ResidualClassifier":
        """A new network, initialised from torch's global random state."""
        return ResidualClassifier(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


class Standardise(nn.Module):
    """x ↦ (x − mean) / std, per feature or per channel; the figures are stored with the model.

    Inputs in float64 are standardised in it and go on in the precision of std. Where the mean is
    far larger than std, what its rounding leaves out is stored in a second buffer, `rest`.

    Args:
        shape: of mean and std: (d,) or (C, H, W) per feature, (C, 1, 1) per channel.
    """

    mean: Tensor
    std: Tensor
    rest: Tensor | None

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("std", torch.ones(shape))
        self.register_buffer("rest", None)

    def set(self, mean: Tensor, std: Tensor) -> None:
        """Takes over mean and standard deviation; figures per channel serve all its features."""
        for own, given in ((self.mean, mean), (self.std, std)):
            per_channel = own.dim() == 3 and given.dim() == 1
            own.copy_(given[:, None, None] if per_channel else given)
        rest = mean - self.mean if mean.shape == self.mean.shape else torch.zeros(())
        self.rest = rest.to(self.mean) if bool((rest.abs() > ROUNDING * self.std).any()) else None

    def forward(self, x: Tensor) -> Tensor:
        """Standardised x."""
        x = x - self.mean if self.rest is None else x - self.mean - self.rest
        return (x / self.std).to(self.std.dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if f"{prefix}mean" in state_dict:
            self.rest = torch.zeros_like(self.mean) if f"{prefix}rest" in state_dict else None
        super()._load_from_state_dict(state_dict, prefix, *args)


class Projection(nn.Sequential):
    """The shortcut between two stages: a strided 1×1 convolution to twice the channels, and a norm.

    All that happens between the stages, so that a state of an earlier stage is carried past the
    later ones by these alone ([PHFF25] arXiv 2506.21453).
    """

    def __init__(self, channels: int, norm: str):
        super().__init__(
            nn.Conv2d(channels, 2 * channels, 1, stride=2, bias=norm == "none"),
            choose(NORMS, norm, "the norm")(2 * channels),
        )


class ResidualClassifier(nn.Module):
    """stem → stage 0 → projection 0 → stage 1 → … → head.

    Each stage is a `ResidualChain` whose residual functions start at φ = 0. Inputs are raw:
    standardisation is part of the stem; where a sample has as many features as the state has
    numbers the standardised sample is the state x_0, otherwise a linear layer maps it there.
    """

    def __init__(self, architecture: Architecture):
        super().__init__()
        a = self.architecture = architecture
        self.stem = _stem(a)
        self.stages = nn.ModuleList(_stage(a, m) for m in range(len(a.depths)))
        self.projections = nn.ModuleList(
            Projection(a.width * 2**m, a.norm) for m in range(len(a.depths) - 1)
        )
        self.head = _head(a)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, C] of a batch of raw inputs [B, *shape]."""
        x = self.stem(x)
        for m, stage in enumerate(self.stages):
            if m > 0:
                x = self.projections[m - 1](x)
            x = stage(x)
        logits: Tensor = self.head(x)
        return logits

    def standardise(self, mean: Tensor, std: Tensor) -> "ResidualClassifier":
        """Stores the data's mean and standard deviation in the stem; returns self.

        Per feature, [d] or [C, H, W], or for images per channel, [C]; convolutional networks keep
        figures per channel only.
        """
        for module in self.stem.modules():
            if isinstance(module, Standardise):
                module.set(mean, std)
        return self

    def without(self, removed: Iterable[int]) -> "ResidualClassifier":
        """The same network less some of its residual steps, counted through all stages."""
        return cast(ResidualClassifier, ResidualClassifierAnatomy(self).without(removed))


def _stem(a: Architecture) -> nn.Sequential:
    if a.kind == "convolutional":
        layers: list[nn.Module] = [Standardise((a.shape[0], 1, 1))]
        channels = a.shape[0]
        for _ in range(max(int(math.log2(a.reduction)), 1)):
            if len(layers) > 1:
                layers.append(choose(ACTIVATIONS, a.activation, "the activation")())
            stride = 1 if a.reduction == 1 else 2
            bias = a.norm == "none"
            layers.append(nn.Conv2d(channels, a.width, 3, stride, padding=1, bias=bias))
            layers.append(choose(NORMS, a.norm, "the norm")(a.width))
            channels = a.width
        return nn.Sequential(*layers)
    features = math.prod(a.shape)
    flat = [nn.Flatten()] if len(a.shape) == 3 else []
    embed = [nn.Linear(features, a.width)] if features != a.width else []
    return nn.Sequential(Standardise(a.shape), *flat, *embed)


def _stage(a: Architecture, m: int) -> ResidualChain:
    scheme = choose(SCHEMES, a.scheme, "the scheme")
    width, hidden = a.width * 2**m, a.hidden * 2**m
    depth = a.depths[m]

    def block() -> nn.Module:
        if a.kind == "convolutional":
            return ConvolutionalResidual(width, hidden or width, a.norm, a.activation)
        if a.hidden == 0:
            return LinearResidual(width)
        return TwoLayerResidual(width, hidden, a.activation)

    blocks = [block() for _ in range(depth + scheme.nodes - 1)]
    for residual in blocks:
        # Every layer starts as the identity: what training leaves alone stays an equilibrium, and
        # the start does not depend on the horizon.
        rescale_last_layer(residual, 0.0)
    return ResidualChain(blocks, step=a.step, scheme=scheme)


def _head(a: Architecture) -> nn.Module:
    if a.kind == "logit":
        return nn.Identity()
    if a.kind == "vector":
        return nn.Linear(a.width, a.classes)
    channels = a.width * 2 ** (len(a.depths) - 1)
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, a.classes))


@register(ResidualClassifier)
class ResidualClassifierAnatomy(OfBlocks):
    """Several chains between a stem and a head."""

    model: ResidualClassifier

    @property
    def _blocks(self) -> Sequence[Block]:
        stages = self.model.stages
        return [Block(chain, stages, m, itself) for m, chain in enumerate(stages)]

    @property
    def stem_and_head(self) -> tuple[nn.Module, nn.Module]:
        """Those of the classifier."""
        return self.model.stem, self.model.head

    def example(self) -> Inputs | None:
        """A sample of zeros."""
        return torch.zeros(1, *self.model.architecture.shape)

    def with_stacks(self, stacks: Sequence[Stack], neurons: int | None = None) -> nn.Module:
        """A classifier with chains over other blocks; its architecture says their depths."""
        other, a = cast(ResidualClassifier, super().with_stacks(stacks)), self.model.architecture
        hidden = a.hidden if neurons in (None, a.hidden or a.width) else neurons
        other.architecture = replace(other.architecture, hidden=hidden, step=stacks[0].step)
        return other

    def _with(self, chains: Iterable[ResidualChain]) -> nn.Module:
        chains = list(chains)
        other = cast(ResidualClassifier, super()._with(chains))
        depths = tuple(chain.horizon for chain in chains)
        other.architecture = replace(other.architecture, depths=depths)
        return other
