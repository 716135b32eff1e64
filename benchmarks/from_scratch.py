"""From scratch: trained too deep and cut, against the plain deep network and the plain small one.

    python benchmarks/from_scratch.py mnist --data-dir PATH
    python benchmarks/from_scratch.py cifar10 --data-dir PATH --kind cifar-resnet --depth 9 9 9
        --epochs 15 --optimizer sgd --learning-rate 0.1 --precision bf16-mixed --seeds 0
        --beside 6 12

All networks of a seed train for the same number of epochs with the same recipe but for the stage
cost. The depth of the cut is chosen on validation data, at most half of the blocks; the small
network has the cut's blocks per stage.

With --beside A B two networks more: the plain deep one as it was after A epochs, and 13 equally
spaced layers cut out of it then, which learn from it while it learns, until epoch B and with the
learning rates of B epochs. Of a ResNet-56 (27 blocks) that is 27·6 + (27 + 13)·6 = 402 blocks times
epochs, against 27·15 = 405 of the plain deep one.

Figures are of test data. A run that was stopped goes on, a finished one is not trained again; one
JSON file per data set is written to benchmarks/results/, after each network.
"""

import argparse
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import nn

from deeplimit.control import SoftCrossEntropy, crop, turnpike_profile
from deeplimit.training import Recipe, RunFolder, crop_run, profile_run, recipe_for, resume, train
from deeplimit.training.building import Start, Teaching, build_model, evaluation_batches, load_data
from deeplimit.training.checkpoint import (
    FOLDER,
    Checkpoint,
    capture,
    load_checkpoint,
    save_checkpoint,
)
from deeplimit.training.fit import fit
from deeplimit.training.loop import Training
from deeplimit.training.processes import launch
from machine import machine
from pretrained_budget import BESIDE, SOFTER, spread

RESULTS = Path(__file__).parent / "results"
MAY_LOSE = 0.001  # accuracy on validation data
AGAIN = "run this script again"


def trained(recipe: Recipe, runs: Path, name: str) -> RunFolder:
    """A run of this name, trained now or before."""
    there = (runs / name).is_dir()
    folder = resume(runs / name) if there else train(recipe, runs=runs, name=name)
    if replace(folder.recipe, data_dir=None) != replace(recipe, data_dir=None):
        raise SystemExit(f"{folder.path} is of another recipe; give another --runs")
    return folder


def begun(recipe: Recipe, runs: Path, name: str, epochs: int) -> Checkpoint:
    """A run after its first epochs, from where a run folder of this name goes on."""
    data = load_data(recipe, runs)
    kept = runs / f"{name}-first-{epochs}"
    kept.mkdir(parents=True, exist_ok=True)
    start = Start(recipe, data, build_model(recipe, data))
    fit(launch(recipe), start, kept, title=kept.name, command=AGAIN, until=epochs)
    if not (runs / name).exists():
        whole = RunFolder.create(runs, name, recipe, data.class_names)
        shutil.copytree(kept / FOLDER, whole.path / FOLDER)
    checkpoint = load_checkpoint(kept)
    assert checkpoint is not None  # it was written just now
    return checkpoint


def beside(recipe: Recipe, runs: Path, name: str, deep: Checkpoint) -> tuple[nn.Module, nn.Module]:
    """The 13 layers, and the deep network that they learnt from; goes on where it was stopped."""
    data = load_data(recipe, runs)
    whole = build_model(recipe, data)
    whole.load_state_dict(deep.model)
    few = crop(whole, remove=spread(whole))
    folder = runs / name
    folder.mkdir(parents=True, exist_ok=True)
    start = Start(recipe, data, few, Teaching(whole, BESIDE, SOFTER, learns=True))
    fabric = launch(recipe)
    if load_checkpoint(folder) is None:
        both = Training(fabric, start, None)
        for _ in range(deep.step):
            both.optimizer.step()  # without gradients nothing moves
            both.schedule.step()
        weights, optimizer = capture(both.learning, both.optimizer)
        schedule = both.schedule.state_dict()
        save_checkpoint(folder, Checkpoint(weights, optimizer, schedule, deep.step, deep.rows))
    training = fit(fabric, start, folder, title=name, command=AGAIN)
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


def run(recipe: Recipe, runs: Path, epochs: tuple[int, int] | None) -> Iterator[dict[str, Any]]:
    """One seed, network after network."""
    name = f"{recipe.data}-{recipe.seed}"
    alike = replace(recipe, stage_cost=0.0, control_cost=0.0)

    def small(depth: tuple[int, ...]) -> float:
        same = "x".join(map(str, depth))
        return accuracy_on_test(trained(replace(alike, depth=depth), runs, f"{name}-plain-{same}"))

    row: dict[str, Any] = {"seed": recipe.seed, "blocks": sum(recipe.depth)}
    if epochs is not None:
        first, last = epochs
        deep = begun(alike, runs, f"{name}-plain", first)
        few, teacher = beside(replace(alike, epochs=last), runs, f"{name}-beside", deep)
        depth = tuple(map(len, few.stages))
        row["beside"] = {
            "deep_alone": first,
            "epochs": last,
            "blocks": depth,
            "blocks_times_epochs": sum(recipe.depth) * last + sum(depth) * (last - first),
            "accuracy": accuracy(few, recipe, runs),
            "teacher": accuracy(teacher, recipe, runs),
            "plain_of_its_size": small(depth),
        }
        yield row
    row["plain"] = accuracy_on_test(trained(alike, runs, f"{name}-plain"))
    yield row
    run_folder = trained(recipe, runs, name)
    profile_run(run_folder)
    cut, half = crop_run(run_folder, "auto", accuracy=MAY_LOSE), sum(recipe.depth) // 2
    if cut.report.horizon_after > half:
        cut = crop_run(run_folder, "auto", blocks=half)
    report = cut.report
    depth = run_folder.cropped().architecture.depths
    row |= {
        "cut_to": depth,
        "with_stage_cost": report.accuracy_before,
        "cut": report.accuracy_after,
        "plain_of_the_cuts_size": small(depth),
    }
    yield row


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
    parser.add_argument("--beside", type=int, nargs=2, metavar=("A", "B"))
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
        for row in run(replace(base, seed=seed), options.runs, options.beside):
            print(row, flush=True)
            result = {"machine": machine(), "recipe": recipe, "runs": [*rows, row]}
            path.write_text(json.dumps(result, indent=2, default=str) + "\n")
        rows.append(row)


if __name__ == "__main__":
    main()
