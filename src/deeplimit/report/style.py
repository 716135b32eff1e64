"""How every figure looks: readable on white and on black, and without telling colours apart.

Backgrounds are transparent and every colour has a contrast of about 3 or more to white and to
near-black alike. Colour says which network, the dash says which data: solid is train, dashed is
test (or validation, in training curves).
"""

import math
from collections.abc import Iterable, Sequence
from statistics import geometric_mean
from typing import Any, NamedTuple

import plotly.graph_objects as go

from deeplimit.report.numbers import runs, significant, superscript
from deeplimit.training.results import Cut

NETWORK = "#2f80c8"
REFERENCE = "#d5722a"
TUBE = "#1f9d84"
TEXT = "#7b838d"
GRID = "rgba(128, 136, 146, 0.22)"
SHADE = "rgba(128, 136, 146, 0.13)"
SOLID, DASHED = "solid", "6px,4px"
FEW = 26  # so many markers on a curve can be told apart
# Petroff's ten colours (arXiv 2107.02270, made for colour-vision deficiencies), the darkest two
# lightened so that they can be seen on black; symbols tell classes apart a second time.
# fmt: off
CLASSES = (
    "#3f90da", "#f09c00", "#d63a1e", "#87979a", "#9a52c7",
    "#a96b59", "#e76300", "#9c9350", "#717581", "#3fb3b6",
)
# fmt: on
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "triangle-down", "star")
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
AXIS = {
    "showgrid": True,
    "gridcolor": GRID,
    "zeroline": False,
    "showline": False,
    "ticks": "",
    "automargin": True,
    "tickfont": {"size": 12},
}
MARK: dict[str, Any] = {"font": {"color": TUBE, "size": 12}}
SPIKE = {"spikecolor": TEXT, "spikethickness": 1, "spikedash": "solid", "showgrid": False}
LAYOUT: dict[str, Any] = {
    "font": {"family": FONT, "size": 13, "color": TEXT},
    "paper_bgcolor": "rgba(0, 0, 0, 0)",
    "plot_bgcolor": "rgba(0, 0, 0, 0)",
    "margin": {"l": 52, "r": 12, "t": 96, "b": 44},
    "legend": {
        "orientation": "h",
        "font": {"size": 12},
        "x": 0,
        "xanchor": "left",
        "y": 1.1,
        "yanchor": "bottom",
        "itemclick": False,
        "itemdoubleclick": False,
    },
    "hovermode": "x unified",
    "hoverlabel": {
        "bgcolor": "#22272e",
        "bordercolor": "#22272e",
        "font": {"color": "#f1f3f5", "size": 13, "family": FONT},
    },
    "dragmode": False,
}
Number = int | float
Values = Sequence[Number] | Sequence[Number | None]


class Curve(NamedTuple):
    """A curve of a figure, and how it looks."""

    name: str
    values: Values
    color: str = NETWORK
    dash: str = SOLID


def reference(name: str, values: Values) -> Curve:
    """What the network is compared with, in another colour and dashed."""
    return Curve(name, values, REFERENCE, DASHED)


def class_look(index: int) -> tuple[str, str]:
    """Colour and marker of a class; there are ten and seven, so that both repeat after 70."""
    return CLASSES[index % len(CLASSES)], SYMBOLS[index % len(SYMBOLS)]


def plain_figure(
    title: str, x_title: str, y_title: str, *, at: str = "", zero: bool = False
) -> go.Figure:
    """An empty figure in this house's style.

    `at` is the heading of the hover text; with `zero` the y axis starts there.
    """
    heading: dict[str, Any] = {"text": title, "font": {"size": 16}, "pad": {"l": 8, "t": 12}}
    heading |= {"x": 0, "y": 1, "yanchor": "top"}
    x_axis = AXIS | SPIKE | {"title": _axis_title(x_title)}
    y_axis = AXIS | {"title": _axis_title(y_title)} | ({"rangemode": "tozero"} if zero else {})
    figure = go.Figure(layout=LAYOUT | {"title": heading, "xaxis": x_axis, "yaxis": y_axis})
    return figure.update_xaxes(unifiedhovertitle={"text": at}) if at else figure


def _axis_title(text: str) -> dict[str, Any]:
    return {"text": text, "standoff": 8, "font": {"size": 13}}


def line(x: Sequence[Number], curve: Curve, value: str = "%{y:.4g}") -> go.Scatter:
    """A curve, with markers where they are few; `value` is the hover text's format."""
    return go.Scatter(
        x=list(x),
        y=list(curve.values),
        name=curve.name,
        mode="lines+markers" if len(x) <= FEW else "lines",
        line={"color": curve.color, "width": 2.2, "dash": curve.dash},
        marker={"color": curve.color, "size": 5},
        hovertemplate=value,
    )


def draw(
    figure: go.Figure,
    x: Sequence[Number],
    *curves: Curve,
    value: str = "%{y:.3g}",
    log: bool = False,
) -> go.Figure:
    """Adds curves; with `log` what a logarithmic axis can show of them, and that axis."""
    for curve in curves:
        shown = curve._replace(values=positive(curve.values)) if log else curve
        figure.add_trace(line(x, shown, value))
    return logarithmic(figure) if log else figure


def positive(values: Values) -> list[Number | None]:
    """Leaves out what a logarithmic scale cannot show."""
    return [value if value is not None and value > 0 else None for value in values]


def layer_figure(
    title: str,
    horizon: int,
    y_title: str,
    cut: Cut | None = None,
    *,
    between: bool = False,
    zero: bool = False,
) -> go.Figure:
    """An empty figure over the layers 0 … N, or what lies between; the removed ones shaded."""
    at = "between layers, at %{x}" if between else "layer %{x}"
    figure = plain_figure(title, "layer", y_title, at=at, zero=zero)
    margin = max(0.4, horizon / 60)
    figure.update_xaxes(
        range=[-margin, horizon + margin],
        tickformat="d",
        **({"dtick": 1} if horizon < 12 else {"nticks": 12}),
    )
    for first, last in runs(cut.removed) if cut else ():
        note = {"text": "removed", "font": {"color": TEXT, "size": 12}, "yanchor": "bottom"}
        figure.add_vrect(
            first, last + 1, fillcolor=SHADE, line_width=0, layer="below", annotation=note
        )
    return figure


def shade_tube(figure: go.Figure, radius: float) -> None:
    """The tube 0 ≤ d ≤ δ around the minimisers."""
    # States come from above, so the tube is empty at its left end.
    note = MARK | {"text": f"tube, δ = {significant(radius)}", "xanchor": "left", "x": 0}
    figure.add_hrect(0, radius, fillcolor=TUBE, opacity=0.17, line_width=0, annotation=note)


def mark_layer(figure: go.Figure, layer: int, text: str) -> None:
    """A vertical line at a layer, named above the plot."""
    note = MARK | {"text": text, "xanchor": "center", "yanchor": "bottom"}
    figure.add_vline(layer, line={"color": TUBE, "width": 1.5}, annotation=note)


def mark_value(figure: go.Figure, y: float, text: str, *, log: bool = False) -> None:
    """A dotted horizontal line, named below its right end, or above it on a logarithmic axis."""
    note = MARK | {"text": text, "xanchor": "right", "yanchor": "top"}
    if log:
        note |= {"y": math.log10(y), "yanchor": "bottom"}
    dotted = {"color": TUBE, "width": 1.5, "dash": "dot"}
    figure.add_hline(y, line=dotted, annotation=note)


def logarithmic(figure: go.Figure, *more: Number) -> go.Figure:
    """A logarithmic y axis: 1, 2, 5 labelled over few decades, powers of ten over many.

    `more` are values to be seen besides the curves'.
    """
    shown = [*(v for trace in figure.data for v in trace.y if v), *more]
    if shown:
        low, high = math.log10(min(shown)), math.log10(max(shown))
        pad = max(0.05, (high - low) * 0.05)
        figure.update_yaxes(range=[low - pad, high + pad], **_logarithmic_axis(low, high))
    return figure


def _logarithmic_axis(low: float, high: float) -> dict[str, Any]:
    """Its ticks for values from 10^low to 10^high."""
    few = high - low < 2.5
    step = 1 if few else max(1, round((high - low) / 7))
    ticks = [
        (digit, power)
        for power in range(math.floor(low), math.ceil(high) + 1, step)
        for digit in ((1, 2, 5) if few else (1,))
    ]
    return {
        "type": "log",
        "tickvals": [digit * 10.0**power for digit, power in ticks],
        "ticktext": [_tick(digit, power) for digit, power in ticks],
    }


def _tick(digit: int, power: int) -> str:
    if -4 <= power <= 3:
        return f"{digit * 10.0**power:.{max(0, -power)}f}"
    return f"{'' if digit == 1 else f'{digit}·'}10{superscript(power)}"


def seeds_curve(
    x: Sequence[int],
    values: Sequence[Sequence[float]],
    name: str,
    color: str,
    value: str,
    dash: str = SOLID,
) -> go.Scatter:
    """Values [seed][x]: markers at the geometric means, bars from the smallest to the largest."""
    seeds = list(zip(*values, strict=True))
    means = [geometric_mean(own) for own in seeds]
    pairs = list(zip(seeds, means, strict=True))
    bars = {
        "array": [max(own) - mean for own, mean in pairs],
        "arrayminus": [mean - min(own) for own, mean in pairs],
    }
    curve = Curve(name, means, color, dash)
    return line(list(x)[: len(means)], curve, value).update(
        error_y=bars | {"thickness": 1, "width": 3}, mode="lines+markers", marker_size=6
    )


def logarithmic_panels(
    figure: go.Figure, depths: Sequence[int] = (), labels: Iterable[str] = ()
) -> None:
    """Panels over depth with both axes logarithmic, the y axes as their own values need."""
    figure.update_xaxes(type="log", tickvals=list(depths), ticktext=list(labels), showgrid=False)
    for axis in figure.select_yaxes():
        name = axis.plotly_name.replace("axis", "")
        own = [trace.y for trace in figure.data if (trace.yaxis or "y") == name]
        shown = [value for y in own for value in y if value]
        if shown:
            axis.update(_logarithmic_axis(math.log10(min(shown)), math.log10(max(shown))))
    figure.update_yaxes(gridcolor=GRID, zeroline=False, automargin=True)
    figure.update_annotations(font={"size": 13, "color": TEXT})


def heat_map(
    figure: go.Figure,
    x: Sequence[str],
    y: Sequence[str],
    z: Sequence[Values],
    texts: Sequence[Sequence[str]],
    largest: Number,
    value: str,
) -> go.Figure:
    """Adds named squares, the darker the larger, with a text on each."""
    squares = go.Heatmap(
        x=x,
        y=y,
        z=z,
        text=texts,
        texttemplate="%{text}",
        zmin=0,
        zmax=largest,
        colorscale=[[0, SHADE], [1, NETWORK]],
        showscale=False,
        xgap=2,
        ygap=2,
        hoverongaps=False,
        hovertemplate=value,
    )
    figure.add_trace(squares)
    figure.update_xaxes(type="category")
    figure.update_yaxes(type="category", showgrid=False)
    return figure.update_layout(hovermode="closest")
