"""What a run shows besides its layers: training curves, and states of samples in a plane."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go

from deeplimit.control.trajectories import TrajectoryPicture
from deeplimit.control.turnpike import TurnpikeProfile
from deeplimit.errors import several
from deeplimit.report.numbers import percent, points, significant
from deeplimit.report.style import DASHED, TUBE, Curve, class_look, draw, plain_figure

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
        entry = Curve("validation", scaled("entry"), TUBE, DASHED)
        return draw(figure, epochs, entry, value=value)
    train = Curve("train", scaled(measure))
    validation = Curve("validation", scaled(f"validation_{measure}"), dash=DASHED)
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


DIRECTLY_NAMED = 20  # beyond so many classes their names would cover the points
PADDING = 0.06
MOST_POINTS = 40_000  # over all layers; about 0.7 MB of the page
STILL = {"mode": "immediate", "frame": {"duration": 0, "redraw": False}}
Point = tuple[float, float]
Box = tuple[Point, Point]  # the x range and the y range


def trajectory_figure(picture: TrajectoryPicture, class_names: Sequence[str]) -> go.Figure:
    """Points at layer 0, one trace per class, a frame and a slider step for each layer.

    Axes are equal and the same for all layers, see `view`. The minimisers are lines where the plane
    is the state space, and rings where it is a plane of logits. The traces of the points come
    first, in the order of `figure.frames[n].data`.
    """
    titles = ("States in the plane", "first coordinate of the state", "second coordinate")
    if picture.plane != "state":
        share = f"{100 * picture.explained:.0f} % of the variance"
        title = f"States on the two leading principal axes of the logits ({share})"
        titles = (title, "first principal axis", "second principal axis")
    figure = plain_figure(*titles)
    labels, names = sorted(set(picture.labels)), [html.escape(c, quote=False) for c in class_names]
    for label in labels:
        figure.add_trace(_points(picture, label, names[label]))
    box = view(picture)
    for label, ends in enumerate(picture.minimisers):
        figure.add_trace(_minimiser(label, ends, picture.plane, names[label]))
        if len(picture.minimisers) <= DIRECTLY_NAMED:
            figure.add_annotation(_name(label, ends, box, names[label]))
    layers = [str(n) for n in range(len(picture.points))]
    figure.frames = [
        go.Frame(
            name=layer,
            traces=list(range(len(labels))),
            data=[go.Scatter(**_positions(picture, n, label)) for label in labels],
        )
        for n, layer in enumerate(layers)
    ]
    # Plotly's own slider, for notebooks; the page of a run brings a better one.
    steps = [{"label": n, "method": "animate", "args": [[n], STILL]} for n in layers]
    slider = {"currentvalue": {"prefix": "layer "}, "steps": steps}
    figure.update_layout(hovermode="closest", showlegend=False, sliders=[slider])
    figure.update_xaxes(range=box[0], constrain="domain", showgrid=True)
    return figure.update_yaxes(range=box[1], constrain="domain", scaleanchor="x", scaleratio=1)


def _positions(picture: TrajectoryPicture, layer: int, label: int) -> dict[str, list[float]]:
    """Five significant digits: finer than a pixel, and a third of the page's weight."""
    here = [p for p, y in zip(picture.points[layer], picture.labels, strict=True) if y == label]
    return {axis: [float(f"{p[i]:.5g}") for p in here] for i, axis in enumerate("xy")}


def _points(picture: TrajectoryPicture, label: int, name: str) -> go.Scatter:
    color, symbol = class_look(label)
    look = {"color": color, "symbol": symbol, "size": 7, "opacity": 0.75, "line": {"width": 0}}
    return go.Scatter(
        **_positions(picture, 0, label),
        name=name,
        mode="markers",
        marker=look,
        hovertemplate=f"{name} (%{{x:.3g}}, %{{y:.3g}})<extra></extra>",
    )


def _minimiser(label: int, ends: tuple[Point, Point], plane: str, name: str) -> go.Scatter:
    color, _ = class_look(label)
    look: dict[str, Any] = {"mode": "lines", "line": {"color": color, "width": 2.5}}
    if plane != "state":
        ends = (ends[0], ends[0])
        ring = {"symbol": "circle-open", "size": 22, "color": color, "line": {"width": 2.5}}
        look = {"mode": "markers", "marker": ring}
    return go.Scatter(
        x=[end[0] for end in dict.fromkeys(ends)],
        y=[end[1] for end in dict.fromkeys(ends)],
        name=f"minimisers of {name}",
        hovertemplate=f"minimisers of {name}<extra></extra>",
        **look,
    )


def _name(label: int, ends: tuple[Point, Point], box: Box, name: str) -> dict[str, Any]:
    """A class's name beside its ring, or where its line leaves the box."""
    steps = [
        (high - start) / (end - start)
        for start, end, (_, high) in zip(*ends, box, strict=True)
        if end > start
    ]
    share = min([1.0, *(0.96 * step for step in steps)])
    x, y = (start + share * (end - start) for start, end in zip(*ends, strict=True))
    beside = {"xanchor": "left", "xshift": 8, "yshift": 6}
    before = {"xanchor": "right", "xshift": -6, "yshift": 0}
    place = {"x": x, "y": y, "yanchor": "bottom", **(before if steps else beside)}
    font = {"color": class_look(label)[0], "size": 15, "weight": 700}
    return {"text": name, "showarrow": False, "font": font, **place}


def view(picture: TrajectoryPicture) -> Box:
    """Ranges of equal length that hold every minimiser and the whole way of most samples.

    Of a hundred samples the one that goes furthest may leave the view, lest it shrinks the others.
    """
    points = np.array(picture.points)
    reach = np.abs(points - np.median(points[-1], axis=0)).max(axis=(0, 2))
    kept = reach.argsort(kind="stable")[: len(reach) - len(reach) // 100]
    middles = np.array(picture.minimisers).mean(axis=1)
    held = np.concatenate([points[:, kept].reshape(-1, 2), middles])
    low, high = held.min(axis=0), held.max(axis=0)
    half = (0.5 + PADDING) * (float((high - low).max()) or 1.0)
    x, y = ((low + high) / 2).tolist()
    return (x - half, x + half), (y - half, y + half)


def leaving(picture: TrajectoryPicture) -> int:
    """Number of samples that are outside the view at some layer."""
    points, (low, high) = np.array(picture.points), np.array(view(picture)).T
    return int(((points < low) | (points > high)).any(axis=(0, 2)).sum())


def thin(picture: TrajectoryPicture, most: int = MOST_POINTS) -> TrajectoryPicture:
    """Evenly picked samples, class by class in turn, so that samples × layers stays under `most`.

    A picture that is small enough is returned as it is.
    """
    samples = len(picture.labels)
    wanted = max(1, most // len(picture.points))
    if samples <= wanted:
        return picture
    by_class = sorted(range(samples), key=lambda i: picture.labels[i])
    kept = sorted(by_class[i * samples // wanted] for i in range(wanted))
    return replace(
        picture,
        points=tuple(tuple(layer[i] for i in kept) for layer in picture.points),
        labels=tuple(picture.labels[i] for i in kept),
    )


def states_caption(
    picture: TrajectoryPicture, of: int, leaving: int, validation: TurnpikeProfile | None
) -> str:
    """Says what moves, and where to.

    `of` is the number of samples before thinning, `leaving` how many of those shown leave the view.
    """
    shown, which = len(picture.labels), several(of, "test sample")
    which = which if shown == of else f"{shown:,} of {which}"
    entry = None if validation is None else validation.entry()
    there = rest = ""
    if entry is not None:
        there = f" From layer {entry}, the entry on validation data, they are close on average."
    if leaving:
        there += f" On their way {leaving} of them leave the view."
    sign = "line" if picture.plane == "state" else "ring"
    if picture.plane != "state":
        rest = (
            f" The two axes show {percent(picture.explained)} of the variance of the logits: "
            "classes that look close here may be far apart in other directions."
        )
    return (
        f"Each point is one of {which}; the {sign} of its colour is where the loss of its class is "
        f"least.{there}{rest}"
    )
