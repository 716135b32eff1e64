"""Image classifiers of timm: ResNet and its kin, ConvNeXt, vision transformer."""

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn

from deeplimit.network.anatomy.block_anatomy import Container
from deeplimit.network.anatomy.image_anatomy import FourLayerResNet, ImageAnatomy
from deeplimit.network.anatomy.registry import register


def _record(model: nn.Module, **arguments: Any) -> None:
    """Where timm keeps the arguments that build the model again, the new depth beside them."""
    if hasattr(model, "_model_args"):
        cast(Any, model)._model_args = {**cast(Any, model)._model_args, **arguments}


@register("timm.ResNet")
class TimmResNetAnatomy(FourLayerResNet):
    """ResNet, ResNeXt, SE-ResNet and others whose blocks end in an activation."""

    def head(self, x: Tensor) -> Tensor:
        """The model's own: pool, linear layer."""
        return self.model.forward_head(x)

    def shortened(self, model: nn.Module, kept: list[list[int]]) -> None:
        """`layers`."""
        _record(model, layers=[len(getattr(model, f"layer{m}")) for m in range(1, 5)])


@register("timm.ConvNeXt")
class TimmConvNextAnatomy(ImageAnatomy):
    """What downsamples stands before a stage's blocks; V2 is the same class."""

    @property
    def containers(self) -> Sequence[Container]:
        """`stages[m].blocks`."""
        return [stage.blocks for stage in self.model.stages]

    def branch_ends(self, block: nn.Module) -> list[nn.Parameter]:
        """The layer scale; where there is none, the last linear layer."""
        found = cast(Any, block)
        return list(found.mlp.fc2.parameters()) if found.gamma is None else [found.gamma]

    @property
    def end(self) -> nn.Module:
        """The last stage."""
        return self.model.stages[-1]

    def carry(self, stage: int, x: Tensor) -> Tensor:
        """Through the next stage's `downsample`."""
        return self.model.stages[stage + 1].downsample(x)

    def head(self, x: Tensor) -> Tensor:
        """The model's own: pool, norm, linear layer, or the norm first."""
        return self.model.forward_head(self.model.norm_pre(x))

    def shortened(self, model: nn.Module, kept: list[list[int]]) -> None:
        """`depths`."""
        _record(model, depths=[len(mine) for mine in kept])


@register("timm.VisionTransformer")
class TimmViTAnatomy(ImageAnatomy):
    """The head is the model's own, whatever it pools."""

    @property
    def image_size(self) -> tuple[int, int]:
        """The size for which the patches were laid out."""
        return self.model.patch_embed.img_size or super().image_size

    @property
    def containers(self) -> Sequence[Container]:
        """`blocks`."""
        return (self.model.blocks,)

    def branch_ends(self, block: nn.Module) -> list[nn.Parameter]:
        """The layer scales; where there are none, the last linear layers."""
        found = cast(Any, block)
        branches = ((found.ls1, found.attn.proj), (found.ls2, found.mlp.fc2))
        return [
            p for scale, last in branches for p in list(scale.parameters()) or last.parameters()
        ]

    def head(self, x: Tensor) -> Tensor:
        """Norm, pool, linear layer."""
        return self.model.forward_head(self.model.norm(x))

    def shortened(self, model: nn.Module, kept: list[list[int]]) -> None:
        """`depth`, and the list that describes each block's output."""
        smaller = cast(Any, model)
        _record(model, depth=len(smaller.blocks))
        if len(self.model.feature_info) == len(self.model.blocks):
            features = [dict(self.model.feature_info[i]) for i in kept[0]]
            smaller.feature_info = [
                feature | {"module": f"blocks.{i}"} for i, feature in enumerate(features)
            ]
