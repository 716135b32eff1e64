"""The CIFAR ResNet of He et al. 2015 (arXiv 1512.03385, section 4.2), option A shortcuts.

Weights with keys `conv1.weight`, `bn1.*`, `layer{1,2,3}.{i}.{conv1,bn1,conv2,bn2}.*`, `linear.*`
load as they are (the layout of pytorch_resnet_cifar10).
"""

import copy
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deeplimit._anatomy.anatomy import Layer
from deeplimit._anatomy.evaluation import Inputs
from deeplimit._anatomy.of_blocks import OfBlocks
from deeplimit._anatomy.read_model import register
from deeplimit._anatomy.stacks import Block, itself
from deeplimit.errors import InputError
from deeplimit.network.shape import check_shape
from deeplimit.network.weights import read_safetensors

CHANNELS = (16, 32, 64)


@dataclass(frozen=True)
class CifarArchitecture:
    """The values that a `CifarResNet` is built from.

    Attributes:
        depths: residual blocks in each of the three stages; (n, n, n) is ResNet-(6n + 2).
        strided: whether stages 1 and 2 (of 0, 1, 2) begin with a residual block across the change
            of shape, as published; without it the shortcut alone stands there.
        classes: number of classes.
        mean, std: standardisation of RGB values in [0, 1].
    """

    depths: tuple[int, ...] = (9, 9, 9)
    strided: tuple[bool, ...] = (True, True)
    classes: int = 10
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        for name in ("depths", "strided", "mean", "std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        check_shape("cifar-resnet", self.depths)
        if len(self.strided) != 2:
            raise InputError(f"strided {self.strided} given; expected two, of stages 1 and 2")
        if any(self.strided[m - 1] and self.depths[m] == 0 for m in (1, 2)):
            raise InputError(f"a stage of 0 blocks cannot begin with one: depths {self.depths}")

    def build(self) -> "CifarResNet":
        """A new network, initialised from torch's global random state."""
        return CifarResNet(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


class Shortcut(nn.Module):
    """Option A: every second pixel, new channels zero, half of them on each side; no parameters."""

    def __init__(self, channels: int, new_channels: int):
        super().__init__()
        self.padding = (new_channels - channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        """The state in the shape of the next stage."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))


class BasicBlock(nn.Module):
    """ReLU(x + bn2(conv2(ReLU(bn1(conv1 x))))), x through `shortcut` where the shape changes."""

    def __init__(self, channels: int, new_channels: int):
        super().__init__()
        changes = channels != new_channels
        self.conv1 = nn.Conv2d(
            channels, new_channels, 3, stride=2 if changes else 1, padding=1, bias=False
        )
        self.bn1 = nn.BatchNorm2d(new_channels)
        self.conv2 = nn.Conv2d(new_channels, new_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(new_channels)
        self.shortcut = Shortcut(channels, new_channels) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """The next state."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class CifarResNet(nn.Module):
    """conv1, bn1, ReLU, three stages of `BasicBlock`s at 16, 32, 64 channels, pool, linear."""

    mean: Tensor
    std: Tensor

    def __init__(self, architecture: CifarArchitecture | None = None):
        super().__init__()
        a = self.architecture = architecture or CifarArchitecture()
        self.register_buffer("mean", torch.tensor(a.mean).reshape(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(a.std).reshape(3, 1, 1), persistent=False)
        self.conv1 = nn.Conv2d(3, CHANNELS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(CHANNELS[0])
        self.layer1 = nn.Sequential(*(BasicBlock(16, 16) for _ in range(a.depths[0])))
        self.layer2 = self._stage(1)
        self.layer3 = self._stage(2)
        self.linear = nn.Linear(CHANNELS[-1], a.classes)

    def _stage(self, m: int) -> nn.Sequential:
        a, old, new = self.architecture, CHANNELS[m - 1], CHANNELS[m]
        first: nn.Module = BasicBlock(old, new) if a.strided[m - 1] else Shortcut(old, new)
        rest = a.depths[m] - a.strided[m - 1]
        return nn.Sequential(first, *(BasicBlock(new, new) for _ in range(rest)))

    @property
    def stages(self) -> tuple[nn.Sequential, ...]:
        """The three stages."""
        return self.layer1, self.layer2, self.layer3

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, classes] of RGB images in [0, 1], [B, 3, H, W]."""
        x = F.relu(self.bn1(self.conv1((x - self.mean) / self.std)))
        for stage in self.stages:
            x = stage(x)
        return self.head(x)

    def head(self, x: Tensor) -> Tensor:
        """Logits of a state of the last stage."""
        logits: Tensor = self.linear(x.mean(dim=(2, 3)))
        return logits

    def standardise(self, mean: Tensor, std: Tensor) -> "CifarResNet":
        """Stores the data's mean and standard deviation, per channel; returns self."""
        self.mean.copy_(mean.reshape(3, 1, 1))
        self.std.copy_(std.reshape(3, 1, 1))
        self.architecture = replace(
            self.architecture,
            mean=tuple(mean.flatten().tolist()),
            std=tuple(std.flatten().tolist()),
        )
        return self

    def without(self, removed: set[int]) -> "CifarResNet":
        """The same network less some of its blocks, counted through all stages."""
        counts = [n not in removed for n in range(sum(self.architecture.depths))]
        return self._with_counts(counts)

    def _with_counts(self, counts: Sequence[int]) -> "CifarResNet":
        """A network with block n counts[n] times; in place of a strided one stands its shortcut."""
        other, left = copy.copy(self), iter(counts)
        other._modules = dict(self._modules)
        for m, stage in enumerate(self.stages, 1):
            blocks: list[nn.Module] = []
            for block in stage:
                count = next(left) if isinstance(block, BasicBlock) else 1
                if not count and isinstance(block.shortcut, Shortcut):
                    blocks.append(block.shortcut)
                blocks += [block, *(copy.deepcopy(block) for _ in range(count - 1))][:count]
            other._modules[f"layer{m}"] = rest = nn.Sequential(*blocks)
            rest.training = stage.training
        own = [[isinstance(block, BasicBlock) for block in stage] for stage in other.stages]
        other.architecture = replace(
            self.architecture,
            depths=tuple(map(sum, own)),
            strided=tuple(bool(blocks) and blocks[0] for blocks in own[1:]),
        )
        return other

    @classmethod
    def from_weights(cls, path: str | Path) -> "CifarResNet":
        """Loads published weights; the depths are read off the keys."""
        try:
            weights, _ = read_safetensors(Path(path), "give published weights of a CIFAR ResNet")
        except InputError as error:
            raise InputError(f"not a readable safetensors file: {error}") from error
        model = cls(_architecture_of(weights, path))
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            reason = textwrap.shorten(str(error), 300)
            raise InputError(f"{path}: not the weights of a CIFAR ResNet ({reason})") from error
        return model


def _architecture_of(weights: Mapping[str, Tensor], path: str | Path) -> CifarArchitecture:
    depths = tuple(
        sum(k.startswith(f"layer{m}.") and k.endswith(".conv1.weight") for k in weights)
        for m in (1, 2, 3)
    )
    if "linear.weight" not in weights or 0 in depths:
        raise InputError(
            f"{path}: no CIFAR ResNet in it; expected the keys layer1.0.conv1.weight …"
        )
    return CifarArchitecture(depths=depths, classes=len(weights["linear.weight"]))


EXAMPLE_SIZE = (8, 8)


@register(CifarResNet)
class CifarResNetAnatomy(OfBlocks):
    """Every residual block is a layer; in place of a strided one its shortcut can stand."""

    model: CifarResNet
    rebuildable = False  # for the ReLU after every addition

    @property
    def _blocks(self) -> list[Block]:
        """The stages: each is bypassed by its shortcut, with blocks in it or not."""
        first, *others = self.model.stages
        shortcuts = map(Shortcut, CHANNELS, CHANNELS[1:])
        parts = enumerate(zip(others, shortcuts, strict=False))
        return [Block(first, self.model, 0, itself)] + [
            Block(stage, self.model, m, itself, shortcut) for m, (stage, shortcut) in parts
        ]

    @cached_property
    def _each(self) -> list[Block]:
        return [
            Block(block, stage, m - changes, itself, block.shortcut if changes else None)
            for m, stage in enumerate(self.model.stages)
            for block in stage
            if isinstance(block, BasicBlock)
            for changes in [isinstance(block.shortcut, Shortcut)]
        ]

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """The residual blocks, each of which can go."""
        return tuple(replace(layer, removable=True) for layer in super().layers)

    def leave_out(self, removed: set[int]) -> nn.Module:
        """The same class with fewer blocks."""
        return self.repeated([n not in removed for n in range(self.horizon)])

    def repeated(self, times: Sequence[int]) -> nn.Module:
        """The same class with other depths."""
        return copy.deepcopy(self.model._with_counts(times))  # noqa: SLF001

    def example(self) -> Inputs | None:
        """A random image."""
        return torch.rand(1, 3, *EXAMPLE_SIZE, generator=torch.Generator().manual_seed(0))
