"""From scratch: trained too deep and cut, against the plain deep network and the plain small one.

    python benchmarks/from_scratch.py mnist --data-dir PATH
    python benchmarks/from_scratch.py cifar10 --data-dir PATH --kind cifar-resnet --depth 9 9 9
        --epochs 15 --optimizer sgd --learning-rate 0.1 --precision bf16-mixed --beside 10

All networks of a seed train for the same number of epochs with the same recipe but for the stage
cost. The depth of the cut is chosen on validation data; the small network has the cut's blocks per
stage. With --beside E two networks more, from one start: the deep one, and 13 equally spaced layers
of it, which learn from it while it learns; of a ResNet-56 E = 10 epochs of both cost as many
multiply-adds as 15 of the deep one. Figures are of test data. A run that was stopped goes on, a
finished one is not trained again; one JSON file per data set is written to benchmarks/results/,
after each seed.
"""

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import nn

from deeplimit.control import SoftCrossEntropy, crop, turnpike_profile
from deeplimit.training import Recipe, RunFolder, crop_run, profile_run, recipe_for, resume, train
from deeplimit.training.building import Start, Teaching, build_model, evaluation_batches, load_data
from deeplimit.training.fit import fit
from deeplimit.training.processes import launch
from machine import machine
from pretrained_budget import BESIDE, SOFTER, spread

RESULTS = Path(__file__).parent / "results"
MAY_LOSE = 0.001  # accuracy on validation data


def trained(recipe: Recipe, runs: Path, name: str) -> RunFolder:
    """A run of this name, trained now or before."""
    there = (runs / name).is_dir()
    folder = resume(runs / name) if there else train(recipe, runs=runs, name=name)
    if replace(folder.recipe, data_dir=None) != replace(recipe, data_dir=None):
        raise SystemExit(f"{folder.path} is of another recipe; give another --runs")
    return folder


def beside(recipe: Recipe, runs: Path, name: str) -> tuple[nn.Module, nn.Module]:
    """The 13 layers, and the deep network that they learnt from; goes on where it was stopped."""
    data = load_data(recipe, runs)
    deep = build_model(recipe, data)
    few = crop(deep, remove=spread(deep))
    folder = runs / name
    folder.mkdir(parents=True, exist_ok=True)
    start = Start(recipe, data, few, Teaching(deep, BESIDE, SOFTER, learns=True))
    training = fit(launch(recipe), start, folder, title=name, command="run this script again")
    taught: Any = training.objective  # its teacher is a copy that has learnt
    return training.end().eval(), taught.teacher.eval()


def accuracy_on_test(folder: RunFolder) -> float:
    """Of a run's network."""
    return accuracy(folder.model(), folder.recipe, folder.path.parent)


def accuracy(model: nn.Module, recipe: Recipe, runs: Path) -> float:
    """On test data."""
    data = load_data(recipe, runs)
    loss = SoftCrossEntropy(len(data.class_names), recipe.softness)
    return turnpike_profile(model, evaluation_batches(data.test), loss).accuracy[-1]


def run(recipe: Recipe, runs: Path, beside_epochs: int | None) -> dict[str, Any]:
    """One seed."""
    name = f"{recipe.data}-{recipe.seed}"
    deep = trained(recipe, runs, name)
    profile_run(deep)
    report = crop_run(deep, "auto", accuracy=MAY_LOSE).report
    plain = trained(replace(recipe, stage_cost=0.0, control_cost=0.0), runs, f"{name}-plain")
    depth = deep.cropped().architecture.depths
    same = "x".join(map(str, depth))
    small = replace(recipe, stage_cost=0.0, control_cost=0.0, depth=depth)
    little = trained(small, runs, f"{name}-plain-{same}")
    row = {
        "seed": recipe.seed,
        "blocks": sum(recipe.depth),
        "cut_to": depth,
        "with_stage_cost": report.accuracy_before,
        "cut": report.accuracy_after,
        "plain": accuracy_on_test(plain),
        "plain_of_the_cuts_size": accuracy_on_test(little),
    }
    if beside_epochs is not None:
        alike = replace(recipe, stage_cost=0.0, control_cost=0.0)
        few, teacher = beside(replace(alike, epochs=beside_epochs), runs, f"{name}-beside")
        own = few.architecture.depths
        same = "x".join(map(str, own))
        little = trained(replace(alike, depth=own), runs, f"{name}-plain-{same}")
        row |= {
            "beside_blocks": own,
            "beside": accuracy(few, recipe, runs),
            "beside_teacher": accuracy(teacher, recipe, runs),
            "plain_of_its_size": accuracy_on_test(little),
        }
    print(row, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--kind")
    parser.add_argument("--depth", type=int, nargs="+")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--stage-cost", type=float)
    parser.add_argument("--optimizer", choices=("adamw", "sgd"))
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--precision")
    parser.add_argument("--beside", type=int, metavar="EPOCHS")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    options = parser.parse_args()
    base = recipe_for(options.data)
    given = {k: v for k, v in vars(options).items() if v is not None and hasattr(base, k)}
    if options.depth:
        given["depth"] = tuple(options.depth)
    base = replace(base, **given)
    recipe = asdict(replace(base, data_dir=None))
    path = RESULTS / f"from_scratch_{options.data}.json"
    rows: list[dict[str, Any]] = []
    for seed in options.seeds:
        rows.append(run(replace(base, seed=seed), options.runs, options.beside))
        result = {"machine": machine(), "recipe": recipe, "runs": rows}
        path.write_text(json.dumps(result, indent=2, default=str) + "\n")


if __name__ == "__main__":
    main()
