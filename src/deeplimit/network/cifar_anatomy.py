"""Anatomy of the CIFAR ResNet of He et al.: the states are what the blocks' last ReLU lets out."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deeplimit._anatomy.anatomy import Anatomy, Layer, StateHook
from deeplimit._anatomy.evaluation import Inputs
from deeplimit._anatomy.registry import register
from deeplimit.network.cifar_resnet import CHANNELS, BasicBlock, CifarResNet, Shortcut

EXAMPLE_SIZE = (8, 8)


@register(CifarResNet)
class CifarResNetAnatomy(Anatomy):
    """Every residual block is a layer; in place of a strided one its shortcut can stand."""

    model: CifarResNet
    stages = len(CHANNELS)
    rebuildable = False  # for the ReLU after every addition

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The residual blocks; a strided block starts from a state of the stage before it."""
        return tuple(
            Layer(m - isinstance(block.shortcut, Shortcut), (block,))
            for m, stage in enumerate(self.model.stages)
            for block in stage
            if isinstance(block, BasicBlock)
        )

    def register_state_hook(self, hook: StateHook) -> list[RemovableHandle]:
        """The inputs of the blocks, and the last stage's output."""
        horizon = self.horizon
        handles = [
            layer.controls[0].register_forward_pre_hook(lambda _, args, n=n: hook(n, args[0]))
            for n, layer in enumerate(self.layers)
        ]
        last = self.model.stages[-1]
        return [*handles, last.register_forward_hook(lambda _, args, y: hook(horizon, y))]

    def carry(self, stage: int, x: Tensor, inputs: Inputs | None = None) -> Tensor:
        """Option A: every second pixel, padded with zero channels."""
        return Shortcut(CHANNELS[stage], CHANNELS[stage + 1])(x)

    def past(self, n: int) -> Callable[[Tensor], Tensor]:
        """The block's shortcut, the state itself where the shape stays."""
        (block,) = self.layers[n].controls
        return cast(BasicBlock, block).shortcut

    def head(self, x: Tensor, inputs: Inputs | None = None) -> Tensor:
        """Pool and linear layer."""
        return self.model.head(x)

    def leave_out(self, removed: set[int]) -> nn.Module:
        """The same class with fewer blocks."""
        return copy.deepcopy(self.model.without(removed))

    def repeated(self, times: Sequence[int]) -> nn.Module:
        """The same class with other depths."""
        other = copy.deepcopy(self.model.without({n for n, count in enumerate(times) if not count}))
        counts = iter([count for count in times if count])
        for stage in other.stages:
            there: list[nn.Module] = []
            for block in stage:
                count = next(counts) if isinstance(block, BasicBlock) else 1
                there += [block, *(copy.deepcopy(block) for _ in range(count - 1))]
            stage._modules.clear()
            stage.extend(there)
        depths = tuple(sum(isinstance(b, BasicBlock) for b in stage) for stage in other.stages)
        other.architecture = replace(other.architecture, depths=depths)
        return other

    def branch_ends(self, block: nn.Module) -> list[nn.Parameter]:
        """The last norm."""
        return list(cast(BasicBlock, block).bn2.parameters())

    def example(self) -> Inputs | None:
        """A random image."""
        return torch.rand(1, 3, *EXAMPLE_SIZE, generator=torch.Generator().manual_seed(0))
