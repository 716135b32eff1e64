"""What a stage cost adds to a training step: 20 convolutional blocks, plain against stage cost.

The limit on paper: the states are there anyway, kept for backpropagation; the head (a pool and a
small linear layer) reads them once more. That is one pass over the states to stack them, one to
pool them, and the same backwards, against two 3×3 convolutions per block and direction.

    python benchmarks/stage_cost_overhead.py --out benchmarks/results/stage_cost_overhead.json
"""

import argparse
import json
from pathlib import Path
from statistics import median

import torch
from torch.utils.benchmark import Timer

from deeplimit import SoftCrossEntropy, StageCost
from deeplimit.network import Architecture
from machine import machine

ROUNDS = 15


def step_of(weight: float, batch: int, channels: int, control_cost: float = 0.0):
    """A training step (forward, cost, backward, update) of a 20-block chain at 7×7."""
    torch.manual_seed(0)
    model = Architecture("convolutional", (1, 28, 28), 10, (20,), channels, channels).build()
    stage_cost = StageCost(model, SoftCrossEntropy(10), weight, control_cost)
    optimiser = torch.optim.AdamW(stage_cost.parameters(), lr=1e-3, fused=True)
    x, y = torch.rand(batch, 1, 28, 28), torch.randint(10, (batch,))

    def step() -> None:
        optimiser.zero_grad()
        cost, _ = stage_cost(x, y)
        cost.backward()
        optimiser.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    results = []
    for channels, batch in ((16, 128), (32, 128)):
        steps = {
            "plain": step_of(0.0, batch, channels),
            "stage cost": step_of(0.1, batch, channels),
            "stage cost and control cost": step_of(0.1, batch, channels, 1e-4),
        }
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for round_ in range(ROUNDS + 2):
            for name, step in steps.items():  # in turns, so that all see the same machine
                taken = Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads())
                figure = taken.timeit(2).mean
                if round_ >= 2:
                    seconds[name].append(figure)
        medians = {name: median(values) for name, values in seconds.items()}
        ratios = {
            name: median(a / b for a, b in zip(values, seconds["plain"], strict=True))
            for name, values in seconds.items()
        }
        results.append(
            {"channels": channels, "batch": batch, "blocks": 20, "rounds": ROUNDS,
             "seconds": medians, "ratio_to_plain": ratios}
        )  # fmt: skip
        print(f"{channels} channels:", {k: round(v, 3) for k, v in ratios.items()})
    if out:
        out.write_text(json.dumps({"machine": machine(), "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
