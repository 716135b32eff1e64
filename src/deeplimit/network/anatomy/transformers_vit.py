"""Vision transformers of transformers that classify images: ViT and DINOv2."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from deeplimit.network.anatomy.block_anatomy import Container
from deeplimit.network.anatomy.registry import register
from deeplimit.network.anatomy.transformers_anatomy import OneStack


@register("transformers.ViTForImageClassification")
class ViTAnatomy(OneStack):
    """The class token, normalised, is what the head reads."""

    ends = ("attention.o_proj", "mlp.fc2")

    @property
    def containers(self) -> Sequence[Container]:
        """`vit.layers`; `vit.encoder.layer` before transformers 5."""
        backbone = self.backbone
        return (backbone.layers if hasattr(backbone, "layers") else backbone.encoder.layer,)

    def branch_ends(self, block: nn.Module) -> list[nn.Parameter]:
        """The last linear layers of attention and MLP, `output.dense` before transformers 5."""
        if hasattr(block, "mlp"):
            return super().branch_ends(block)
        old = (block.get_submodule(path) for path in ("attention.output.dense", "output.dense"))
        return [p for linear in old for p in linear.parameters()]

    def head(self, x: Tensor) -> Tensor:
        """Norm, class token, linear layer."""
        return self.model.classifier(self.backbone.layernorm(x)[:, 0])


@register("transformers.Dinov2ForImageClassification")
class Dinov2Anatomy(OneStack):
    """The head reads the class token beside the mean of the patches."""

    ends = ("layer_scale1", "layer_scale2")

    @property
    def containers(self) -> Sequence[Container]:
        """`dinov2.encoder.layer`."""
        return (self.backbone.encoder.layer,)

    def head(self, x: Tensor) -> Tensor:
        """Norm, class token and mean patch, linear layer."""
        x = self.backbone.layernorm(x)
        return self.model.classifier(torch.cat([x[:, 0], x[:, 1:].mean(dim=1)], dim=1))
