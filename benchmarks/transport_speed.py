"""The layer-conditional distance of two networks against a plain POT loop, in one run.

The loop is what a user would write: per layer `ot.dist`, then `ot.emd2` with equal weights. Both
must give the same number to 1e-9, relatively; the library must take under 20 s at the full size,
64 layers × 1024 particles × 129 numbers (d = 64 with inner biases), and not more than the loop.

Then single assignments, by `lap` and by scipy, of Gaussian particles times e^{spread · normal}: the
ratio of their times is why `lap` is used where sizes are mixed. The costs must be equal to 1e-12.

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

from deeplimit.meanfield import LayerwiseMeasure, cot_distance, couplings
from deeplimit.studies.harness import machine

LIMIT = 20.0  # seconds, at the full size
TOLERANCE = 1e-9
SPREADS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0)
FULL = {"layers": 64, "particles": 1024, "numbers": 129}


def pot_loop(a: LayerwiseMeasure, b: LayerwiseMeasure) -> float:
    """The distance by POT alone."""
    total = 0.0
    for x, y in zip(a.layers, b.layers, strict=True):
        weights = np.full(len(x), 1 / len(x))
        costs = ot.dist(x.numpy(), y.numpy())
        total += float(ot.emd2(weights, weights, costs, numItermax=10_000_000)) / a.depth
    return math.sqrt(total)


def assignments(particles: int, numbers: int) -> list[dict[str, float]]:
    """Seconds of both solvers, and how much dearer the one by lap is; medians of five draws."""
    rows = []
    for spread in SPREADS:
        seconds: dict[str, list[float]] = {"lap": [], "scipy": []}
        dearer = 0.0
        for seed in range(5):
            generator = np.random.default_rng(seed)
            x, y = (
                generator.normal(size=(particles, numbers))
                * np.exp(spread * generator.normal(size=(particles, 1)))
                for _ in range(2)
            )
            costs = couplings._reduced(couplings.squared_distances(x, y))
            totals = {}
            for name, solve in (("lap", couplings.by_lap), ("scipy", couplings.by_scipy)):
                start = time.perf_counter()
                columns = solve(costs)
                seconds[name].append(time.perf_counter() - start)
                totals[name] = float(costs[np.arange(particles), columns].sum())
            dearer = max(dearer, abs(totals["lap"] / totals["scipy"] - 1))
        row = {"spread": spread, **{n: float(np.median(s)) for n, s in seconds.items()}}
        row |= {"ratio": row["scipy"] / row["lap"], "relative_difference": dearer}
        print(row, flush=True)
        rows.append(row)
    return rows


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
    rows = assignments(chosen.particles, chosen.numbers)
    passed = gap <= TOLERANCE and ratio <= 1
    passed = passed and max(row["relative_difference"] for row in rows) <= 1e-12
    if size == tuple(FULL.values()):
        passed = passed and mine["seconds"] <= LIMIT
    if chosen.out:
        result = {
            "size": size,
            "found": found,
            "ratio": ratio,
            "passed": passed,
            "assignments": rows,
        }
        chosen.out.write_text(json.dumps(result | {"machine": machine()}, indent=1) + "\n")
    if not passed:
        raise SystemExit("not reached")


if __name__ == "__main__":
    main()
