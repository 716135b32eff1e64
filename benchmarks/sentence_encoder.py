"""Sentence encoders at every depth: a stage cost against AdaptiveLayerLoss, same steps, same data.

    python benchmarks/sentence_encoder.py --data-dir PATH
    python benchmarks/sentence_encoder.py --data-dir PATH --model FOLDER --rate 1e-3 --out …

A small BERT from scratch, or a pretrained model of transformers, with mean pooling is trained on
triplets of the texts: eight words; six of them in their order; and these six with neighbours
exchanged, so that a bag of words cannot tell the second from the third. Quality is the mean
reciprocal rank of the six in their order among all held-out sixes of both kinds (cosine), from the
last tenth of each text, of the encoder cut at each depth: 0.75 at most without the order.

Arms: the plain MultipleNegativesRankingLoss; sentence-transformers' AdaptiveLayerLoss around it as
it comes (one layer drawn a step, weights 1/(1 + log(1 + k)), and a KL term that draws the layer's
embeddings to the last one's), and without the KL term; StageCostLoss, with one layer drawn, and
with a weight that grows from 0 to 1, or to its default 1/N, with the square of the steps. All arms
of a seed begin with the same weights and see the same batches. A row that is in the file is not
made again; the summary compares arms over the seeds that both have.
"""

import argparse
import copy
import random
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import (
    AdaptiveLayerLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tokenizers import BertWordPieceTokenizer
from torch import Tensor, nn
from transformers import BertConfig, BertModel, BertTokenizerFast

from by_hand import Results, Row, clocks, since
from deeplimit import anatomy, at_depth
from deeplimit.integrations.sentence_transformers import StageCostLoss

RESULTS = Path(__file__).parent / "results"
WIDTH, LAYERS, WORDS, VOCABULARY = 48, 4, 8, 2000
BATCH, HELD_OUT = 32, 500
Triplet = tuple[str, str, str]

ARMS: dict[str, Callable[[Any, nn.Module], nn.Module]] = {
    "plain": lambda _, loss: loss,
    "AdaptiveLayerLoss": AdaptiveLayerLoss,
    "AdaptiveLayerLoss, no KL": lambda m, loss: AdaptiveLayerLoss(m, loss, kl_temperature=0),
    "StageCostLoss": StageCostLoss,
    "StageCostLoss, 1 layer": lambda m, loss: StageCostLoss(m, loss, layers=1),
    "StageCostLoss, grows to 1": lambda m, loss: StageCostLoss(m, loss, 1.0),
    "StageCostLoss, grows to 1/N": StageCostLoss,
}


def triplets(texts: list[Path]) -> tuple[list[Triplet], list[Triplet]]:
    """Those to train on and held-out ones, no word of a text in both."""
    draw = random.Random(0)
    train: list[Triplet] = []
    held_out: list[Triplet] = []
    for path in texts:
        words = path.read_text().split()
        cut = len(words) * 9 // 10
        for part, found in ((words[:cut], train), (words[cut:], held_out)):
            for i in range(0, len(part) - WORDS, WORDS):
                kept = [part[i + k] for k in sorted(draw.sample(range(WORDS), 6))]
                exchanged = [kept[k] for k in (1, 0, 3, 2, 5, 4)]
                parts = part[i : i + WORDS], kept, exchanged
                found.append((" ".join(parts[0]), " ".join(parts[1]), " ".join(parts[2])))
    return train, held_out[:: len(held_out) // HELD_OUT]


def encoder(texts: list[Path], seed: int, folder: Path | None) -> Any:
    """An encoder; those of one seed have the same weights."""
    torch.manual_seed(seed)
    if folder is not None:
        model = Transformer(str(folder))
        model.tokenizer.pad_token = model.tokenizer.pad_token or model.tokenizer.eos_token
        width = model.get_embedding_dimension()
        return SentenceTransformer(modules=[model, Pooling(width)], device="cpu")
    with tempfile.TemporaryDirectory() as name:
        words = BertWordPieceTokenizer(lowercase=True)
        words.train([str(path) for path in texts], vocab_size=VOCABULARY, show_progress=False)
        words.save_model(name)
        config = BertConfig(
            vocab_size=words.get_vocab_size(), hidden_size=WIDTH, num_hidden_layers=LAYERS,
            num_attention_heads=4, intermediate_size=2 * WIDTH, max_position_embeddings=64,
        )  # fmt: skip
        BertModel(config).save_pretrained(name)
        BertTokenizerFast(str(Path(name) / "vocab.txt")).save_pretrained(name)
        return SentenceTransformer(modules=[Transformer(name), Pooling(WIDTH)], device="cpu")


def trained(
    model: Any, loss: Any, train: list[Triplet], steps: int, rate: float, seed: int, grows: bool
) -> None:
    """Trains for so many steps."""
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    draw, weight = torch.Generator().manual_seed(seed), loss.objective.weight if grows else 0
    torch.manual_seed(seed)
    random.seed(seed)  # by which AdaptiveLayerLoss draws its layers
    model.train()
    for step in range(steps):
        if grows:
            loss.objective.weight = weight * (step / steps) ** 2
        rows = torch.randint(len(train), (BATCH,), generator=draw).tolist()
        columns = [dict(model.preprocess([train[i][k] for i in rows])) for k in (0, 1, 2)]
        optimizer.zero_grad()
        loss(columns, None).backward()
        optimizer.step()
        cycle.step()


@torch.no_grad()
def quality(model: Any, held_out: list[Triplet]) -> list[float]:
    """The mean reciprocal rank at each depth, 0 included."""
    model.eval()
    structure = anatomy(model, example=dict(model.preprocess(["a", "a b"])))
    found = []
    for depth in range(structure.horizon + 1):
        with at_depth(structure, depth):
            eight, right, wrong = (
                nn.functional.normalize(_encoded(model, [t[k] for t in held_out])) for k in range(3)
            )
        likeness = eight @ torch.cat([right, wrong]).T
        ranks = (likeness >= likeness.diag()[:, None]).sum(1)
        found.append(float((1 / ranks).mean()))
    return found


def _encoded(model: Any, sentences: list[str]) -> Tensor:
    parts = [sentences[i : i + 128] for i in range(0, len(sentences), 128)]
    return torch.cat([model(dict(model.preprocess(p)))["sentence_embedding"] for p in parts])


def summary(rows: list[Row]) -> Row:
    """The mean quality of each arm at each depth, and how it differs, seed by seed."""
    of = {(row["arm"], row["seed"]): row["quality"] for row in rows}
    arms, found = {arm for arm, _ in of}, {}
    for arm in sorted(arms):
        mine = [of[key] for key in of if key[0] == arm]
        found[arm] = {"seeds": len(mine), "quality": _means(mine)}
        for other in sorted({"plain", "AdaptiveLayerLoss"} & arms - {arm}):
            gaps = [
                [a - b for a, b in zip(of[arm, s], of[other, s], strict=True)]
                for a_, s in of
                if a_ == arm and (other, s) in of
            ]
            found[arm][f"less {other}"] = {"mean": _means(gaps), "seeds": gaps}
    return found


def _means(rows: list[list[float]]) -> list[float]:
    return [statistics.mean(column) for column in zip(*rows, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True, help="with text in it")
    parser.add_argument("--model", type=Path, help="folder of transformers to start from")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rate", type=float, default=2e-3, help="the largest learning rate")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--out", type=Path, default=RESULTS / "sentence_encoder.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    texts = [options.data_dir / f"text/{t}.txt" for t in ("tinyshakespeare", "wizard-of-oz")]
    train, held_out = triplets(texts)
    settings = {
        "steps": options.steps, "batch": BATCH, "rate": options.rate,
        "triplets": len(train), "held_out": len(held_out),
    }  # fmt: skip
    new = {"width": WIDTH, "layers": LAYERS}
    settings |= new if options.model is None else {"start": options.model.name}
    results = Results(options.out, settings, ("arm", "seed"))
    for seed in options.seeds:
        for arm in options.arms:
            if results.has(arm, seed):
                continue
            model = encoder(texts, seed, options.model)
            loss = MultipleNegativesRankingLoss(model)
            began = clocks()
            cost = ARMS[arm](model, loss)
            trained(model, cost, train, options.steps, options.rate, seed, "grows" in arm)
            row = {"arm": arm, "seed": seed, **since(began)}
            row["quality"] = quality(copy.deepcopy(model), held_out)
            print(row, flush=True)
            results.add(row, summary)


if __name__ == "__main__":
    main()
