"""How far training moves a network, against its width: layer-conditional and Euclidean distance.

    python benchmarks/distance_travelled.py

Networks of 6 layers x + (1/6) V tanh(W x + b) with 64 … 1024 particles learn digits from the same
batches, with one head that is not trained. `flow` is the gradient flow of particles, steps scaled
by N·M, for one time; `sgd` is ordinary gradient descent with one learning rate for all widths. Of
each the layer-conditional distance from the start to the end, the Euclidean one of the parameters,
and the losses. To show: under the flow the layer-conditional distance is independent of width,
within 15 %; the Euclidean one of the same training is not.
"""

import argparse
import statistics
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import torch
from torch import Tensor
from torch.nn import functional as F

from by_hand import Results, Row, clocks, since
from deeplimit.data import DataSet
from deeplimit.meanfield import LayerwiseMeasure, cot_distance, particle_flow
from deeplimit.training import Recipe, build_model, recipe_for
from deeplimit.training.building import load_data, training_batches
from drawing import write
from interpolation import HEAD_SEED, RESULTS, score

DEPTH = 6
WIDTHS = (64, 128, 256, 512, 1024)
KINDS = ("flow", "sgd")
RATES = {"flow": 1.0, "sgd": 0.3}  # steps of the flow's time; of the parameters
COLORS = {"flow": "#2f80c8", "sgd": "#d5722a"}


def recipe_of(epochs: int) -> Recipe:
    """That of digits but for depth and step, and no stage cost."""
    return replace(
        recipe_for("digits"),
        activation="tanh",
        depth=(DEPTH,),
        step=1 / DEPTH,
        epochs=epochs,
        weight_decay=0.0,
        stage_cost=0.0,
    )


def built(recipe: Recipe, data: DataSet, width: int, seed: int) -> Any:
    """An untrained network; its head is the same for every width and seed."""
    model: Any = build_model(replace(recipe, hidden=width, seed=seed), data)
    shared: Any = build_model(replace(recipe, seed=HEAD_SEED), data)
    model.head.load_state_dict(shared.head.state_dict())
    model.head.requires_grad_(False)
    return model


def parameters(model: Any) -> Tensor:
    """All that is trained, as one vector."""
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def run(recipe: Recipe, data: DataSet, kind: str, width: int, seed: int) -> Row:
    """One training."""
    began = clocks()
    model = built(recipe, data, width, seed)
    start, before = LayerwiseMeasure.of(model), parameters(model).clone()
    first = score(model, data)
    optimizer: torch.optim.Optimizer
    if kind == "flow":
        optimizer = particle_flow(model, RATES[kind])
    else:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], RATES[kind])
    model.train()
    for epoch in range(recipe.epochs):
        for x, y in training_batches(replace(recipe, seed=seed), data, epoch):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    last = score(model, data)
    row: Row = {"kind": kind, "width": width, "seed": seed}
    row["layer_conditional"] = cot_distance(start, LayerwiseMeasure.of(model)).distance
    row["euclidean"] = float(torch.linalg.vector_norm(parameters(model) - before))
    row |= {"first_loss": first["loss"], "loss": last["loss"], "accuracy": last["accuracy"]}
    return row | since(began)


def summary(rows: list[Row]) -> Row:
    """Means over the seeds by width, and the largest deviation from their mean over the widths."""
    found: Row = {}
    for kind in KINDS:
        for name in ("layer_conditional", "euclidean", "loss"):
            means = {
                width: statistics.mean(row[name] for row in own)
                for width in WIDTHS
                if (own := [r for r in rows if (r["kind"], r["width"]) == (kind, width)])
            }
            if means:
                middle = statistics.mean(means.values())
                spread = max(abs(value / middle - 1) for value in means.values())
                found[f"{kind} {name}"] = {"means": means, "spread": spread}
    return found


def drawn(rows: list[Row]) -> go.Figure:
    """Both distances over the width: seeds as markers, means as lines."""
    figure = go.Figure()
    titles = {"layer_conditional": "layer-conditional distance", "euclidean": "Euclidean distance"}
    figure.set_subplots(1, 2, subplot_titles=list(titles.values()))
    for column, name in enumerate(titles, start=1):
        for kind, color in COLORS.items():
            own = [row for row in rows if row["kind"] == kind]
            widths = sorted({row["width"] for row in own})
            means = [statistics.mean(r[name] for r in own if r["width"] == w) for w in widths]
            look = {"marker_color": color, "legendgroup": kind, "row": 1, "col": column}
            figure.add_scatter(
                x=[row["width"] for row in own],
                y=[row[name] for row in own],
                mode="markers",
                showlegend=False,
                **look,
            )
            figure.add_scatter(
                x=widths,
                y=means,
                mode="lines",
                line_color=color,
                name={"flow": "particle flow", "sgd": "ordinary gradient descent"}[kind],
                showlegend=column == 1,
                **look,
            )
    figure.update_xaxes(type="log", tickvals=list(WIDTHS), title="particles M")
    figure.update_yaxes(rangemode="tozero")
    title = f"Digits, {DEPTH} layers: distance travelled in training"
    return figure.update_layout(width=1000, height=400, template="plotly_white", title=title)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--widths", type=int, choices=WIDTHS, nargs="+", default=list(WIDTHS))
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--out", type=Path, default=RESULTS / "distance_travelled.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    recipe = recipe_of(options.epochs)
    data = load_data(recipe, Path("runs"))
    settings = {"recipe": asdict(recipe), "rates": RATES}
    results = Results(options.out, settings, ("kind", "width", "seed"))
    for seed in options.seeds:
        for width in options.widths:
            for kind in KINDS:
                if not results.has(kind, width, seed):
                    row = run(recipe, data, kind, width, seed)
                    results.add(row, summary)
                    print(row, flush=True)
    print(summary(results.rows))
    write(drawn(results.rows), options.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
