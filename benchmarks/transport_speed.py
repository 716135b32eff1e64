"""The layer-conditional distance of two networks against a plain POT loop, in one run.

The loop is what a user would write: per layer `ot.dist`, then `ot.emd2` with equal weights. Both
must give the same number to 1e-9, relatively; the library must take under 20 s at the full size,
64 layers × 1024 particles × 129 numbers (d = 64 with inner biases), and not more than the loop.

    python benchmarks/transport_speed.py --out benchmarks/results/transport_speed.json
    python benchmarks/transport_speed.py --layers 4
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import ot
import torch

from deeplimit.meanfield import LayerwiseMeasure, cot_distance
from deeplimit.studies.harness import machine

LIMIT = 20.0  # seconds, at the full size
TOLERANCE = 1e-9
FULL = {"layers": 64, "particles": 1024, "numbers": 129}


def pot_loop(a: LayerwiseMeasure, b: LayerwiseMeasure) -> float:
    """The distance by POT alone."""
    total = 0.0
    for x, y in zip(a.layers, b.layers, strict=True):
        weights = np.full(len(x), 1 / len(x))
        costs = ot.dist(x.numpy(), y.numpy())
        total += float(ot.emd2(weights, weights, costs, numItermax=10_000_000)) / a.depth
    return math.sqrt(total)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, value in FULL.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    torch.manual_seed(chosen.seed)
    size = (chosen.layers, chosen.particles, chosen.numbers)
    a, b = (LayerwiseMeasure(torch.randn(size, dtype=torch.float64)) for _ in range(2))
    found = {}
    for name, distance in (
        ("deeplimit", lambda: cot_distance(a, b).distance),
        ("POT loop", lambda: pot_loop(a, b)),
    ):
        start = time.perf_counter()
        value = distance()
        found[name] = {"seconds": time.perf_counter() - start, "distance": value}
        print(f"{name}: {found[name]['seconds']:.2f} s, d = {value:.12g}")
    mine, loop = found["deeplimit"], found["POT loop"]
    gap = abs(mine["distance"] - loop["distance"]) / loop["distance"]
    ratio = mine["seconds"] / loop["seconds"]
    print(f"relative difference {gap:.2g}, time {ratio:.2f} of the loop's")
    passed = gap <= TOLERANCE and ratio <= 1
    if size == tuple(FULL.values()):
        passed = passed and mine["seconds"] <= LIMIT
    if chosen.out:
        result = {"size": size, "found": found, "ratio": ratio, "passed": passed}
        chosen.out.write_text(json.dumps(result | {"machine": machine()}, indent=1) + "\n")
    if not passed:
        raise SystemExit("not reached")


if __name__ == "__main__":
    main()
