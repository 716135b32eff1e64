"""Training on coded states against exact backpropagation: same start, same batches, three seeds.

    python benchmarks/coded_training.py --data-dir PATH

resnet20, resnet56: a pretrained CIFAR ResNet is fine-tuned on part of CIFAR-10 (JPEG, which it has
not seen) by SGD; BatchNorm in training mode, a ReLU after each addition. In stages of three blocks
one state is coded, and as the first of its run it comes back as it was: after the first step, in
which blocks are told apart, the gap of ResNet-20 is what rounding does to such a training.
bert: a BertForSequenceClassification with its dropout, norms
after the addition, learns from scratch which of two texts a window of 32 tokens is from.
llama: the pretrained stories260K goes on in one of the texts, with
parameters, states and AdamW in bfloat16. lora: the same model, frozen in bfloat16, with adapters of
rank 8 in float32 on its four attention projections (by hand: peft is not needed for W + BA).

"gap" is coded less exact, of each seed, in the last tenth's training loss, in the loss and in the
accuracy on held-out data; "spread" the standard deviation of the exact arm over the seeds. A
row (task, seed, bits; 0 bits: exact) that is in the file is not made again.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import plotly.graph_objects as go
import torch
import torch.nn.functional as F
import transformers as hf
from plotly.subplots import make_subplots
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from by_hand import Results, Row, clocks, one_cycle, since
from deeplimit import use_adjoint
from deeplimit.data import load_dataset
from deeplimit.gradient.stand_ins import engines
from deeplimit.network import CifarResNet
from drawing import write

RESULTS = Path(__file__).parent / "results"
MEANS = 20  # points of a loss curve: each the mean over so manyth part of the steps
MEASURES = ("last_training_loss", "loss", "accuracy")
Batch = tuple[Tensor, Tensor]


class Task(NamedTuple):
    """What is trained, and on what.

    Attributes:
        model: as it starts.
        scores: the logits, classes last, of a batch's input.
        batch: draws a training batch.
        held_out: batches for the final loss and accuracy.
    """

    model: nn.Module
    scores: Callable[[nn.Module, Tensor], Tensor]
    batch: Callable[[torch.Generator], Batch]
    held_out: list[Batch]
    optimizer: Optimizer
    steps: int


def resnet(data_dir: Path, depth: int = 20, steps: int = 200) -> Task:
    """On 4,000 images, tested on 1,000 test images."""
    model = CifarResNet.from_weights(data_dir / f"weights/cifar10-resnet{depth}.safetensors")
    data = load_dataset("cifar10", data_dir=data_dir)
    x, y, test = data.train.x[:4000], data.train.y[:4000], data.test

    def batch(draw: torch.Generator) -> Batch:
        rows = torch.randint(len(x), (32,), generator=draw)
        return x[rows].float() / 255, y[rows]

    held_out = [
        (test.x[i : i + 250].float() / 255, test.y[i : i + 250]) for i in range(0, 1000, 250)
    ]
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9, weight_decay=1e-4)
    return Task(model, lambda m, x: m(x), batch, held_out, optimizer, steps)


def bert(data_dir: Path) -> Task:
    """Six layers of 64 numbers; the last tenth of each text is held out."""
    config = hf.BertConfig(
        vocab_size=512, hidden_size=64, num_hidden_layers=6, num_attention_heads=4,
        intermediate_size=256, max_position_embeddings=32, num_labels=2,
    )  # fmt: skip
    model = hf.BertForSequenceClassification(config)
    both = [_tokens(data_dir, path, lower=True) for path in _texts(data_dir)]
    train, test = (
        [t[a * len(t) // 10 : b * len(t) // 10] for t in both] for a, b in ((0, 9), (9, 10))
    )
    fixed = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    held_out = [_windows(test, fixed, 250) for _ in range(8)]
    draw = lambda generator: _windows(train, generator, 64)  # noqa: E731
    return Task(model, lambda m, x: m(input_ids=x).logits, draw, held_out, optimizer, 400)


def _texts(data_dir: Path) -> list[Path]:
    return [data_dir / f"text/{name}.txt" for name in ("tinyshakespeare", "wizard-of-oz")]


def _tokens(data_dir: Path, path: Path, lower: bool = False) -> Tensor:
    """Of the Llama's tokenizer; in lower case and without line breaks no form tells the text."""
    text = path.read_text()
    tokenizer = hf.AutoTokenizer.from_pretrained(data_dir / "llama-stories260k")
    return torch.tensor(tokenizer(" ".join(text.lower().split()) if lower else text).input_ids)


def _windows(texts: list[Tensor], draw: torch.Generator, count: int) -> Batch:
    which = torch.randint(2, (count,), generator=draw)
    starts = torch.rand(count, generator=draw)
    rows = []
    for text, start in zip(which.tolist(), starts.tolist(), strict=True):
        first = int(start * (len(texts[text]) - 32))
        rows.append(texts[text][first : first + 32])
    return torch.stack(rows), which


class LowRank(nn.Module):
    """W + BA: A random, B = 0 at first."""

    def __init__(self, weight: Tensor, rank: int = 8):
        super().__init__()
        self.a = nn.Parameter(torch.randn(rank, weight.shape[1]) / rank)
        self.b = nn.Parameter(torch.zeros(weight.shape[0], rank))

    def forward(self, weight: Tensor) -> Tensor:  # noqa: D102
        return weight + (self.b @ self.a).to(weight.dtype)


def llama(data_dir: Path, low_rank: bool = False) -> Task:
    """Windows of 128 tokens of the Wizard of Oz, of which the last tenth is held out."""
    folder = data_dir / "llama-stories260k"
    model = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).train()
    ids = _tokens(data_dir, _texts(data_dir)[1])
    cut = len(ids) * 9 // 10
    if low_rank:
        model.requires_grad_(False)
        for module in model.model.layers.modules():
            if isinstance(module, nn.Linear) and module.out_features <= 64 >= module.in_features:
                parametrize.register_parametrization(module, "weight", LowRank(module.weight))

    def split(rows: Tensor) -> Batch:
        return rows[:, :-1], rows[:, 1:]

    def batch(draw: torch.Generator) -> Batch:
        starts = torch.randint(cut - 129, (8,), generator=draw).tolist()
        return split(torch.stack([ids[i : i + 129] for i in starts]))

    held = ids[cut:][: (len(ids) - cut) // 129 * 129].view(-1, 129)
    wanted = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(wanted, 5e-3 if low_rank else 1e-3, weight_decay=0)
    scores = lambda m, x: m(input_ids=x, use_cache=False).logits.float()  # noqa: E731
    return Task(model, scores, batch, list(map(split, held.split(16))), optimizer, 300)


def lora(data_dir: Path) -> Task:
    """As llama, but frozen, with adapters."""
    return llama(data_dir, low_rank=True)


TASKS = {
    "resnet20": resnet,
    "resnet56": partial(resnet, depth=56, steps=60),
    "bert": bert,
    "llama": llama,
    "lora": lora,
}


def loss_of(scores: Tensor, y: Tensor) -> Tensor:
    """The mean cross-entropy."""
    return F.cross_entropy(scores.flatten(0, -2), y.flatten())


def run(name: str, seed: int, bits: int, data_dir: Path) -> Row:
    """One training from its start, its curve, and what came of it."""
    torch.manual_seed(seed)
    task = TASKS[name](data_dir)
    model, began, largest = task.model.train(), clocks(), 0.0
    if bits:
        use_adjoint(model, bits=bits, on_drift="ignore")
    draw = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    for step in range(task.steps):
        for group in task.optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * one_cycle(step / task.steps)
        x, y = task.batch(draw)
        task.optimizer.zero_grad()
        loss = loss_of(task.scores(model, x), y)
        losses.append(loss.item())
        loss.backward()  # type: ignore[no-untyped-call]
        task.optimizer.step()
        if bits:
            largest = max(largest, *(engine.meter.response for engine in engines(model)))
    part = task.steps // MEANS
    row: Row = {
        "task": name, "seed": seed, "bits": bits, "steps": task.steps,
        "last_training_loss": statistics.mean(losses[-task.steps // 10 :]),
        **dict(zip(("loss", "accuracy"), evaluated(task), strict=True)),
        **since(began),
        "curve": [statistics.mean(losses[i : i + part]) for i in range(0, task.steps, part)],
    }  # fmt: skip
    return row | ({"largest_response": largest} if bits else {})


@torch.no_grad()
def evaluated(task: Task) -> Iterator[float]:
    """Loss and accuracy on held-out data."""
    model = task.model.eval()
    found = [(task.scores(model, x), y) for x, y in task.held_out]
    scores = torch.cat([s.flatten(0, -2) for s, _ in found])
    classes = torch.cat([y.flatten() for _, y in found])
    yield float(F.cross_entropy(scores, classes))
    yield float((scores.argmax(1) == classes).double().mean())


def summary(rows: list[Row]) -> Row:
    """Of each task: the exact arm's mean and spread, and the gap of each number of bits."""
    found: Row = {}
    for name in TASKS:
        mine = {(r["seed"], r["bits"]): r for r in rows if r["task"] == name}
        exact = {seed: row for (seed, bits), row in mine.items() if not bits}
        if len(exact) < 2:
            continue
        for measure in MEASURES:
            values = [row[measure] for row in exact.values()]
            told: Row = {"exact": statistics.mean(values), "spread": statistics.stdev(values)}
            for bits in sorted({bits for _, bits in mine} - {0}):
                gaps = [
                    mine[s, bits][measure] - exact[s][measure] for s in exact if (s, bits) in mine
                ]
                told[f"gap, b = {bits}"] = {
                    "seeds": gaps,
                    "mean": statistics.mean(gaps),
                    "within": abs(statistics.mean(gaps)) <= told["spread"],
                }
            found.setdefault(name, {})[measure] = told
    return found


def drawn(rows: list[Row]) -> go.Figure:
    """Training loss against steps: exact backpropagation as lines, codes as points on them."""
    names = [name for name in TASKS if any(row["task"] == name for row in rows)]
    figure = make_subplots(1, len(names), subplot_titles=names)
    for row in rows:
        at = [row["steps"] * (i + 0.5) / MEANS for i in range(MEANS)]
        look: dict[str, Any] = {"line": {"color": "#7BA7CC", "width": 2}, "mode": "lines"}
        if row["bits"]:
            look = {"marker": {"color": "#C8553D", "size": 5}, "mode": "markers"}
        label = f"{row['bits']} bits" if row["bits"] else "exact"
        shown = (row["task"], row["seed"]) == (names[0], rows[0]["seed"])
        figure.add_scatter(
            x=at, y=row["curve"], name=label, legendgroup=label, showlegend=shown, **look,
            row=1, col=names.index(row["task"]) + 1,
        )  # fmt: skip
    figure.update_xaxes(title="steps")
    figure.update_yaxes(title="training loss", col=1)
    return figure.update_layout(width=1100, height=340, template="plotly_white", margin_t=50)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--bits", type=int, nargs="+", default=[0, 4], help="0: exact")
    parser.add_argument("--out", type=Path, default=RESULTS / "coded_training.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    hf.logging.set_verbosity_error()
    results = Results(options.out, {"points": MEANS}, ("task", "seed", "bits"))
    for name in options.tasks:
        for seed in options.seeds:
            for bits in options.bits:
                if not results.has(name, seed, bits):
                    row = run(name, seed, bits, options.data_dir)
                    print({k: v for k, v in row.items() if k != "curve"}, flush=True)
                    results.add(row, summary)
    write(drawn(results.rows), options.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
