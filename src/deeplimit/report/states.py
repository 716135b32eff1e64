"""States of single samples in a plane, moving from layer 0 to layer N."""

import html
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import plotly.graph_objects as go

from deeplimit.control.projection import TrajectoryPicture
from deeplimit.control.turnpike import TurnpikeProfile
from deeplimit.errors import several
from deeplimit.report.numbers import percent
from deeplimit.report.style import class_color, class_symbol, plain_figure

DIRECTLY_NAMED = 20  # beyond so many classes their names would cover the points
PADDING = 0.06
Point = tuple[float, float]
Box = tuple[Point, Point]  # the x range and the y range
MOST_POINTS = 40_000  # over all layers; about 0.7 MB of the page


def trajectory_figure(picture: TrajectoryPicture, class_names: Sequence[str]) -> go.Figure:
    """Points at layer 0, one trace per class, a frame and a slider step for each layer.

    Axes are equal and the same for all layers, see `view`. The minimisers are lines where the plane
    is the state space, and rings where it is a plane of logits. The traces of the points come
    first, in the order of `figure.frames[n].data`.
    """
    title, x_title, y_title = _titles(picture)
    figure = plain_figure(title, x_title, y_title)
    figure.update_layout(hovermode="closest", showlegend=False)
    labels = sorted(set(picture.labels))
    for label in labels:
        figure.add_trace(_points(picture, label, class_names))
    box = view(picture)
    named = len(picture.minimisers) <= DIRECTLY_NAMED
    for label, ends in enumerate(picture.minimisers):
        figure.add_trace(_minimiser(label, ends, picture.plane, class_names))
        if named:
            figure.add_annotation(_name(label, ends, box, class_names))
    figure.frames = [
        go.Frame(
            name=str(n),
            traces=list(range(len(labels))),
            data=[go.Scatter(**_positions(picture, n, label)) for label in labels],
        )
        for n in range(len(picture.points))
    ]
    figure.update_layout(sliders=[_slider(len(picture.points))])
    figure.update_xaxes(range=box[0], constrain="domain", showgrid=True)
    figure.update_yaxes(range=box[1], constrain="domain", scaleanchor="x", scaleratio=1)
    return figure


def _titles(picture: TrajectoryPicture) -> tuple[str, str, str]:
    if picture.plane == "state":
        return "States in the plane", "first coordinate of the state", "second coordinate"
    share = f"{100 * picture.explained:.0f}"
    return (
        f"States on the two leading principal axes of the logits ({share} % of the variance)",
        "first principal axis",
        "second principal axis",
    )


def _positions(picture: TrajectoryPicture, layer: int, label: int) -> dict[str, list[float]]:
    here = [p for p, y in zip(picture.points[layer], picture.labels, strict=True) if y == label]
    return {"x": [_short(p[0]) for p in here], "y": [_short(p[1]) for p in here]}


def _short(value: float) -> float:
    """Five significant digits: finer than a pixel, and a third of the page's weight."""
    return float(f"{value:.5g}")


def _points(picture: TrajectoryPicture, label: int, class_names: Sequence[str]) -> go.Scatter:
    name = html.escape(class_names[label], quote=False)
    return go.Scatter(
        **_positions(picture, 0, label),
        name=name,
        mode="markers",
        marker={
            "color": class_color(label),
            "symbol": class_symbol(label),
            "size": 7,
            "opacity": 0.75,
            "line": {"width": 0},
        },
        hovertemplate=f"{name} (%{{x:.3g}}, %{{y:.3g}})<extra></extra>",
    )


def _minimiser(
    label: int,
    ends: tuple[Point, Point],
    plane: str,
    class_names: Sequence[str],
) -> go.Scatter:
    color = class_color(label)
    name = html.escape(class_names[label], quote=False)
    shown: dict[str, Any]
    if plane == "state":
        shown = {"mode": "lines", "line": {"color": color, "width": 2.5}}
    else:
        shown = {
            "mode": "markers",
            "marker": {
                "symbol": "circle-open",
                "size": 22,
                "color": color,
                "line": {"width": 2.5},
            },
        }
        ends = (ends[0], ends[0])
    return go.Scatter(
        x=[end[0] for end in dict.fromkeys(ends)],
        y=[end[1] for end in dict.fromkeys(ends)],
        name=f"minimisers of {name}",
        hovertemplate=f"minimisers of {name}<extra></extra>",
        **shown,
    )


def _name(
    label: int, ends: tuple[Point, Point], box: Box, class_names: Sequence[str]
) -> dict[str, Any]:
    """A class's name beside its ring, or where its line leaves the box."""
    (x, y), (x_end, y_end) = ends
    steps = [
        (high - start) / (end - start)
        for start, end, (_, high) in ((x, x_end, box[0]), (y, y_end, box[1]))
        if end > start
    ]
    share = min([1.0, *(0.96 * step for step in steps)])
    return {
        "x": x + share * (x_end - x),
        "y": y + share * (y_end - y),
        "text": html.escape(class_names[label], quote=False),
        "showarrow": False,
        "xanchor": "right" if steps else "left",
        "yanchor": "bottom",
        "xshift": -6 if steps else 8,
        "yshift": 0 if steps else 6,
        "font": {"color": class_color(label), "size": 15, "weight": 700},
    }


def view(picture: TrajectoryPicture) -> Box:
    """Ranges of equal length that hold every minimiser and the whole way of most samples.

    Of a hundred samples the one that goes furthest may leave the view, lest it shrinks the others.
    """
    origin = [statistics.median(p[axis] for p in picture.points[-1]) for axis in (0, 1)]
    reach = [
        max(abs(layer[i][axis] - origin[axis]) for layer in picture.points for axis in (0, 1))
        for i in range(len(picture.labels))
    ]
    order = sorted(range(len(reach)), key=reach.__getitem__)
    kept = order[: len(order) - len(order) // 100]
    held = [layer[i] for layer in picture.points for i in kept]
    held += [((a + c) / 2, (b + d) / 2) for (a, b), (c, d) in picture.minimisers]
    spans = [(min(p[axis] for p in held), max(p[axis] for p in held)) for axis in (0, 1)]
    half = (0.5 + PADDING) * (max(high - low for low, high in spans) or 1.0)
    (x_low, x_high), (y_low, y_high) = spans
    x, y = (x_low + x_high) / 2, (y_low + y_high) / 2
    return (x - half, x + half), (y - half, y + half)


def leaving(picture: TrajectoryPicture) -> int:
    """Number of samples that are outside the view at some layer."""
    (x_low, x_high), (y_low, y_high) = view(picture)
    return sum(
        not all(
            x_low <= layer[i][0] <= x_high and y_low <= layer[i][1] <= y_high
            for layer in picture.points
        )
        for i in range(len(picture.labels))
    )


def _slider(count: int) -> dict[str, Any]:
    """Plotly's own slider, for notebooks; the page of a run brings a better one."""
    still = {"mode": "immediate", "frame": {"duration": 0, "redraw": False}}
    return {
        "currentvalue": {"prefix": "layer "},
        "steps": [
            {"label": str(n), "method": "animate", "args": [[str(n)], still]} for n in range(count)
        ],
    }


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
    """What moves, and where to.

    `of` is the number of samples before thinning, `leaving` how many of those shown leave the view.
    """
    shown = len(picture.labels)
    which = several(of, "test sample")
    which = which if shown == of else f"{shown:,} of {which}"
    entry = None if validation is None else validation.entry()
    there = ""
    if entry is not None:
        there = f" From layer {entry}, the entry on validation data, they are close on average."
    if leaving:
        there += f" On their way {leaving} of them leave the view."
    if picture.plane == "state":
        return (
            f"Each point is one of {which}; the line of its colour is where the loss of its class "
            f"is least.{there}"
        )
    return (
        f"Each point is one of {which}; the ring of its colour is where the loss of its class is "
        f"least.{there} The two axes show {percent(picture.explained)} of the variance of the "
        "logits: classes that look close here may be far apart in other directions."
    )
