"""What `smoothness` says of networks that are known to be smooth in depth, or known not to be.

    python benchmarks/smoothness_calibration.py --weights FOLDER

Chains of linear, two-layer and convolutional residuals, h = 4/N, N = 8 … 128, three seeds: a
Gaussian process in depth of several length scales ℓ, identical layers, PyTorch's independent start,
and a Gaussian process with the neurons of every layer permuted. Known to be smooth: identical
layers, and Nℓ ≥ 3; known to be rough: independent and permuted ones. Beside the roughness stands
what the verdict is about: how far the output moves, relative to ‖x_N − x_0‖, when the chain is
coarsened (every second control, step 2h) or refined (controls interpolated, step h/2).

The limits come from Gaussian processes of Nℓ = 0.5 … 6 layers (`by_roughness`): smooth up to where
coarsening moves the output no more than it moves the smoothest (the median within a quarter of
theirs), so that it is Euler's own error; rough from where it moves it by more than half.

Then networks that nobody made smooth: CIFAR ResNets with published weights, a ViT at its random
start; and classifiers of digits, trained from each start, with the accuracy of the coarsened
network on test data. One JSON file is written.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import transformers as hf
from torch import Tensor, nn

from deeplimit.data import load_dataset
from deeplimit.network import (
    CifarResNet,
    ConvolutionalResidual,
    LinearResidual,
    ResidualChain,
    ResidualClassifier,
    TwoLayerResidual,
    identical_start,
    smooth_start,
)
from deeplimit.ode import coarsen, refine, smoothness
from deeplimit.ode.limit import ROUGH, SMOOTH
from deeplimit.studies.harness import machine
from deeplimit.training import Recipe, build_model, recipe_for, train

RESULTS = Path(__file__).parent / "results" / "smoothness_calibration.json"
HORIZONS, SEEDS, T = (8, 16, 32, 64, 128), (0, 1, 2), 4.0
LENGTH_SCALES = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
RESOLVED = 3.0  # Nℓ from which a Gaussian process counts as known to be smooth
LAYERS = (0.5, 0.7, 0.85, 1.0, 1.25, 1.5, 2.0, 2.5, 2.8, 3.0, 3.5, 4.0, 5.0, 6.0)  # Nℓ, for limits
EDGES = (0.0, 0.15, 0.25, 0.35, 0.45, 0.55, 0.7, 0.8, 1.0)
BLOCKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: LinearResidual(16), (8, 16)),
    "two-layer, tanh": (lambda: TwoLayerResidual(16, 32, "tanh"), (8, 16)),
    "two-layer, relu": (lambda: TwoLayerResidual(16, 32, "relu"), (8, 16)),
    "convolutional, batch": (lambda: ConvolutionalResidual(4, 6, "batch"), (8, 4, 6, 6)),
    "convolutional, none": (lambda: ConvolutionalResidual(4, 6, "none"), (8, 4, 6, 6)),
}


def permuted(block: TwoLayerResidual) -> None:
    """The same function with its neurons in another order."""
    order = torch.randperm(len(block.inner.weight))
    for p in (block.inner.weight, block.inner.bias):
        p.data = p.data[order]
    block.outer.weight.data = block.outer.weight.data[:, order]


def moved(chain: nn.Module, other: nn.Module, x: Tensor) -> float:
    """How far the other chain's last state is from this one's, relative to ‖x_N − x_0‖."""
    y = chain(x)
    return float((other(x) - y).norm() / (y - x).norm())


def chains(
    make: Callable[[], nn.Module], horizon: int, seed: int
) -> Iterator[tuple[str, str | None, ResidualChain]]:
    """Start, what it is known to be, chain."""
    starts: list[float | str] = ["independent", "identical", *LENGTH_SCALES]
    starts += ["permuted"] if isinstance(make(), TwoLayerResidual) else []
    for start in starts:
        torch.manual_seed(seed)
        blocks = [make().double() for _ in range(horizon)]
        known: str | None = "rough"
        if isinstance(start, float):
            smooth_start(blocks, start)
            known = "smooth" if horizon * start >= RESOLVED else None
        elif start == "identical":
            identical_start(blocks)
            known = "smooth"
        elif start == "permuted":
            smooth_start(blocks, 0.5)
            for block in blocks:
                permuted(block)
        name = f"GP {start}" if isinstance(start, float) else start
        yield name, known, ResidualChain(blocks, step=T / horizon).eval()


@torch.no_grad()
def chain_rows() -> Iterator[dict[str, Any]]:
    for family, (make, shape) in BLOCKS.items():
        for horizon in HORIZONS:
            for seed in SEEDS:
                for start, known, chain in chains(make, horizon, seed):
                    generator = torch.Generator().manual_seed(seed)
                    x = torch.randn(shape, generator=generator, dtype=torch.float64)
                    found = smoothness(chain)
                    yield {
                        "blocks": family,
                        "start": start,
                        "horizon": horizon,
                        "seed": seed,
                        "roughness": found.stages[0].roughness,
                        "kind": found.kind,
                        "known": known,
                        "coarsened": moved(chain, coarsen(chain, 2), x),
                        "refined": moved(chain, refine(chain, 2), x),
                    }


@torch.no_grad()
def by_roughness() -> list[dict[str, Any]]:
    """How far coarsening moves the output of chains of each roughness: median and largest."""
    seen = []
    for make, shape in BLOCKS.values():
        for horizon, seed, layers in product(HORIZONS[:-1], SEEDS, LAYERS):
            torch.manual_seed(seed)
            blocks = [make().double() for _ in range(horizon)]
            smooth_start(blocks, layers / horizon)
            chain = ResidualChain(blocks, step=T / horizon).eval()
            generator = torch.Generator().manual_seed(seed)
            x = torch.randn(shape, generator=generator, dtype=torch.float64)
            seen.append((smoothness(chain).stages[0].roughness, moved(chain, coarsen(chain, 2), x)))
    rows = []
    for above, up_to in pairwise(EDGES):
        own = [y for roughness, y in seen if above < roughness <= up_to]
        figures = {"median": median(own), "maximum": max(own)}
        rows.append({"above": above, "up_to": up_to, "chains": len(own), "coarsened": figures})
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Right and wrong verdicts, the worst figures of each kind, and slopes of the roughness.

    Permuted chains stand by themselves: their θ are rough, their φ are not.
    """
    known = [row for row in rows if row["known"]]
    kinds = {}
    for kind in ("smooth", "between", "rough", "permuted"):
        own = [
            row
            for row in rows
            if kind == ("permuted" if row["start"] == "permuted" else row["kind"])
        ]
        kinds[kind] = {
            "chains": len(own),
            **{
                what: [f([row[what] for row in own]) for f in (min, np.median, max)]
                for what in ("roughness", "coarsened", "refined")
            },
        }
    slopes = {}
    for family in BLOCKS:
        for start in ("independent", "GP 0.5"):
            own = [row for row in rows if (row["blocks"], row["start"]) == (family, start)]
            logs = np.log([(row["horizon"], row["roughness"]) for row in own])
            slopes[f"{family}, {start}"] = float(np.polyfit(*logs.T, 1)[0])
    return {
        "limits": {"smooth": SMOOTH, "rough": ROUGH},
        "known": len(known),
        "wrong": [row for row in known if row["kind"] != row["known"]],
        "minimum_median_maximum_by_kind": kinds,
        "slope_of_roughness_in_N": slopes,
    }


def medians(rows: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, list[float]]]]:
    """By blocks and start: the median over the seeds for each N."""
    table: dict[str, dict[str, dict[str, list[float]]]] = {}
    for family in BLOCKS:
        starts = dict.fromkeys(row["start"] for row in rows if row["blocks"] == family)
        table[family] = {
            start: {
                what: [
                    round(median(row[what] for row in rows if is_of(row, family, start, n)), 4)
                    for n in HORIZONS
                ]
                for what in ("roughness", "coarsened", "refined")
            }
            for start in starts
        }
    return table


def is_of(row: dict[str, Any], family: str, start: str, horizon: int) -> bool:
    return (row["blocks"], row["start"], row["horizon"]) == (family, start, horizon)


def by_stage(model: nn.Module) -> dict[str, Any]:
    """Roughness of each stage, and of each group in it."""
    found = smoothness(model)
    scale = math.sqrt(2)
    return {
        "kind": found.kind,
        "stages": [
            {
                "horizon": stage.horizon,
                "roughness": stage.roughness,
                "groups": {
                    name: float(np.sqrt(np.mean(np.square(speeds)))) / (scale * stage.horizon)
                    for name, speeds in stage.groups.items()
                },
            }
            for stage in found.stages
        ],
    }


def given_models(weights: Path | None) -> dict[str, Any]:
    torch.manual_seed(0)
    config = hf.ViTConfig(
        hidden_size=64, num_hidden_layers=12, num_attention_heads=4, intermediate_size=256,
        image_size=32, patch_size=8, num_labels=10,
    )  # fmt: skip
    found = {"ViT, random start": by_stage(hf.ViTForImageClassification(config))}
    for path in sorted(weights.glob("cifar10-resnet*.safetensors")) if weights else []:
        found[path.stem] = by_stage(CifarResNet.from_weights(path))
    return found


DIGITS = replace(recipe_for("digits"), epochs=15)
ODE = replace(DIGITS, depth=(32,), step=4 / 32, activation="gelu", stage_cost=0.0, weight_decay=0.0)
RECIPES = {
    "default recipe": DIGITS,
    "h = 4/N, GELU, no stage cost, AdamW": ODE,
    "h = 4/N, GELU, no stage cost, SGD": replace(ODE, optimizer="sgd", learning_rate=0.05),
}


def accuracy(model: ResidualClassifier, chain: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((model.head(chain(model.stem(x))).argmax(1) == y).double().mean())


@torch.no_grad()
def depths(model: ResidualClassifier, x: Tensor, y: Tensor) -> dict[str, float]:
    """Test accuracy as it is, coarsened and refined, and how far the last state moves."""
    chain: ResidualChain = model.stages[0]  # type: ignore[assignment]
    found = {"test_accuracy": accuracy(model, chain, x, y)}
    for name, other in (("coarsened", coarsen(chain, 2)), ("refined", refine(chain, 2))):
        found[f"test_accuracy_{name}"] = accuracy(model, other, x, y)
        found[name] = moved(chain, other, model.stem(x))
    return found


def digits_rows(runs: Path) -> Iterator[dict[str, Any]]:
    data = load_dataset("digits")
    x, y = data.test.batch(torch.arange(len(data.test)))
    for name, recipe in RECIPES.items():
        for start in ("independent", "smooth", "identical"):
            own: Recipe = replace(recipe, initialisation=start)
            before = smoothness(build_model(own, data))
            model: Any = train(own, runs=runs, quiet=True).model().eval()
            after = smoothness(model)
            yield {
                "recipe": name,
                "start": start,
                "roughness_before": before.stages[0].roughness,
                "roughness_after": after.stages[0].roughness,
                "kind_after": after.kind,
                **depths(model, x, y),
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, help="folder of cifar10-resnet*.safetensors")
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmarks/smoothness"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = list(chain_rows())
    found = summary(rows)
    print(json.dumps(found, indent=1))
    given = given_models(options.weights)
    for name, model in given.items():
        print(name, model["kind"], [round(stage["roughness"], 3) for stage in model["stages"]])
    digits = []
    for row in digits_rows(options.runs):
        print(row, flush=True)
        digits.append(row)
    RESULTS.parent.mkdir(exist_ok=True)
    plain = {"machine": machine(), **found, "given": given, "digits": digits}
    plain |= {
        "by_roughness": by_roughness(),
        "horizons": HORIZONS,
        "chains_median_of_seeds": medians(rows),
    }
    RESULTS.write_text(json.dumps(plain, indent=2) + "\n")


if __name__ == "__main__":
    main()
