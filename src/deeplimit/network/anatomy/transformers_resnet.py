"""ResNets of transformers that classify images."""

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn

from deeplimit.network.anatomy.block_anatomy import Container
from deeplimit.network.anatomy.registry import register
from deeplimit.network.anatomy.transformers_anatomy import TransformersAnatomy


@register("transformers.ResNetForImageClassification")
class ResNetAnatomy(TransformersAnatomy):
    """The states are what the activations after the additions let out; the head reads their mean.

    A stage starts with a layer that changes the shape, but for the first stage of a basic ResNet,
    whose last layer cannot be removed either: transformers builds no empty stage.
    """

    may_be_empty = False

    @property
    def containers(self) -> Sequence[Container]:
        """`resnet.encoder.stages[m].layers`."""
        return [stage.layers for stage in self.backbone.encoder.stages]

    def changes_shape(self, block: nn.Module) -> bool:
        """Whether the layer has a projection for shortcut."""
        return not isinstance(getattr(block, "shortcut", nn.Identity()), nn.Identity)

    def shortcut(self, block: nn.Module, x: Tensor) -> Tensor:
        """σ(projection(x))."""
        layer = cast(Any, block)
        return layer.activation(layer.shortcut(x))

    def head(self, x: Tensor) -> Tensor:
        """Mean over pixels, linear layer."""
        return self.model.classifier(self.backbone.pooler(x))

    def branch_ends(self, block: nn.Module) -> list[nn.Parameter]:
        """The last norm."""
        return list(cast(Any, block).layer[-1].normalization.parameters())

    def set_depth(self, config: Any, kept: list[list[int]]) -> None:
        """`depths`."""
        config.depths = [len(mine) for mine in kept]
