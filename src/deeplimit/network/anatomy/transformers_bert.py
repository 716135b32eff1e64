"""BERT of transformers that classifies texts."""

from collections.abc import Sequence

from torch import Tensor

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

    def head(self, x: Tensor) -> Tensor:
        """Pooler, dropout, linear layer."""
        return self.model.classifier(self.model.dropout(self.backbone.pooler(x)))
