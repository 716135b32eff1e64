"""Progressive depth: trained with N layers, then 2N, then 4N, against 4N from the start.

    python benchmarks/progressive.py digits --seeds 0 1 2 3 4 5 6 7 8 9
    python benchmarks/progressive.py mnist --data-dir PATH

x_{n+1} = x_n + hφ(x_n, θ_n) with h = 4/N, GELU, layers that start alike, no stage cost; otherwise
the data set's default recipe. `refine(model, 2, optimizer=...)` doubles the depth after each third
of the epochs. All arms of a seed have the same stem, head and first layer at the start, the same
batches in the same order, and one cycle of the learning rate over all epochs. Beside the two arms
stands the network of N layers, trained for as many epochs, for what depth is worth at all.
Multiply-adds are those of the residual blocks, forward, over all samples trained on.
"""

import argparse
import statistics
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import torch

from by_hand import (
    Results,
    Row,
    accuracy,
    blocks_multiply_adds,
    clocks,
    optimizer_of,
    since,
    train_epoch,
)
from deeplimit.data import DataSet
from deeplimit.ode import refine, smoothness
from deeplimit.training import Recipe, build_model, recipe_for
from deeplimit.training.building import load_data
from drawing import write

RESULTS = Path(__file__).parent / "results"
DEPTH, T = 24, 4.0  # 4N, and the time that the layers divide among them
FACTORS = (1, 2, 4)  # of N: a third of the epochs each
EPOCHS = {"digits": 60, "mnist": 6}
PLANS = {"progressive": FACTORS, "deep": (4,), "shallow": (1,)}
TITLES = {
    "deep": ("4N layers from the start", "#D55E00"),
    "shallow": ("N layers", "#777777"),
    "progressive": ("N, 2N, 4N layers, refined", "#0072B2"),
}


def recipe_of(data: str, epochs: int | None, data_dir: Path | None) -> Recipe:
    """For 4N layers; the epochs are those of all arms."""
    usual = recipe_for(data)
    return replace(
        usual,
        data_dir=data_dir,
        depth=(DEPTH,),
        step=T / DEPTH,
        activation="gelu",
        initialisation="identical",
        stage_cost=0.0,
        epochs=epochs or EPOCHS[data],
        reduction=8 if data == "mnist" else usual.reduction,
    )


def trained(recipe: Recipe, data: DataSet, plan: tuple[int, ...]) -> Row:
    """One arm: equal numbers of epochs with each of the plan's multiples of N layers."""
    layers = DEPTH * plan[0] // FACTORS[-1]
    model: Any = build_model(replace(recipe, depth=(layers,), step=T / layers), data)
    optimizer = optimizer_of(recipe, model)
    each, began, refined, paid = recipe.epochs // len(plan), clocks(), [], 0
    curve: Row = {}
    for epoch in range(recipe.epochs):
        if epoch and epoch % each == 0:
            before, rough = accuracy(model, data.validation), smoothness(model).stages[0].roughness
            model = refine(model, 2, optimizer=optimizer)
            after = accuracy(model, data.validation)
            refined.append({"roughness": rough, "validation": [before, after]})
        cost, samples = blocks_multiply_adds(model, data), 0
        cycle, loss = range(recipe.epochs), []
        for value in train_epoch(model, optimizer, recipe, data, epoch, cycle):
            loss.append(value)
            samples += recipe.batch_size
        paid += cost * samples
        validation = accuracy(model, data.validation)
        point = {"multiply_adds": paid, "loss": statistics.mean(loss), "validation": validation}
        for what, value in point.items():
            curve.setdefault(what, []).append(round(value, 4))
    return {
        "layers": model.stages[0].horizon,
        "step": model.stages[0].step,
        "multiply_adds": paid,
        "validation": validation,
        "test": accuracy(model, data.test),
        "roughness": smoothness(model).stages[0].roughness,
        "refined": refined,
        **since(began),
        "curve": curve,
    }


def run(recipe: Recipe, plans: dict[str, tuple[int, ...]]) -> Row:
    """One seed."""
    data = load_data(recipe, Path("runs"))
    row: Row = {"data": recipe.data, "seed": recipe.seed}
    for name, plan in plans.items():
        row[name] = trained(recipe, data, plan)
        told = {k: v for k, v in row[name].items() if k != "curve"}
        print(recipe.data, recipe.seed, name, told, flush=True)
    return row


def summary(rows: list[Row]) -> Row:
    """Means, and each seed's accuracy less that of 4N from the start, in points."""
    gap = [100 * (row["progressive"]["test"] - row["deep"]["test"]) for row in rows]

    def relative(name: str, what: str) -> float:
        return sum(row[name][what] for row in rows) / sum(row["deep"][what] for row in rows)

    return {
        "seeds": len(rows),
        "test": {name: statistics.mean(row[name]["test"] for row in rows) for name in PLANS},
        "multiply_adds_relative": {name: relative(name, "multiply_adds") for name in PLANS},
        "cpu_seconds_relative": {name: relative(name, "cpu_seconds") for name in PLANS},
        "progressive_less_deep": {
            "points": gap,
            "mean": statistics.mean(gap),
            "standard_error": statistics.stdev(gap) / len(gap) ** 0.5 if len(gap) > 1 else None,
        },
    }


def drawn(rows: list[Row]) -> go.Figure:
    """Validation error against multiply-adds: the mean over the seeds, and each seed faintly."""
    figure = go.Figure()
    for name, (title, colour) in TITLES.items():
        curves = [row[name]["curve"] for row in rows]
        spent = curves[0]["multiply_adds"]
        errors = [[100 * (1 - right) for right in curve["validation"]] for curve in curves]
        line = {"x": spent, "mode": "lines+markers" if len(spent) < 20 else "lines"}
        for one in errors if len(errors) < 6 else []:
            faint = {"opacity": 0.3, "showlegend": False, "hoverinfo": "skip"}
            figure.add_scatter(y=one, line={"color": colour, "width": 1}, **line | faint)
        mean = [statistics.mean(values) for values in zip(*errors, strict=True)]
        figure.add_scatter(y=mean, name=title, line={"color": colour, "width": 3}, **line)
    return figure.update_layout(
        width=1000,
        height=420,
        template="plotly_white",
        title=f"Progressive depth, {rows[0]['data']}, 4N = {DEPTH}, {len(rows)} seeds",
        xaxis_title="multiply-adds of the blocks, forward, over all samples trained on",
        yaxis={"title": "validation error, %", "type": "log", "dtick": "D1"},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", choices=list(EPOCHS))
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--epochs", type=int, help="of all stages together")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.epochs is not None and (options.epochs < 1 or options.epochs % len(FACTORS)):
        parser.error(f"{options.epochs} epochs; expected a multiple of {len(FACTORS)}")
    torch.set_num_threads(1)
    base = recipe_of(options.data, options.epochs, options.data_dir)
    settings = {"T": T, "factors": FACTORS, "recipe": asdict(replace(base, data_dir=None, seed=0))}
    out = options.out or RESULTS / f"progressive_{options.data}.json"
    results = Results(out, settings, ("data", "seed"))
    for seed in options.seeds:
        if not results.has(options.data, seed):
            results.add(run(replace(base, seed=seed), PLANS), summary)
    write(drawn(results.rows), out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
