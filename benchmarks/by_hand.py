"""Training with the learning rate set at every step, so that a network may change on the way.

What tying.py and progressive.py share. A recipe says the rest: data, batches, optimiser, loss.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from deeplimit.control.verifying import multiply_adds
from deeplimit.data import DataSet, Split
from deeplimit.studies.harness import machine
from deeplimit.training import Recipe
from deeplimit.training.building import evaluation_batches, loss_of, training_batches
from deeplimit.training.loop import build_optimizer

Row = dict[str, Any]


def one_cycle(done: float) -> float:
    """The learning rate after this part of the training, relative to its largest.

    As torch's OneCycleLR: half a cosine up from 1/25 over 30 %, another down to nearly 0.
    """
    low, top, end = 1 / 25, 0.3, 1 / 250_000
    first, last, part = (low, 1.0, done / top) if done < top else (1.0, end, (done - top) / 0.7)
    return last + (first - last) * (1 + math.cos(math.pi * part)) / 2


def optimizer_of(recipe: Recipe, model: nn.Module) -> Optimizer:
    """The recipe's optimiser; the largest rate of a group is its `initial_lr`.

    `refine` and its kin scale that along with the rate itself.
    """
    optimizer = build_optimizer(recipe, model)
    for group in optimizer.param_groups:
        group["initial_lr"] = recipe.learning_rate
    return optimizer


def train_epoch(
    model: nn.Module,
    optimizer: Optimizer,
    recipe: Recipe,
    data: DataSet,
    epoch: int,
    cycle: range,
) -> Iterator[float]:
    """One pass over the training data: yields the loss after every step.

    Which batches come the recipe's seed and the epoch say. The cycle is that of the learning rate:
    the epochs that share one.
    """
    model.train()
    loss_function = loss_of(recipe, data)
    loader = training_batches(recipe, data, epoch)
    for i, (x, y) in enumerate(loader):
        rate = one_cycle((epoch - cycle.start + i / len(loader)) / len(cycle))
        for group in optimizer.param_groups:
            group["lr"] = rate * group["initial_lr"]
        optimizer.zero_grad()
        loss = loss_function(model(x), y).mean()
        value = loss.item()
        if not math.isfinite(value):
            raise SystemExit(f"the loss is {value} in epoch {epoch}, step {i}")
        loss.backward()
        optimizer.step()
        yield value


@torch.no_grad()
def accuracy(model: nn.Module, split: Split) -> float:
    """The share of a split's samples that are classified rightly."""
    model.eval()
    hits = sum(int((model(x).argmax(1) == y).sum()) for x, y in evaluation_batches(split))
    return hits / len(split)


def blocks_multiply_adds(model: Any, data: DataSet) -> int:
    """Multiply-adds of the residual blocks, forward, for one sample."""
    x = model.eval().stem(data.train.batch([0])[0])
    return multiply_adds(model.stages[0], x)


def clocks() -> tuple[float, float]:
    """Now: by the wall, and of this process."""
    return time.perf_counter(), time.process_time()


def since(began: tuple[float, float]) -> Row:
    """Seconds by both clocks, evaluations included; the second does not see who else computes."""
    wall, own = (now - then for now, then in zip(clocks(), began, strict=True))
    return {"seconds": round(wall, 1), "cpu_seconds": round(own, 1)}


class Results:
    """Rows in a .json file, written after each; those that are there are not made again.

    Args:
        path: of the file.
        settings: what the rows were made with; another file is asked for if it has others.
        keys: the names in a row that say which it is.
    """

    def __init__(self, path: Path, settings: Row, keys: Sequence[str]):
        self.path, self.keys = path, keys
        self.settings = json.loads(json.dumps(settings, default=str))
        there = json.loads(path.read_text()) if path.exists() else None
        if there is not None and there["settings"] != self.settings:
            raise SystemExit(f"{path} was made with other settings; give another --out")
        self.rows: list[Row] = there["runs"] if there else []

    def has(self, *key: object) -> bool:
        """Whether there is such a row."""
        return any(self._key(row) == key for row in self.rows)

    def add(self, row: Row, summary: Callable[[list[Row]], Row]) -> None:
        """Keeps a row, on a line of its own, and what summary(rows) says of all."""
        self.rows = sorted([*self.rows, row], key=self._key)
        plain = {"machine": machine(), "settings": self.settings, "summary": summary(self.rows)}
        head = json.dumps(plain, indent=1).removesuffix("\n}")
        every = ",\n".join(f"  {json.dumps(row)}" for row in self.rows)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(f'{head},\n "runs": [\n{every}\n ]\n}}\n')

    def _key(self, row: Row) -> tuple[Any, ...]:
        return tuple(row[name] for name in self.keys)
