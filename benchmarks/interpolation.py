"""Loss between two networks: on the geodesic, and by averaging parameters; on digits.

    python benchmarks/interpolation.py

Pairs of networks x + (1/N) V tanh(W x + b) trained from different seeds on the plain cross-entropy,
with one head that both share and that is not trained; the state is the standardised image.

    plain    6 layers of 128 particles, both; layers drawn independently
    widths   6 layers, of 96 and of 160 particles; likewise
    depths   6 and 9 layers of 128 particles, from starts that are smooth in depth

At 11 points t of the geodesic of layer-conditional optimal transport the network's loss and
accuracy on test data, and where there is one those of the average (1 − t) θ + t θ'. The barrier is
the largest rise above the line between a way's ends. To show: the geodesic's is at most 20 % of the
averages'. A seed stands for two: networks of the seeds 2s and 2s + 1. With more epochs, or layers
less smooth in depth, networks specialise and barriers grow.
"""

import argparse
import statistics
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import torch
from torch import nn
from torch.nn import functional as F

from by_hand import Results, Row
from deeplimit.data import DataSet
from deeplimit.errors import InputError
from deeplimit.meanfield import cot_distance, cot_geodesic
from deeplimit.studies.interpolation import loss_barrier
from deeplimit.studies.measured_runs import averaged
from deeplimit.training import Recipe, build_model, recipe_for
from deeplimit.training.building import evaluation_batches, load_data, training_batches
from drawing import write

RESULTS = Path(__file__).parent / "results"
POINTS = 11
HEAD_SEED = 1000  # of the head that all networks share
PAIRS = {  # (layers, particles) of both, and how they start
    "plain": ((6, 128), (6, 128), "independent"),
    "widths": ((6, 96), (6, 160), "independent"),
    "depths": ((6, 128), (9, 128), "smooth"),
}
COLORS = {"geodesic": "#2f80c8", "averaged": "#d5722a"}


def recipe_of(epochs: int, activation: str) -> Recipe:
    """That of digits but for the step size, the learning rate, and no decay and no stage cost."""
    return replace(
        recipe_for("digits"),
        activation=activation,
        epochs=epochs,
        learning_rate=3e-3,
        weight_decay=0.0,
        stage_cost=0.0,
    )


def trained(recipe: Recipe, data: DataSet, shape: tuple[int, int], start: str, seed: int) -> Any:
    """A network of this many layers and particles, with the head that all share."""
    depth, hidden = shape
    own = replace(recipe, depth=(depth,), hidden=hidden, step=1 / depth, seed=seed)
    own = replace(own, initialisation=start)  # type: ignore[arg-type]
    model: Any = build_model(own, data)
    shared: Any = build_model(replace(recipe, seed=HEAD_SEED), data)
    model.head.load_state_dict(shared.head.state_dict())
    model.head.requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, recipe.learning_rate)
    model.train()
    for epoch in range(recipe.epochs):
        for x, y in training_batches(own, data, epoch):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def score(model: nn.Module, data: DataSet) -> Row:
    """Cross-entropy and accuracy on test data."""
    total = hits = 0.0
    for x, y in evaluation_batches(data.test):
        logits = model.eval()(x)
        total += float(F.cross_entropy(logits, y, reduction="sum"))
        hits += int((logits.argmax(1) == y).sum())
    return {"loss": total / len(data.test), "accuracy": hits / len(data.test)}


def way(networks: list[nn.Module], ts: list[float], data: DataSet) -> Row:
    """Scores at every t, their barrier, and the middle."""
    scores = [score(network, data) for network in networks]
    losses = [s["loss"] for s in scores]
    row: Row = {"loss": losses, "accuracy": [s["accuracy"] for s in scores]}
    middle = losses[len(losses) // 2]
    return row | {"barrier": loss_barrier(ts, losses), "middle": middle}


def run(recipe: Recipe, data: DataSet, name: str, seed: int) -> Row:
    """One pair of one seed."""
    first, second, start = PAIRS[name]
    a = trained(recipe, data, first, start, 2 * seed)
    b = trained(recipe, data, second, start, 2 * seed + 1)
    ts = [k / (POINTS - 1) for k in range(POINTS)]
    plan = cot_distance(a, b, plans=True)
    middle = [cot_geodesic(a, b, t, transport=plan).network() for t in ts]
    row: Row = {"pair": name, "seed": seed, "t": ts, "distance": plan.distance}
    row |= {"ends": [score(a, data), score(b, data)], "geodesic": way(middle, ts, data)}
    try:
        plain = [averaged([a, b], [1 - t, t]) for t in ts]
    except InputError:  # of different shapes
        return row | {"averaged": None, "ratio": None}
    row["averaged"] = way(plain, ts, data)
    row["ratio"] = row["geodesic"]["barrier"] / max(row["averaged"]["barrier"], 1e-12)
    return row


def summary(rows: list[Row]) -> Row:
    """For each pair the means over the seeds, and the largest ratio."""
    found = {}
    for name in PAIRS:
        own = [row for row in rows if row["pair"] == name]
        if not own:
            continue
        found[name] = {
            "ends": statistics.mean(end["loss"] for row in own for end in row["ends"]),
            "geodesic_middle": statistics.mean(row["geodesic"]["middle"] for row in own),
            "geodesic_barrier": [row["geodesic"]["barrier"] for row in own],
        }
        if own[0]["averaged"]:
            found[name] |= {
                "averaged_middle": statistics.mean(row["averaged"]["middle"] for row in own),
                "averaged_barrier": [row["averaged"]["barrier"] for row in own],
                "largest_ratio": max(row["ratio"] for row in own),
            }
    return found


def drawn(rows: list[Row]) -> go.Figure:
    """Loss over t: a panel for each pair, a curve for each seed and way."""
    names = [name for name in PAIRS if any(row["pair"] == name for row in rows)]
    figure = go.Figure()
    titles = [f"{name}: {PAIRS[name][0]} and {PAIRS[name][1]}" for name in names]
    figure.set_subplots(1, len(names), shared_yaxes=True, subplot_titles=titles)
    said: set[str] = set()
    for row in rows:
        for kind, color in COLORS.items():
            if row[kind] is not None:
                figure.add_scatter(
                    x=row["t"],
                    y=row[kind]["loss"],
                    mode="lines+markers",
                    line={"color": color, "width": 1.6},
                    marker_size=4,
                    name={"geodesic": "geodesic", "averaged": "parameters averaged"}[kind],
                    legendgroup=kind,
                    showlegend=kind not in said,
                    row=1,
                    col=names.index(row["pair"]) + 1,
                )
                said.add(kind)
    figure.update_xaxes(title="t")
    figure.update_yaxes(title="test loss, nats", col=1)
    title = "Digits: loss between two networks, (layers, particles)"
    return figure.update_layout(width=1000, height=400, template="plotly_white", title=title)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pairs", choices=list(PAIRS), nargs="+", default=list(PAIRS))
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--activation", default="tanh")
    parser.add_argument("--out", type=Path, default=RESULTS / "interpolation.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    recipe = recipe_of(options.epochs, options.activation)
    data = load_data(recipe, Path("runs"))
    results = Results(options.out, {"recipe": asdict(recipe)}, ("pair", "seed"))
    for seed in options.seeds:
        for name in options.pairs:
            if not results.has(name, seed):
                row = run(recipe, data, name, seed)
                results.add(row, summary)
                told = {k: row[k] and row[k]["barrier"] for k in COLORS}
                print(name, seed, f"ends {row['ends'][0]['loss']:.3f}", told, flush=True)
    print(summary(results.rows))
    write(drawn(results.rows), options.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
