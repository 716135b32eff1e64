"""How every figure looks: readable on white and on black, and without telling colours apart.

Backgrounds are transparent and every colour has a contrast of about 3 or more to white and to
near-black alike. Colour says which network, the dash says which data: solid is train, dashed is
test (or validation, in training curves).
"""

import math
from collections.abc import Iterable, Sequence
from statistics import geometric_mean
from typing import Any

import plotly.graph_objects as go

from deeplimit.report.numbers import runs, significant, superscript
from deeplimit.training.results import Cut

NETWORK = "#2f80c8"
REFERENCE = "#d5722a"
TUBE = "#1f9d84"
TEXT = "#7b838d"
GRID = "rgba(128, 136, 146, 0.22)"
SHADE = "rgba(128, 136, 146, 0.13)"
DASHED = "6px,4px"
FEW = 26  # so many markers on a curve can be told apart
# Petroff's ten colours (arXiv 2107.02270, made for colour-vision deficiencies), the darkest two
# lightened so that they can be seen on black; symbols tell classes apart a second time.
CLASSES = (
    "#3f90da",
    "#f09c00",
    "#d63a1e",
    "#87979a",
    "#9a52c7",
    "#a96b59",
    "#e76300",
    "#9c9350",
    "#717581",
    "#3fb3b6",
)
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "triangle-down", "star")
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


def class_color(index: int) -> str:
    """The colour of a class; ten of them, then from the start again."""
    return CLASSES[index % len(CLASSES)]


def class_symbol(index: int) -> str:
    """The marker of a class; seven of them, so that colour and symbol together repeat after 70."""
    return SYMBOLS[index % len(SYMBOLS)]


def plain_figure(title: str, x_title: str, y_title: str) -> go.Figure:
    """An empty figure in this house's style."""
    axis = {
        "showgrid": True,
        "gridcolor": GRID,
        "zeroline": False,
        "showline": False,
        "ticks": "",
        "automargin": True,
        "tickfont": {"size": 12},
    }
    spike = {"spikecolor": TEXT, "spikethickness": 1, "spikedash": "solid"}
    return go.Figure(
        layout={
            "title": {
                "text": title,
                "x": 0,
                "y": 1,
                "yanchor": "top",
                "pad": {"l": 8, "t": 12},
                "font": {"size": 16},
            },
            "font": {"family": FONT, "size": 13, "color": TEXT},
            "paper_bgcolor": "rgba(0, 0, 0, 0)",
            "plot_bgcolor": "rgba(0, 0, 0, 0)",
            "margin": {"l": 52, "r": 12, "t": 96, "b": 44},
            "xaxis": axis | spike | {"title": _axis_title(x_title), "showgrid": False},
            "yaxis": axis | {"title": _axis_title(y_title)},
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
    )


def _axis_title(text: str) -> dict[str, Any]:
    return {"text": text, "standoff": 8, "font": {"size": 13}}


def line(
    x: Sequence[int | float],
    y: Sequence[int | float | None],
    name: str,
    color: str,
    dash: str = "solid",
    value: str = "%{y:.4g}",
) -> go.Scatter:
    """A curve, with markers where they are few; `value` is the hover text's format."""
    return go.Scatter(
        x=list(x),
        y=list(y),
        name=name,
        mode="lines+markers" if len(x) <= FEW else "lines",
        line={"color": color, "width": 2.2, "dash": dash},
        marker={"color": color, "size": 5},
        hovertemplate=value,
    )


def layer_figure(title: str, horizon: int, y_title: str, cut: Cut | None = None) -> go.Figure:
    """An empty figure over the layers 0 … N, the removed ones shaded."""
    figure = plain_figure(title, "layer", y_title)
    margin = max(0.4, horizon / 60)
    figure.update_xaxes(
        range=[-margin, horizon + margin],
        tickformat="d",
        unifiedhovertitle={"text": "layer %{x}"},
        **({"dtick": 1} if horizon < 12 else {"nticks": 12}),
    )
    for first, last in runs(cut.removed) if cut else ():
        figure.add_vrect(
            x0=first,
            x1=last + 1,
            fillcolor=SHADE,
            line_width=0,
            layer="below",
        )
        figure.add_annotation(
            x=last + 1,
            y=1,
            yref="paper",
            text="removed",
            showarrow=False,
            xanchor="right",
            yanchor="bottom",
            font={"color": TEXT, "size": 12},
        )
    return figure


def shade_tube(figure: go.Figure, radius: float) -> None:
    """The tube 0 ≤ d ≤ δ around the minimisers."""
    figure.add_hrect(y0=0, y1=radius, fillcolor=TUBE, opacity=0.17, line_width=0)
    figure.add_annotation(
        x=0,
        xref="paper",
        y=radius,
        text=f"tube, δ = {significant(radius)}",
        showarrow=False,
        xanchor="left",
        yanchor="top",  # states come from above, so the tube is empty at its left end
        font={"color": TUBE, "size": 12},
    )


def mark_layer(figure: go.Figure, layer: int, text: str) -> None:
    """A vertical line at a layer, named above the plot."""
    figure.add_vline(x=layer, line={"color": TUBE, "width": 1.5})
    figure.add_annotation(
        x=layer,
        y=1,
        yref="paper",
        text=text,
        showarrow=False,
        xanchor="center",
        yanchor="bottom",
        font={"color": TUBE, "size": 12},
    )


def logarithmic(figure: go.Figure, values: Iterable[float | None]) -> None:
    """A logarithmic y axis: 1, 2, 5 labelled over few decades, powers of ten over many."""
    shown = [v for v in values if v]
    if not shown:
        return
    low, high = math.log10(min(shown)), math.log10(max(shown))
    pad = max(0.05, (high - low) * 0.05)
    figure.update_yaxes(range=[low - pad, high + pad], **_logarithmic_axis(low, high))


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
    dash: str = "solid",
) -> go.Scatter:
    """Values [seed][x]: markers at the geometric means, bars from the smallest to the largest."""
    seeds = list(zip(*values, strict=True))
    means = [geometric_mean(own) for own in seeds]
    return go.Scatter(
        x=list(x)[: len(means)],
        y=means,
        error_y={
            "array": [max(own) - mean for own, mean in zip(seeds, means, strict=True)],
            "arrayminus": [mean - min(own) for own, mean in zip(seeds, means, strict=True)],
            "thickness": 1,
            "width": 3,
        },
        name=name,
        mode="lines+markers",
        line={"color": color, "width": 2.2, "dash": dash},
        marker={"color": color, "size": 6},
        hovertemplate=value,
    )


def logarithmic_panels(figure: go.Figure) -> None:
    """Every panel's y axis logarithmic, as its own values need; titles in the figure's style."""
    for axis in figure.select_yaxes():
        name = axis.plotly_name.replace("axis", "")
        own = [trace.y for trace in figure.data if (trace.yaxis or "y") == name]
        shown = [value for y in own for value in y if value]
        if shown:
            axis.update(_logarithmic_axis(math.log10(min(shown)), math.log10(max(shown))))
    figure.update_yaxes(gridcolor=GRID, zeroline=False, automargin=True)
    figure.update_annotations(font={"size": 13, "color": TEXT})
