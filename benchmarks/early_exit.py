"""Early exit of trained runs: is the risk kept, how deep do samples go, how long does it take.

    python benchmarks/early_exit.py runs/benchmarks/mnist-0 … -o benchmarks/results/early_exit.json

Of each run the test data are split in two a hundred times: on one half exits and thresholds are
chosen, on the other the share of samples is counted whose answer is not the whole network's. The
guarantee is that this share is at most the risk, in the mean over all samples to come, in 95 of
100 choices. Then batches of 256 run through the network and through `EarlyExit`, in turns, with the
validation data. The rival is the network cut where validation data allow it, of the same run.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor

from deeplimit import EarlyExit, anatomy, exit_depths
from deeplimit.control.exit_choice import chosen_exits, measured_answers
from deeplimit.studies.harness import machine
from deeplimit.training import RunFolder
from deeplimit.training.building import evaluation_batches, run_data

SPLITS, BATCH, ROUNDS = 100, 256, 7
CONFIDENCE = 0.95


def seconds(run: Any, batches: list[Tensor]) -> float:
    """Of one pass over the batches."""
    began = time.perf_counter()
    for x in batches:
        run(x)
    return time.perf_counter() - began


@torch.no_grad()
def figures(path: Path, risk: float) -> dict[str, Any]:
    """What early exit does to one run."""
    folder = RunFolder.open(path)
    model, data = folder.model().eval(), run_data(folder)
    structure = anatomy(model)
    answers = measured_answers(structure, evaluation_batches(data.test))
    kept, depths, shares, works = 0, [], [], []
    for seed in range(SPLITS):
        order = torch.randperm(answers.count, generator=torch.Generator().manual_seed(seed))
        calibration, other = map(answers.rows, order.tensor_split(2))
        choice = chosen_exits(calibration, risk, CONFIDENCE)
        thresholds = dict(choice.thresholds)
        share = other.wrong(thresholds) / other.count
        kept += share <= risk
        shares.append(share)
        depths.append(float(other.left_at(thresholds).double().mean()))
        works.append(other.work(thresholds) / answers.costs[-1])
    choice = exit_depths(model, evaluation_batches(data.validation), risk=risk)
    early = EarlyExit(model, choice.thresholds).eval()
    x = torch.cat([x for x, _ in evaluation_batches(data.test)])
    batches = list(x[: len(x) // BATCH * BATCH].split(BATCH))
    for run in (model, early):
        run(batches[0])
    times = [(seconds(model, batches), seconds(early, batches)) for _ in range(ROUNDS)]
    whole, left = (torch.cat([run(b).argmax(-1) for b in batches]) for run in (model, early))
    y = torch.cat([y for _, y in evaluation_batches(data.test)])[: len(whole)]
    cut = folder.cut()
    return {
        "run": path.name,
        "layers": structure.horizon,
        "risk": risk,
        "splits": SPLITS,
        "splits_in_which_the_risk_was_kept": kept,
        "share_answered_otherwise": {"mean": mean(shares), "largest": max(shares)},
        "mean_depth": mean(depths),
        "multiply_adds": mean(works),
        "thresholds_by_validation": choice.thresholds,
        "test_samples": len(whole),
        "test_answered_otherwise": int((whole != left).sum()),
        "test_accuracy": {
            "whole": float((whole == y).double().mean()),
            "early": float((left == y).double().mean()),
        },
        "seconds_whole": median(a for a, _ in times),
        "seconds_early": median(b for _, b in times),
        "time": median(b / a for a, b in times),
        "cut_of_the_same_run": None if cut is None else cut.report.horizon_after,
    }


def main() -> None:
    """Measures each run, and writes the figures after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--risk", type=float, default=0.01)
    parser.add_argument("-o", "--out", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for path in options.runs:
        rows.append(figures(path, options.risk))
        print(json.dumps(rows[-1], indent=2))
        if options.out is not None:
            text = json.dumps(
                {"machine": machine(), "confidence": CONFIDENCE, "runs": rows}, indent=2
            )
            options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
