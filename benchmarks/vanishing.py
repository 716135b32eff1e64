"""Layers that vanish exactly under a group norm, beside layers cut by a threshold on their updates.

    python benchmarks/vanishing.py digits

Three seeds each of the data set's default recipe with a control cost of each kind and weight r,
with the stage cost and without (γ = 0). Reported is, on test data, the accuracy of all layers; how
many layers are exactly the identity, and the accuracy without them, with the largest difference of
an answer in float64; and for thresholds τ how many layers move the validation samples by less than
τ of their length in the mean, and the accuracy without those. Nothing is chosen on test data. A
stopped run goes on with the rows that are missing.
"""

import argparse
import copy
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean

import torch

from by_hand import Results, Row, accuracy
from deeplimit.control import crop, turnpike_profile, vanished
from deeplimit.training import Recipe, recipe_for, train
from deeplimit.training.building import evaluation_batches, loss_of, run_data

RESULTS = Path(__file__).parent / "results"
THRESHOLDS = (0.01, 0.03, 0.1)
ARMS = (
    (0.1, None, 0.0),
    (0.1, "group", 10.0),
    (0.1, "squared", 1e-2),
    (0.1, "group", 3.0),
    (0.0, None, 0.0),
    (0.0, "group", 10.0),
    (0.1, "kinetic", 1e-2),
    (0.1, "squared", 1e-3),
    (0.1, "group", 1.0),
)


def measured(recipe: Recipe) -> Row:
    """Trains one network and takes layers away."""
    with tempfile.TemporaryDirectory() as runs:
        folder = train(recipe, runs=runs, quiet=True)
    model, data = folder.network, folder.data or run_data(folder)
    assert model is not None
    gone = vanished(model)
    exact = copy.deepcopy(model).double()
    x = torch.cat([x for x, _ in evaluation_batches(data.test)]).double()
    with torch.no_grad():
        apart = float((crop(exact, remove=gone)(x) - exact(x)).abs().max())
    profile = turnpike_profile(model, evaluation_batches(data.validation), loss_of(recipe, data))
    cuts = []
    for threshold in THRESHOLDS:
        still = [n for n, update in enumerate(profile.relative_update) if update < threshold]
        left = round(100 * accuracy(crop(model, remove=still), data.test), 2)
        cuts.append({"threshold": threshold, "removed": len(still), "test_accuracy": left})
    return {
        "test_accuracy": round(100 * accuracy(model, data.test), 2),
        "vanished": gone,
        "without_them": round(100 * accuracy(crop(model, remove=gone), data.test), 2),
        "largest_difference": apart,
        "recommended_depth": profile.recommended_depth,
        "cuts": cuts,
    }


def summary(rows: Sequence[Row]) -> Row:
    """Means over the seeds of each arm."""
    arms: dict[str, list[Row]] = {}
    for row in rows:
        arms.setdefault(f"γ {row['stage_cost']:g}, {row['kind']} {row['r']:g}", []).append(row)

    def of(own: list[Row]) -> Row:
        cuts = [
            {
                "threshold": threshold,
                "removed": round(mean(row["cuts"][k]["removed"] for row in own), 1),
                "test_accuracy": round(mean(row["cuts"][k]["test_accuracy"] for row in own), 2),
            }
            for k, threshold in enumerate(THRESHOLDS)
        ]
        return {
            "seeds": len(own),
            "test_accuracy": round(mean(row["test_accuracy"] for row in own), 2),
            "vanished": [len(row["vanished"]) for row in own],
            "without_them": round(mean(row["without_them"] for row in own), 2),
            "largest_difference": max(row["largest_difference"] for row in own),
            "cuts": cuts,
        }

    return {name: of(own) for name, own in arms.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    base = recipe_for(options.data)
    settings = asdict(base) | {"seed": None, "stage_cost": None, "control_cost": None}
    out = options.out or RESULTS / f"vanishing_{options.data}.json"
    results = Results(out, settings, ("stage_cost", "kind", "r", "seed"))
    for seed in options.seeds:
        for gamma, kind, r in ARMS:
            key = (gamma, kind or "none", r, seed)
            if results.has(*key):
                continue
            recipe = replace(
                base, seed=seed, stage_cost=gamma, control_cost=r, control_cost_kind=kind
            )
            row = dict(zip(results.keys, key, strict=True)) | measured(recipe)
            results.add(row, summary)
            print(f"{key}: {row['test_accuracy']} %, {len(row['vanished'])} vanished", flush=True)


if __name__ == "__main__":
    main()
