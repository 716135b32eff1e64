"""Image classifiers of torchvision: ResNet, ResNeXt, Wide ResNet, ConvNeXt, vision transformer."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from deeplimit.network.anatomy.block_anatomy import Container
from deeplimit.network.anatomy.image_anatomy import FourLayerResNet, ImageAnatomy
from deeplimit.network.anatomy.registry import register


@register("torchvision.ResNet")
class TorchvisionResNetAnatomy(FourLayerResNet):
    """ResNet, ResNeXt and Wide ResNet are one class; it builds no stage without a block."""

    may_be_empty = False

    def head(self, x: Tensor) -> Tensor:
        """Mean over pixels, linear layer."""
        return self.model.fc(torch.flatten(self.model.avgpool(x), 1))


@register("torchvision.ConvNeXt")
class TorchvisionConvNextAnatomy(ImageAnatomy):
    """`features` holds the stem, then in turn a stage and what downsamples for the next one."""

    def branch_ends(self, block: nn.Module) -> list[nn.Parameter]:
        """The layer scale."""
        return [cast(nn.Parameter, block.layer_scale)]

    @property
    def containers(self) -> Sequence[Container]:
        """`features[1]`, `features[3]`, …."""
        return list(self.model.features[1::2])

    @property
    def end(self) -> nn.Module:
        """The last stage."""
        return self.model.features[-1]

    def carry(self, stage: int, x: Tensor) -> Tensor:
        """Through the downsampling before the next stage."""
        return self.model.features[2 * stage + 2](x)

    def head(self, x: Tensor) -> Tensor:
        """Mean over pixels, norm, linear layer."""
        return self.model.classifier(self.model.avgpool(x))


@register("torchvision.VisionTransformer")
class TorchvisionViTAnatomy(ImageAnatomy):
    """The class token, normalised, is what the head reads."""

    def branch_ends(self, block: nn.Module) -> list[nn.Parameter]:
        """The last linear layers of attention and MLP."""
        found = cast(Any, block)
        last = [layer for layer in found.mlp if isinstance(layer, nn.Linear)][-1]
        return [*found.self_attention.out_proj.parameters(), *last.parameters()]

    @property
    def image_size(self) -> tuple[int, int]:
        """The one size that the model takes."""
        return self.model.image_size, self.model.image_size

    @property
    def containers(self) -> Sequence[Container]:
        """`encoder.layers`."""
        return (self.model.encoder.layers,)

    def head(self, x: Tensor) -> Tensor:
        """Norm, class token, linear layer."""
        return self.model.heads(self.model.encoder.ln(x)[:, 0])
