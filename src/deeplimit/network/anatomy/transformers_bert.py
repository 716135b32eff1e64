"""BERT of transformers that classifies texts."""

from collections.abc import Sequence

from torch import Tensor, nn

from deeplimit.errors import InputError
from deeplimit.network.anatomy.block_anatomy import Container
from deeplimit.network.anatomy.registry import register
from deeplimit.network.anatomy.transformers_anatomy import OneStack


@register("transformers.BertForSequenceClassification")
class BertAnatomy(OneStack):
    """The head reads the first token through the pooler; every block ends in a norm."""

    @property
    def containers(self) -> Sequence[Container]:
        """`bert.encoder.layer`."""
        return (self.backbone.encoder.layer,)

    def branch_ends(self, block: nn.Module) -> list[nn.Parameter]:
        """None: the norm behind each addition would not let the state through.

        Raises:
            InputError: always.
        """
        raise InputError(
            f"{type(self.model).__name__} has a norm behind every addition, so that a layer is not "
            "a step of an ODE, whatever is scaled; its depth cannot be changed. tie and untie work"
        )

    def head(self, x: Tensor) -> Tensor:
        """Pooler, dropout, linear layer."""
        return self.model.classifier(self.model.dropout(self.backbone.pooler(x)))
