"""Tie, train, untie, fine-tune with the adjoint: [SAP22] Table 2 on MNIST, 32 layers.

    python benchmarks/tying.py --data-dir PATH

x_{n+1} = x_n + hφ(x_n, θ_n) with h = 4/32, convolutional φ with batch norms and GELU. One control
for all layers is trained by backpropagation (`tie`), then each layer gets its own
(`untie(..., optimizer=)`) and is fine-tuned: with the adjoint of e = 2 and e = 1 evaluations of a
layer per rebuilt state, and by backpropagation, from the same start with the same batches. For
comparison the tied network is trained on instead, and an untied one is trained from scratch for the
epochs of both parts together. Each part has a one-cycle learning rate of its own, with the same
largest value. T = 4 rather than 1, and that value, were chosen on validation data of another seed.

"drift" is the largest of all steps of an arm; the gradient's error against backpropagation is that
of one batch before and after fine-tuning by backpropagation.
"""

import argparse
import copy
import statistics
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from by_hand import Results, Row, accuracy, clocks, optimizer_of, since, train_epoch
from deeplimit.data import DataSet
from deeplimit.gradient import drift, gradient_error, use_adjoint
from deeplimit.gradient.stand_ins import switches
from deeplimit.ode import smoothness, tie, untie
from deeplimit.training import Recipe, build_model, recipe_for
from deeplimit.training.building import load_data, loss_of, training_batches
from drawing import write

RESULTS = Path(__file__).parent / "results"
DEPTH, T = 32, 4.0
ARMS = {  # whether layers are untied, and the adjoint's e; 0: backpropagation
    "untied_adjoint_2": (True, 2),
    "untied_adjoint_1": (True, 1),
    "untied_backprop": (True, 0),
    "tied_on": (False, 0),
}
TITLES = {
    "tied": "tied",
    "tied_on": "tied, trained on",
    "untied_adjoint_2": "untied, adjoint e = 2",
    "untied_adjoint_1": "untied, adjoint e = 1",
    "untied_backprop": "untied, backpropagation",
    "scratch": "untied from scratch",
}


def recipe_of(epochs: int, data_dir: Path | None) -> Recipe:
    """The default recipe of MNIST but for the step, what follows from it, and no stage cost."""
    return replace(
        recipe_for("mnist"),
        data_dir=data_dir,
        depth=(DEPTH,),
        step=T / DEPTH,
        activation="gelu",
        reduction=8,
        initialisation="identical",
        stage_cost=0.0,
        epochs=epochs,
    )


def trained(
    model: nn.Module, optimizer: Optimizer, recipe: Recipe, data: DataSet, cycle: range
) -> Row:
    """These epochs, in place, with their accuracy on validation and test data."""
    began, curve, largest = clocks(), [], 0.0
    adjoint = bool(switches(model))
    for epoch in cycle:
        losses = []
        for loss in train_epoch(model, optimizer, recipe, data, epoch, cycle):
            losses.append(loss)
            if adjoint:
                largest = max(largest, drift(model))
        mean = statistics.mean(losses)
        curve.append({"loss": mean, "validation": accuracy(model, data.validation)})
    spent = since(began)
    row: Row = {"validation": curve[-1]["validation"], "test": accuracy(model, data.test)}
    return row | spent | {"curve": curve} | ({"drift": largest} if adjoint else {})


def errors(model: nn.Module, recipe: Recipe, data: DataSet) -> Row:
    """Drift and relative error of the gradient on one batch, for e = 1 and 2."""
    loss_function = loss_of(recipe, data)

    def loss(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return loss_function(network(batch[0]), batch[1]).mean()

    batch = next(iter(training_batches(recipe, data, recipe.epochs)))
    found = {}
    for e in (1, 2):
        switched = use_adjoint(copy.deepcopy(model).train(), evaluations=e, on_drift="ignore")
        measured = gradient_error(switched, loss, batch)
        found[f"e = {e}"] = {"gradient_error": measured.error, "drift": measured.drift}
    return found


def run(recipe: Recipe) -> Row:
    """One seed; the recipe's epochs are those of each of the two parts."""
    data = load_data(recipe, Path("runs"))
    row: Row = {"seed": recipe.seed}

    def keep(name: str, result: Row) -> None:
        row[name] = result
        told = {k: v for k, v in result.items() if k != "curve"}
        print(recipe.seed, name, told, flush=True)

    tied: Any = tie(build_model(recipe, data), DEPTH)
    optimizer = optimizer_of(recipe, tied)
    first = range(recipe.epochs)
    second = range(recipe.epochs, 2 * recipe.epochs)
    keep("tied", trained(tied, optimizer, recipe, data, first))
    for name, (separate, evaluations) in ARMS.items():
        model, own = copy.deepcopy((tied, optimizer))  # together: it holds this very copy's
        if separate:
            model = untie(model, optimizer=own)
            row.setdefault("gradient_before", errors(model, recipe, data))
        if evaluations:
            use_adjoint(model, evaluations=evaluations, on_drift="ignore")
        keep(name, trained(model, own, recipe, data, second))
        if name == "untied_backprop":
            row["gradient_after"] = errors(model, recipe, data)
            row["roughness"] = smoothness(model).stages[0].roughness
    print({k: row[k] for k in ("gradient_before", "gradient_after", "roughness")}, flush=True)
    scratch = build_model(recipe, data)
    whole = range(2 * recipe.epochs)
    keep("scratch", trained(scratch, optimizer_of(recipe, scratch), recipe, data, whole))
    return row


def summary(rows: list[Row]) -> Row:
    """Means, and each seed's differences in points."""

    def less(name: str, other: str) -> Row:
        gap = [100 * (row[name]["test"] - row[other]["test"]) for row in rows]
        return {"points": gap, "mean": statistics.mean(gap)}

    return {
        "test": {name: statistics.mean(row[name]["test"] for row in rows) for name in TITLES},
        "less_tied": {n: less(n, "tied") for n in TITLES if n != "tied"},
        "less_backprop": {n: less(n, "untied_backprop") for n in ARMS if "adjoint" in n},
        "largest_drift": {n: max(row[n]["drift"] for row in rows) for n in ARMS if "adjoint" in n},
        "cpu_seconds": {
            name: statistics.mean(row[name]["cpu_seconds"] for row in rows) for name in TITLES
        },
    }


def drawn(rows: list[Row]) -> go.Figure:
    """Test error of every seed, and the mean."""
    figure = go.Figure()
    means = [100 * (1 - statistics.mean(row[name]["test"] for row in rows)) for name in TITLES]
    figure.add_bar(x=list(TITLES.values()), y=means, name="mean", marker_color="#BFD7EA")
    for row in rows:
        figure.add_scatter(
            x=list(TITLES.values()),
            y=[100 * (1 - row[name]["test"]) for name in TITLES],
            mode="markers",
            name=f"seed {row['seed']}",
            marker_size=9,
        )
    return figure.update_layout(
        width=1000,
        height=420,
        template="plotly_white",
        title=f"MNIST, {DEPTH} layers: tied, untied and fine-tuned",
        yaxis_title="test error, %",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--epochs", type=int, default=2, help="of each of the two parts")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=RESULTS / "tying.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    base = recipe_of(options.epochs, options.data_dir)
    recipe = asdict(replace(base, data_dir=None, seed=0))
    results = Results(options.out, {"T": T, "recipe": recipe}, ("seed",))
    for seed in options.seeds:
        if not results.has(seed):
            results.add(run(replace(base, seed=seed)), summary)
    write(drawn(results.rows), options.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
