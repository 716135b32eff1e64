"""How every figure looks: readable on white and on black, and without telling colours apart.

Backgrounds are transparent and every colour has a contrast of about 3 or more to white and to
near-black alike. Colour says which network, the dash says which data: solid is train, dashed is
test (or validation, in training curves).
"""

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

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
