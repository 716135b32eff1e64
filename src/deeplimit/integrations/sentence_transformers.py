"""A stage cost for sentence encoders, in the form of the losses of sentence-transformers."""

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deeplimit._anatomy import anatomy
from deeplimit.control import StageCost
from deeplimit.errors import InputError


class StageCostLoss(nn.Module):
    """Trains an encoder whose embeddings at every depth are answers:

        ℓ(e_N, y) + γ Σ_{n=0}^{N−1} ℓ(e_n, y)

    e_n are the embeddings of the sentences with the state x_n of layer n, through whatever follows
    the layers: pooling, a dense layer, a norm. ℓ is any loss of sentence-transformers that is
    computed from embeddings. Afterwards `at_depth(model, k)` and `crop(model, k)` encode with k
    layers, the latter is saved and loaded as any model of sentence-transformers.

    Of the columns of a batch (anchors, positives, …) one batch is made, which the model sees once,
    in place of once for each and layer.

        loss = StageCostLoss(model, MultipleNegativesRankingLoss(model))
        SentenceTransformerTrainer(model=model, train_dataset=pairs, loss=loss).train()

    Args:
        model: a SentenceTransformer over a transformer, as `anatomy` reads it.
        loss: ℓ, with `compute_loss_from_embeddings`.
        weight: γ ≥ 0, per layer; by default 1/N, so that all layers before the last weigh as much
            as the last.
        layers: how many of the N layers a step takes, as of `StageCost`; by default all.
        example: features on which the model is read; by default two sentences of its tokenizer.

    Raises:
        InputError: a loss that is not computed from embeddings, a model that cannot be read, or as
            `StageCost`.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module,
        weight: float | None = None,
        *,
        layers: int | None = None,
        example: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        if not hasattr(loss, "compute_loss_from_embeddings"):
            raise InputError(
                f"{type(loss).__name__} is not computed from embeddings; expected a loss with "
                "compute_loss_from_embeddings, such as MultipleNegativesRankingLoss"
            )
        tokenized: Any = getattr(model, "preprocess", None) or getattr(model, "tokenize", None)
        if example is None and tokenized is not None:
            example = tokenized(["one sentence", "and another one, which is longer"])
        structure = anatomy(model, example=example)
        self.loss = loss
        self._rows: list[int] = []  # of each column
        weight = 1 / max(structure.horizon, 1) if weight is None else weight
        self.objective = StageCost(structure, self._of_embeddings, weight, layers=layers)

    def forward(self, sentence_features: Iterable[Mapping[str, Any]], labels: Any) -> Tensor:
        """The cost of a batch: a mapping of features for each column, labels as ℓ takes them."""
        columns = list(sentence_features)
        batch = _one_batch(columns)
        self._rows = [
            next(len(v) for v in one.values() if isinstance(v, Tensor)) for one in columns
        ]
        cost, _ = self.objective(batch, labels)
        return cast(Tensor, cost)

    def _of_embeddings(self, embeddings: Tensor, labels: Any) -> Tensor:
        compute = cast(Any, self.loss).compute_loss_from_embeddings
        return cast(Tensor, compute(list(torch.split(embeddings, self._rows)), labels))

    def get_config_dict(self) -> dict[str, Any]:
        """What sentence-transformers writes into a model's card."""
        return {
            "loss": type(self.loss).__name__,
            "weight": self.objective.weight,
            "layers": self.objective.layers,
        }


def _one_batch(columns: list[Mapping[str, Any]]) -> dict[str, Any]:
    """The columns one below the other; shorter ones are padded where their mask is then 0.

    Raises:
        InputError: they are not of one form, or there is no mask and their lengths differ.
    """
    if not columns or any(one.keys() != columns[0].keys() for one in columns):
        names = [", ".join(one) for one in columns]
        raise InputError(
            f"columns of {names or 'nothing'} given; expected the same features of each"
        )
    batch: dict[str, Any] = {}
    for name, first in columns[0].items():
        values = [one[name] for one in columns]
        if not isinstance(first, Tensor):
            batch[name] = first
            continue
        lengths = {v.shape[1] for v in values if v.dim() > 1}
        if len(lengths) > 1 and "attention_mask" not in columns[0]:
            raise InputError(
                f"{name} of lengths {sorted(lengths)} without an attention_mask; expected one, or "
                "columns of one length"
            )
        longest = max(lengths, default=0)
        batch[name] = torch.cat(
            [F.pad(v, (0, longest - v.shape[1])) if v.dim() == 2 else v for v in values]
        )
    return batch
