"""Training curves, and where training ended."""

from collections.abc import Mapping, Sequence
from typing import Literal

import plotly.graph_objects as go

from deeplimit.errors import several
from deeplimit.report.numbers import percent, points, significant
from deeplimit.report.style import DASHED, NETWORK, TUBE, line, plain_figure

Measure = Literal["loss", "accuracy", "entry"]
Row = Mapping[str, int | float | None]  # one epoch's metrics


def training_figure(metrics: Sequence[Row], measure: Measure = "loss") -> go.Figure:
    """One of the metrics over epochs: train solid, validation dashed.

    `metrics` are the rows of `RunResults.metrics`. `entry` is that on validation data; epochs
    in which no layer is in the tube are gaps.
    """
    title, y_title, value = {
        "loss": ("Loss while training", "nats", "%{y:.4g}"),
        "accuracy": ("Accuracy while training", "percent", "%{y:.2f} %"),
        "entry": ("Entry while training", "layer", "%{y}"),
    }[measure]
    figure = plain_figure(title, "epoch", y_title)
    figure.update_yaxes(rangemode="tozero")
    epochs = [row["epoch"] or 0.0 for row in metrics]
    margin = max(0.4, len(epochs) / 60)
    figure.update_xaxes(
        range=[min(epochs) - margin, max(epochs) + margin],
        unifiedhovertitle={"text": "epoch %{x}"},
        **({"dtick": 1} if len(epochs) < 10 else {"nticks": 8}),
    )
    curves = (
        [("entry", "validation", TUBE, DASHED)]
        if measure == "entry"
        else [
            (measure, "train", NETWORK, "solid"),
            (f"validation_{measure}", "validation", NETWORK, DASHED),
        ]
    )
    for field, name, color, dash in curves:
        y = [_scaled(row.get(field), measure) for row in metrics]
        figure.add_trace(line(epochs, y, name, color, dash, value))
    return figure


def _scaled(value: int | float | None, measure: Measure) -> int | float | None:
    return 100 * value if value is not None and measure == "accuracy" else value


def training_caption(metrics: Sequence[Row], measure: str, samples: int) -> str:
    """Where training ended."""
    last = metrics[-1]
    epochs = f"After {several(len(metrics), 'epoch')}"
    if measure == "entry":
        entry = last.get("entry")
        if entry is None:
            return f"{epochs} no layer is in the tube, on validation data."
        return f"{epochs} the entry is layer {entry:g}, on validation data."
    ours, other = last.get(measure), last.get(f"validation_{measure}")
    if ours is None or other is None:
        return f"{epochs}."
    if measure == "accuracy":
        return (
            f"{epochs} accuracy is {percent(ours, samples)} on training and "
            f"{percent(other, samples)} on validation data, "
            f"{points(other - ours, samples)} apart."
        )
    return (
        f"{epochs} the loss is {significant(ours)} on training and {significant(other)} on "
        "validation data."
    )
