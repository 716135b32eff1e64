"""The depth that networks of three data sets use: trained too deep, profiled, cut, on test data.

    python benchmarks/depth_found.py digits spirals
    python benchmarks/depth_found.py mnist --data-dir PATH

Three seeds each, with the data set's default recipe; one JSON file per data set is written to
benchmarks/results/, with the machine and the versions, after each seed. A run that was stopped goes
on, a finished one is not trained again. "seconds" are those of the training's epochs, evaluation
included; with those of its control for digits.
"""

import argparse
import json
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from deeplimit.control import CropResult
from deeplimit.studies.harness import machine
from deeplimit.training import (
    RunFolder,
    complete,
    crop_run,
    profile_run,
    recipe_for,
    resume,
    train,
)

RESULTS = Path(__file__).parent / "results"
GIVEN_DEPTH = {"mnist": 8}  # cut there too, beside the depth that validation chooses
MAY_LOSE = {"mnist": 0.001}  # accuracy on validation data; the recipe's points elsewhere


def figures(
    folder: RunFolder, seed: int, seconds: float, given: CropResult | None
) -> dict[str, Any]:
    """What one run reached, on test data; the depth was chosen on validation data."""
    results = folder.results()
    test, cut = results.profiles.test, results.cut
    row = {
        "seed": seed,
        "seconds": round(seconds, 1),
        "test_accuracy": test.accuracy[-1],
        "entry": test.entry(),
        "layers_outside": test.outside(),
        "crop": asdict(cut.report),
    }
    if given is not None:
        row["crop_to_given_depth"] = asdict(given)
    if results.reference is not None:
        report = results.reference.report
        row["without_stage_cost"] = {
            "test_accuracy": report.accuracy_before,
            "test_accuracy_cut_to_the_same_depth": report.accuracy_after,
        }
        if (small := results.reference.small) is not None:
            row["from_scratch_without_stage_cost"] = {
                "layers": small.horizon_before,
                "test_accuracy": small.accuracy_before,
                "cut_less_this": small.accuracy_after - small.accuracy_before,
                "standard_error": small.accuracy_error,
            }
    return row


def run(data: str, seed: int, data_dir: Path | None, runs: Path) -> dict[str, Any]:
    """One seed of one data set, `digits` with its control."""
    began, given = time.perf_counter(), None
    if data == "digits":
        recipe = replace(recipe_for(data), control="plain", seed=seed)
        folder = train(recipe, runs=runs, quiet=True, then=partial(complete, quiet=True))
        seconds = time.perf_counter() - began
    else:
        recipe = replace(recipe_for(data), seed=seed, data_dir=data_dir)
        name = f"{data}-{seed}"
        there = (runs / name).is_dir()
        folder = resume(runs / name) if there else train(recipe, runs=runs, name=name)
        seconds = sum(row["seconds"] or 0.0 for row in folder.metrics())
        profile_run(folder)
        if data in GIVEN_DEPTH:
            given = crop_run(folder, GIVEN_DEPTH[data]).report
        crop_run(folder, "auto", accuracy=MAY_LOSE.get(data))
    return figures(folder, seed, seconds, given)


def written(data: str, recipe: dict[str, Any], row: dict[str, Any]) -> None:
    """Puts the row among those of other seeds of the same recipe."""
    path = RESULTS / f"{data}.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    plain = json.loads(json.dumps(recipe))
    kept = before.get("runs", []) if before.get("recipe") == plain else []
    merged = {row["seed"]: row for row in [*kept, row]}
    runs = [merged[seed] for seed in sorted(merged)]
    RESULTS.mkdir(exist_ok=True)
    path.write_text(
        json.dumps({"machine": machine(), "recipe": recipe, "runs": runs}, indent=2) + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="+", choices=["digits", "spirals", "mnist"])
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmarks"))
    options = parser.parse_args()
    for data in options.data:
        for seed in options.seeds:
            row = run(data, seed, options.data_dir, options.runs)
            crop = row["crop"]
            print(
                f"{data} seed {row['seed']}: {row['seconds']} s, entry {row['entry']}, "
                f"{crop['horizon_before']} → {crop['horizon_after']} layers, "
                f"{100 * crop['accuracy_before']:.2f} → {100 * crop['accuracy_after']:.2f} %"
            )
            written(data, asdict(recipe_for(data)) | {"data_dir": None, "seed": None}, row)


if __name__ == "__main__":
    main()
