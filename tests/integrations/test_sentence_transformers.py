"""Sentence encoders that answer at every depth, in sentence-transformers itself."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, BertTokenizerFast

from deeplimit import InputError, anatomy, at_depth, crop
from deeplimit.integrations.sentence_transformers import StageCostLoss

st = pytest.importorskip("sentence_transformers")
from sentence_transformers.sentence_transformer import losses  # noqa: E402
from sentence_transformers.sentence_transformer.modules import (  # noqa: E402
    Normalize,
    Pooling,
    Transformer,
)

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] the cat sat on mat a dog ran in park rain fell over town"
ANCHORS = ["the cat sat", "a dog ran in the park", "rain fell"]
POSITIVES = ["the cat sat on a mat over the town", "a dog ran", "rain fell in town"]
DEPTH = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encoder")
    (folder / "vocab.txt").write_text("\n".join(WORDS.split()))
    config = BertConfig(
        vocab_size=len(WORDS.split()),
        hidden_size=16,
        num_hidden_layers=DEPTH,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.5,
    )
    BertModel(config).save_pretrained(folder)
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


@pytest.fixture
def model(folder: Path) -> Any:
    return st.SentenceTransformer(modules=[Transformer(str(folder)), Pooling(16), Normalize()])


def features(model: Any) -> list[dict[str, Any]]:
    return [dict(model.preprocess(column)) for column in (ANCHORS, POSITIVES)]


def test_cost_and_gradient_are_those_of_really_cut_encoders(model: Any) -> None:
    model = model.double()
    ranking = losses.MultipleNegativesRankingLoss(model)
    loss = StageCostLoss(model, ranking, weight=0.3)
    naive = copy.deepcopy(model)
    bert = naive[0].auto_model.encoder
    blocks = list(bert.layer)
    expected = torch.zeros((), dtype=torch.float64)
    for k in range(DEPTH + 1):
        bert.layer = nn.ModuleList(blocks[:k])
        embeddings = [naive(f)["sentence_embedding"] for f in features(naive)]
        value = ranking.compute_loss_from_embeddings(embeddings, None)
        expected = expected + (1.0 if k == DEPTH else 0.3) * value
    bert.layer = nn.ModuleList(blocks)
    expected.backward()
    cost = loss(features(model), None)
    cost.backward()
    torch.testing.assert_close(cost, expected, rtol=1e-12, atol=0)
    for (name, p), q in zip(model.named_parameters(), naive.parameters(), strict=True):
        if q.grad is None:  # BERT's pooler, which mean pooling does not use
            assert p.grad is None, name
            continue
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)


@torch.no_grad()
def test_a_cut_encoder_is_saved_and_loaded_without_deeplimit(model: Any, tmp_path: Path) -> None:
    structure = anatomy(model, example=features(model)[0])
    smaller = crop(structure, 2)
    smaller.save_pretrained(str(tmp_path / "smaller"))
    loaded = st.SentenceTransformer(str(tmp_path / "smaller"))
    with at_depth(structure, 2):
        expected = model.encode(ANCHORS)
    assert loaded[0].auto_model.config.num_hidden_layers == 2
    for encoder in (smaller, loaded):
        torch.testing.assert_close(
            torch.tensor(encoder.encode(ANCHORS)), torch.tensor(expected), rtol=0, atol=1e-6
        )
    assert abs(model.encode(ANCHORS) - expected).max() > 0.01


@pytest.mark.slow
def test_the_librarys_trainer_trains_every_depth(model: Any, tmp_path: Path) -> None:
    from datasets import Dataset

    def cost() -> list[float]:
        loss = losses.MultipleNegativesRankingLoss(model)
        found = []
        for k in range(1, DEPTH + 1):
            with at_depth(anatomy(model), k), torch.no_grad():
                embeddings = [model(f)["sentence_embedding"] for f in features(model)]
                found.append(float(loss.compute_loss_from_embeddings(embeddings, None)))
        return found

    loss = StageCostLoss(model, losses.MultipleNegativesRankingLoss(model), layers=2)
    before = cost()
    pairs = Dataset.from_dict({"anchor": ANCHORS * 8, "positive": POSITIVES * 8})
    st.SentenceTransformerTrainer(
        model=model,
        args=st.SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path),
            num_train_epochs=4,
            per_device_train_batch_size=3,
            learning_rate=3e-3,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=pairs,
        loss=loss,
    ).train()
    assert all(now < then for now, then in zip(cost(), before, strict=True))


def test_each_column_has_its_own_rows(model: Any) -> None:
    shapes = []

    class Seen(nn.Module):
        def compute_loss_from_embeddings(self, columns: list[torch.Tensor], _: Any) -> torch.Tensor:
            shapes.append([len(column) for column in columns])
            return torch.stack([column.sum() for column in columns]).sum()

    StageCostLoss(model, Seen())(
        [dict(model.preprocess(column)) for column in (ANCHORS * 2, POSITIVES[:2])], None
    )
    assert shapes == [[6, 2]] * (DEPTH + 1)


def test_what_is_not_computed_from_embeddings_is_refused(model: Any) -> None:
    with pytest.raises(InputError, match="expected a loss with compute_loss_from_embeddings"):
        StageCostLoss(model, nn.MSELoss())


def test_columns_of_other_features_are_refused(model: Any) -> None:
    loss = StageCostLoss(model, losses.MultipleNegativesRankingLoss(model))
    first, second = features(model)
    del second["attention_mask"]
    with pytest.raises(InputError, match="expected the same features of each"):
        loss([first, second], None)
    del first["attention_mask"]
    with pytest.raises(InputError, match=r"lengths \[8, 11\] without an attention_mask"):
        loss([first, second], None)
