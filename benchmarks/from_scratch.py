"""From scratch: trained too deep and cut, against the plain deep network and the plain small one.

    python benchmarks/from_scratch.py mnist --data-dir PATH
    python benchmarks/from_scratch.py cifar10 --data-dir PATH --kind cifar-resnet --depth 9 9 9
        --epochs 15 --optimizer sgd --learning-rate 0.1 --precision bf16-mixed --seeds 0
        --fade 6 10 --fade 4 8 --anneal 6 8 --cut-after 6

All networks of a seed train for the same number of epochs with the same recipe but for the stage
cost. The depth of the cut is chosen on validation data, at most half of the blocks; the small
network has the cut's blocks per stage.

Cut while they train, to 13 equally spaced layers, for no more multiply-adds than the deep network
takes, each with the one-cycle schedule of all its epochs:

    faded     (--fade B E) the plain deep network; from epoch B to epoch E the layers that go lose
              their step size bit by bit; to the same number of epochs
    annealed  (--anneal B E) the same, with the stage cost up to epoch B and without from there on
    beside    (--cut-after E) cut after epoch E; the deep network learns on too, and teaches the 13,
              for as many epochs as that leaves
    cut       (--cut-after E) cut after epoch E, then for as many epochs as that leaves
    grown     (--cut-after, CIFAR ResNets only) the other way round: the plain small network to the
              same number of epochs; from the epoch on from which that leaves multiply-adds for it,
              the layers that it lacks stand in a copy of it, at first without any effect, and this
              deeper network learns too, and teaches it

With --cut-after also the plain network of their size for the deep one's multiply-adds. Which of
several faded or annealed ones is the one to take, their accuracy on validation data says.

Figures are of test data. A run that was stopped goes on, a finished one is not trained again. The
networks with a stage cost to the end come last. One JSON file per data set, with a row per seed,
is written to benchmarks/results/, after each network; rows of seeds that are not asked for stay, if
their recipe is the same.
"""

import argparse
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from deeplimit.control import (
    Distillation,
    SoftCrossEntropy,
    StageCost,
    crop,
    turnpike_profile,
)
from deeplimit.network import CifarResNet
from deeplimit.studies.harness import machine
from deeplimit.training import Recipe, RunFolder, crop_run, profile_run, recipe_for, resume
from deeplimit.training.building import (
    Fade,
    Start,
    build_model,
    evaluation_batches,
    load_data,
)
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
from pretrained_budget import BESIDE, SOFTER, spread

RESULTS = Path(__file__).parent / "results"
MAY_LOSE = 0.001  # accuracy on validation data
AGAIN = "run this script again"


def trained(recipe: Recipe, runs: Path, name: str) -> RunFolder:
    """A run of this name, trained now or before."""
    if not (runs / name).is_dir():
        new = RunFolder.create(runs, name, recipe, load_data(recipe, runs).class_names)
        copy_beginning(runs, name, recipe.epochs, new.path)
    folder = resume(runs / name)
    if replace(folder.recipe, data_dir=None) != replace(recipe, data_dir=None):
        raise SystemExit(f"{folder.path} is of another recipe; give another --runs")
    return folder


def begun(recipe: Recipe, runs: Path, name: str, epochs: int) -> Checkpoint:
    """A run after its first epochs, from where a run of this name, or one after more, goes on."""
    kept = runs / f"{name}-first-{epochs}"
    if not kept.is_dir():
        kept.mkdir(parents=True)
        copy_beginning(runs, name, epochs, kept)
    data = load_data(recipe, runs)
    start = Start(recipe, data, build_model(recipe, data))
    fit(launch(recipe), start, kept, title=kept.name, command=AGAIN, until=epochs)
    checkpoint = load_checkpoint(kept)
    assert checkpoint is not None  # it was written just now
    return checkpoint


def copy_beginning(runs: Path, name: str, epochs: int, to: Path) -> None:
    """The run of this name after the most epochs that are kept, at most so many, if any are."""
    kept = [runs / f"{name}-first-{e}" / FOLDER for e in range(1, epochs + 1)]
    if there := [path for path in kept if path.is_dir()]:
        shutil.copytree(there[-1], to / FOLDER)


def cut_in_training(recipe: Recipe, runs: Path, way: str, deep: Checkpoint) -> dict[str, Any]:
    """13 layers of a network that is half trained, on to the end."""
    data = load_data(recipe, runs)
    whole = build_model(recipe, data)
    whole.load_state_dict(deep.model)
    gone = spread(whole)
    few, kept = crop(whole, remove=gone), recipe.horizon - len(gone)
    each = kept + (recipe.horizon if way == "beside" else 0)
    epochs = deep.epochs + (recipe.epochs - deep.epochs) * recipe.horizon // each
    objective = beside(whole) if way == "beside" else StageCost
    start = Start(replace(recipe, epochs=epochs), data, few, objective)
    return trained_on(start, deep, runs, way)


def faded(recipe: Recipe, runs: Path, window: list[int], gamma: float) -> dict[str, Any]:
    """All but 13 layers of a network fade out from one epoch to another, the stage cost at once."""
    begin, end = window
    data = load_data(recipe, runs)
    name = f"{recipe.data}-{recipe.seed}" + ("" if gamma else "-plain")
    deep = begun(replace(recipe, stage_cost=gamma), runs, name, begin)
    whole = build_model(recipe, data)
    whole.load_state_dict(deep.model)
    fade = Fade(tuple(spread(whole)), end / recipe.epochs, begin / recipe.epochs)
    way = "annealed" if gamma else "faded"
    found = trained_on(Start(recipe, data, whole, fade=fade), deep, runs, f"{way}-{begin}-{end}")
    return {"to_epoch": end} | found


def grown(recipe: Recipe, runs: Path, few: Checkpoint, depth: tuple[int, ...]) -> dict[str, Any]:
    """A small network that is half trained, on to the end beside a deeper one that begins as it."""
    data = load_data(recipe, runs)
    small = replace(recipe, depth=depth)
    model, whole = build_model(small, data), build_model(recipe, data)
    model.load_state_dict(few.model)
    gone = set(spread(whole))
    assert isinstance(whole, CifarResNet)
    for n, layer in enumerate(layer for stage in whole.stages for layer in stage):
        if n in gone:
            nn.init.zeros_(layer.bn2.weight)  # nothing is added to its input
    whole.without(gone).load_state_dict(few.model)  # it shares its modules with the whole one
    start = Start(small, data, model, beside(whole))
    return trained_on(start, few, runs, "grown")


def beside(whole: nn.Module) -> Callable[..., StageCost]:
    """The objective of a network beside which another one learns."""
    settings: dict[str, Any] = {"teacher_weight": BESIDE, "temperature": SOFTER, "learns": True}
    return partial(Distillation, teacher=whole, **settings)


def trained_on(start: Start, begun: Checkpoint, runs: Path, way: str) -> dict[str, Any]:
    """What a network reaches on test data, as if the epochs of the checkpoint had been its own.

    Goes on where it was stopped.
    """
    recipe, fabric = start.recipe, launch(start.recipe)
    folder = runs / f"{recipe.data}-{recipe.seed}-{way}"
    folder.mkdir(parents=True, exist_ok=True)
    if load_checkpoint(folder) is None:
        new = Training(fabric, start, None)
        for _ in range(begun.step):
            new.optimizer.step()  # without gradients nothing moves
            new.schedule.step()
        weights, optimizer = capture(new.learning, new.optimizer)
        new.end()
        schedule = new.schedule.state_dict()
        save_checkpoint(folder, Checkpoint(weights, optimizer, schedule, begun.step, begun.rows))
    training = fit(fabric, start, folder, title=folder.name, command=AGAIN)
    network = training.end().eval()
    if start.fade is not None:
        network = crop(network, remove=start.fade.layers)
    found = {
        "from_epoch": begun.epochs,
        "epochs": recipe.epochs,
        "validation": accuracy(network, recipe, runs, "validation"),
        "accuracy": accuracy(network, recipe, runs),
    }
    if isinstance(training.objective, Distillation):  # a copy of its teacher has learnt
        found["teacher"] = accuracy(training.objective.teacher.eval(), recipe, runs)
    return found


def accuracy_on_test(folder: RunFolder) -> float:
    """Of a run's network."""
    return accuracy(folder.model(), folder.recipe, folder.path.parent)


def accuracy(model: nn.Module, recipe: Recipe, runs: Path, part: str = "test") -> float:
    """On one part of the data."""
    data = load_data(recipe, runs)
    loss = SoftCrossEntropy(len(data.class_names), recipe.softness)
    return turnpike_profile(model, evaluation_batches(getattr(data, part)), loss).accuracy[-1]


def half_trained(
    recipe: Recipe, runs: Path, depth: tuple[int, ...], options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """What becomes of the networks cut or grown while they train; each time one more of them."""
    alike = replace(recipe, stage_cost=0.0, control_cost=0.0)
    name = f"{recipe.data}-{recipe.seed}-plain"
    found: dict[str, Any] = {"blocks": depth}
    for way, gamma in (("faded", 0.0), ("annealed", recipe.stage_cost)):
        for window in sorted(getattr(options, way)):
            found.setdefault(way, []).append(faded(alike, runs, window, gamma))
            yield found
    if options.cut_after is None:
        return
    deep = begun(alike, runs, name, options.cut_after)
    for way in ("beside", "cut"):
        found[way] = cut_in_training(alike, runs, way, deep)
        yield found
    same = "x".join(map(str, depth))
    longer = replace(alike, depth=depth, epochs=recipe.epochs * recipe.horizon // sum(depth))
    run = trained(longer, runs, f"{name}-{same}-{longer.epochs}")
    found["plain_for_longer"] = {"epochs": longer.epochs, "accuracy": accuracy_on_test(run)}
    yield found
    if recipe.kind == "cifar-resnet":
        found["grown"] = grown(alike, runs, small_begun(alike, runs, depth), depth)
        yield found


def small_begun(recipe: Recipe, runs: Path, depth: tuple[int, ...]) -> Checkpoint:
    """The plain small network at the epoch from which a deeper one can learn beside it."""
    name = f"{recipe.data}-{recipe.seed}-plain-" + "x".join(map(str, depth))
    saved = recipe.epochs * (recipe.horizon - sum(depth)) // recipe.horizon
    return begun(replace(recipe, depth=depth), runs, name, recipe.epochs - saved)


def small(recipe: Recipe, runs: Path, depth: tuple[int, ...]) -> float:
    """What the plain network of a cut's size reaches on test data."""
    alike = replace(recipe, depth=depth, stage_cost=0.0, control_cost=0.0)
    name = f"{recipe.data}-{recipe.seed}-plain-" + "x".join(map(str, depth))
    return accuracy_on_test(trained(alike, runs, name))


def without_stage_cost(recipe: Recipe, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One seed's plain networks and those cut while they train, network after network."""
    runs, name = options.runs, f"{recipe.data}-{recipe.seed}"
    alike = replace(recipe, stage_cost=0.0, control_cost=0.0)
    cuts = [] if options.cut_after is None else [options.cut_after]
    for epochs in sorted({begin for begin, _ in options.faded} | set(cuts)):
        begun(alike, runs, f"{name}-plain", epochs)
    for epochs in sorted({begin for begin, _ in options.annealed}):
        begun(recipe, runs, name, epochs)
    row: dict[str, Any] = {"seed": recipe.seed, "blocks": sum(recipe.depth)}
    row["plain"] = accuracy_on_test(trained(alike, runs, f"{name}-plain"))
    yield row
    if options.faded or options.annealed or cuts:
        whole = build_model(alike, load_data(alike, runs))
        depth = tuple(map(len, crop(whole, remove=spread(whole)).stages))
        if cuts and recipe.kind == "cifar-resnet":
            small_begun(alike, runs, depth)
        row["plain_of_their_size"] = small(recipe, runs, depth)
        for row["half_trained"] in half_trained(recipe, runs, depth, options):
            yield row


def with_stage_cost(recipe: Recipe, runs: Path) -> dict[str, Any]:
    """One seed's network with stage cost, cut where validation data says, and one of its size."""
    run_folder = trained(recipe, runs, f"{recipe.data}-{recipe.seed}")
    profile_run(run_folder)
    cut, half = crop_run(run_folder, "auto", accuracy=MAY_LOSE), sum(recipe.depth) // 2
    if cut.report.horizon_after > half:
        cut = crop_run(run_folder, "auto", blocks=half)
    report = cut.report
    depth = run_folder.cropped().architecture.depths
    return {
        "cut_to": depth,
        "with_stage_cost": report.accuracy_before,
        "cut": report.accuracy_after,
        "plain_of_the_cuts_size": small(recipe, runs, depth),
    }


class Results:
    """The results file: a row per seed. Rows of other seeds of the same recipe stay in it."""

    def __init__(self, recipe: Recipe) -> None:
        self.path = RESULTS / f"from_scratch_{recipe.data}.json"
        alike = asdict(replace(recipe, data_dir=None, seed=0))
        self.recipe = json.loads(json.dumps(alike, default=str))
        self.rows: dict[int, dict[str, Any]] = {}
        if self.path.is_file():
            before = json.loads(self.path.read_text())
            if before["recipe"] | {"seed": 0} == self.recipe:
                self.rows = {row["seed"]: row for row in before["runs"]}

    def write(self, row: dict[str, Any]) -> None:
        """One row, new or in place of the one that was there."""
        print(row, flush=True)
        self.rows[row["seed"]] = row
        rows = [self.rows[seed] for seed in sorted(self.rows)]
        result = {"machine": machine(), "recipe": self.recipe, "runs": rows}
        self.path.write_text(json.dumps(result, indent=2, default=str) + "\n")


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
    for way, dest in (("--fade", "faded"), ("--anneal", "annealed")):
        parser.add_argument(
            way, dest=dest, type=int, nargs=2, metavar=("B", "E"), action="append", default=[]
        )
    parser.add_argument("--cut-after", type=int, metavar="E")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    options = parser.parse_args()
    base = recipe_for(options.data)
    given = {k: v for k, v in vars(options).items() if v is not None and hasattr(base, k)}
    if options.depth:
        given["depth"] = tuple(options.depth)
    base = replace(base, **given)
    for begin, end in (*options.faded, *options.annealed):
        if not 0 < begin < end < base.epochs:
            parser.error(f"epochs {begin} to {end} given; expected 0 < B < E < {base.epochs}")
    if options.cut_after is not None and not 0 < options.cut_after < base.epochs:
        parser.error(f"--cut-after {options.cut_after} given; expected 0 < E < {base.epochs}")
    if options.annealed and not base.stage_cost:
        parser.error("--anneal given, but there is no stage cost; give --stage-cost above 0")
    results = Results(base)
    each = [replace(base, seed=seed) for seed in options.seeds]
    rows = []
    for recipe in each:
        for row in without_stage_cost(recipe, options):
            results.write(row)
        rows.append(row)
    if base.stage_cost:
        for recipe, row in zip(each, rows, strict=True):
            results.write(row | with_stage_cost(recipe, options.runs))


if __name__ == "__main__":
    main()
