"""The order in depth of the rebuilt gradient: how its relative error falls with N, h = 1/N.

python benchmarks/adjoint_orders.py --out benchmarks/results/adjoint_orders.json
"""

import argparse
import itertools
import json
import math
from pathlib import Path
from statistics import geometric_mean, linear_regression

import torch

from deeplimit import use_adjoint, use_backprop
from deeplimit.studies.harness import machine
from networks_tried import chain

DEPTHS = (16, 32, 64, 128)
SEEDS = range(3)


def errors(
    activation: str, smooth: bool, heun: bool, depth: int, seed: int, most: int
) -> list[float]:
    """Relative errors of all parameter gradients for e = 1 … most."""
    model, loss = chain(activation, smooth, heun, 0.0, depth, 1.0, seed)
    parameters = list(model.parameters())

    def gradient() -> torch.Tensor:
        found = torch.autograd.grad(loss(model), parameters)
        return torch.cat([g.flatten() for g in found])

    exact = gradient()
    gaps = []
    for evaluations in range(1, most + 1):
        use_adjoint(model, evaluations=evaluations, on_drift="ignore")
        gaps.append(float((gradient() - exact).norm() / exact.norm()))
    use_backprop(model)
    return gaps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for heun, activation, smooth in itertools.product(
        (False, True), ("tanh", "gelu", "relu"), (True, False)
    ):
        most = 2 if heun else 3  # a third of Heun's would be rounding
        found = [
            [errors(activation, smooth, heun, depth, seed, most) for seed in SEEDS]
            for depth in DEPTHS
        ]
        for e in range(most):
            means = [geometric_mean([gaps[e] for gaps in seeds]) for seeds in found]
            logs = [math.log(depth) for depth in DEPTHS], [math.log(mean) for mean in means]
            slope = linear_regression(*logs).slope
            row = {
                "scheme": "Heun" if heun else "Euler", "activation": activation,
                "controls": "smooth" if smooth else "independent", "evaluations": e + 1,
                "slope": slope, "errors": means,
            }  # fmt: skip
            rows.append(row)
            kind = f"{row['scheme']}, {activation}, {row['controls']}, e = {e + 1}"
            print(f"{kind}: {slope:.2f}", [f"{mean:.1e}" for mean in means], flush=True)
    result = {"machine": machine(), "depths": DEPTHS, "seeds": len(SEEDS), "rows": rows}
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
