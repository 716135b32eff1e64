"""Training curves, and where training ended."""

from collections.abc import Mapping, Sequence
from typing import Literal

import plotly.graph_objects as go

from deeplimit.errors import several
from deeplimit.report.numbers import percent, points, significant
from deeplimit.report.style import DASHED, NETWORK, SOLID, TUBE, draw, plain_figure

Measure = Literal["loss", "accuracy", "entry"]
Row = Mapping[str, int | float | None]  # one epoch's metrics
UNITS = {
    "loss": ("nats", "%{y:.4g}"),
    "accuracy": ("percent", "%{y:.2f} %"),
    "entry": ("layer", "%{y}"),
}


def training_figure(metrics: Sequence[Row], measure: Measure = "loss") -> go.Figure:
    """One of the metrics over epochs: train solid, validation dashed.

    `metrics` are the rows of `RunResults.metrics`. `entry` is that on validation data; epochs
    in which no layer is in the tube are gaps.
    """
    unit, value = UNITS[measure]
    title = f"{measure.capitalize()} while training"
    figure = plain_figure(title, "epoch", unit, at="epoch %{x}", zero=True)
    epochs = [row["epoch"] or 0.0 for row in metrics]
    margin = max(0.4, len(epochs) / 60)
    figure.update_xaxes(
        range=[min(epochs) - margin, max(epochs) + margin],
        **({"dtick": 1} if len(epochs) < 10 else {"nticks": 8}),
    )

    def scaled(field: str) -> list[int | float | None]:
        factor = 100 if measure == "accuracy" else 1
        return [None if (y := row.get(field)) is None else factor * y for row in metrics]

    if measure == "entry":
        return draw(figure, epochs, ("validation", scaled("entry"), TUBE, DASHED), value=value)
    train = ("train", scaled(measure), NETWORK, SOLID)
    validation = ("validation", scaled(f"validation_{measure}"), NETWORK, DASHED)
    return draw(figure, epochs, train, validation, value=value)


def training_caption(metrics: Sequence[Row], measure: str, samples: int) -> str:
    """Where training ended."""
    last, epochs = metrics[-1], f"After {several(len(metrics), 'epoch')}"
    ours, other = last.get(measure), last.get(f"validation_{measure}")
    if measure == "entry":
        where = "no layer is in the tube" if ours is None else f"the entry is layer {ours:g}"
        return f"{epochs} {where}, on validation data."
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
