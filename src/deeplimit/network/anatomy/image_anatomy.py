"""Image classifiers without a configuration: what torchvision's and timm's have in common."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from deeplimit.network.anatomy.block_anatomy import BlockAnatomy, Container
from deeplimit.network.modes import Inputs

EXAMPLE_SIZE = 64


class ImageAnatomy(BlockAnatomy):
    """A model of images [B, C, H, W]. Nothing of its library is imported: the model brings it."""

    model: Any

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the example on which the anatomy is checked."""
        return EXAMPLE_SIZE, EXAMPLE_SIZE

    def example(self) -> Inputs | None:
        """A random image with as many channels as the first convolution takes."""
        kernel = next((p for p in self.model.parameters() if p.dim() == 4), None)
        if kernel is None:
            return None
        shape = (1, kernel.shape[1], *self.image_size)
        return torch.randn(shape, generator=torch.Generator().manual_seed(0))


class FourLayerResNet(ImageAnatomy):
    """A ResNet with its stages in `layer1` … `layer4` and projections in `downsample`.

    The states are what the activations after the additions let out.
    """

    @property
    def containers(self) -> Sequence[Container]:
        """`layer1` … `layer4`, but for those that were emptied."""
        layers = [getattr(self.model, f"layer{m}") for m in range(1, 5)]
        return [layer for layer in layers if isinstance(layer, nn.Sequential) and len(layer)]

    def changes_shape(self, block: nn.Module) -> bool:
        """Whether the block has a projection for shortcut."""
        return getattr(block, "downsample", None) is not None

    def branch_ends(self, block: nn.Module) -> list[nn.Parameter]:
        """The last norm."""
        last = cast(Any, block.bn3 if hasattr(block, "bn3") else block.bn2)
        return list(last.parameters())

    def shortcut(self, block: nn.Module, x: Tensor) -> Tensor:
        """σ(projection(x)); σ is the block's last activation, whatever its name."""
        names = ("act3", "act2", "act", "relu")
        activation = next(getattr(block, name) for name in names if hasattr(block, name))
        return activation(cast(Any, block).downsample(x))
