"""Training curves."""

from collections.abc import Mapping, Sequence
from typing import Literal

import plotly.graph_objects as go

from deeplimit.report.figures.style import DASHED, NETWORK, TUBE, line, plain_figure

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
