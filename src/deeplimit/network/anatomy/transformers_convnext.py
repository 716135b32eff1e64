"""ConvNeXt and ConvNeXt V2 of transformers that classify images."""

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn

from deeplimit.network.anatomy.block_anatomy import Container
from deeplimit.network.anatomy.registry import register
from deeplimit.network.anatomy.transformers_anatomy import TransformersAnatomy


@register(
    "transformers.ConvNextForImageClassification", "transformers.ConvNextV2ForImageClassification"
)
class ConvNextAnatomy(TransformersAnatomy):
    """A downsampling layer stands before each stage but the first; a stage may be empty."""

    @property
    def containers(self) -> Sequence[Container]:
        """`convnext.encoder.stages[m].layers`."""
        return [stage.layers for stage in self.backbone.encoder.stages]

    @property
    def end(self) -> nn.Module:
        """The last stage."""
        return self.backbone.encoder.stages[-1]

    def carry(self, stage: int, x: Tensor) -> Tensor:
        """Through the next stage's downsampling layer."""
        for module in self.backbone.encoder.stages[stage + 1].downsampling_layer.children():
            x = module(x)
        return x

    def head(self, x: Tensor) -> Tensor:
        """Mean over pixels, norm, linear layer."""
        return self.model.classifier(self.backbone.layernorm(x.mean([-2, -1])))

    def branch_ends(self, block: nn.Module) -> list[nn.Parameter]:
        """The layer scale; where there is none, as in V2, the last linear layer."""
        scale = getattr(block, "layer_scale_parameter", None)
        last = cast(nn.Module, block.pwconv2)
        return list(last.parameters()) if scale is None else [cast(nn.Parameter, scale)]

    def set_depth(self, config: Any, kept: list[list[int]]) -> None:
        """`depths`."""
        config.depths = [len(mine) for mine in kept]
