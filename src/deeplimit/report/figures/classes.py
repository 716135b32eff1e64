"""Distance over layers, class by class."""

import html
import math
from collections.abc import Sequence

import plotly.graph_objects as go

from deeplimit.control.turnpike import TurnpikeProfile
from deeplimit.report.figures.marks import layer_figure, shade_tube
from deeplimit.report.figures.style import GRID, class_color, class_symbol, line

NAMED = 10  # so many classes can be told apart by colour and symbol


def class_entry(profile: TurnpikeProfile, label: int) -> int | None:
    """First layer from which on a class stays in the tube up to layer N; None if it ends outside.

    A class without samples has no distances and so no entry.
    """
    entry = None
    for n in range(profile.horizon, -1, -1):
        if not profile.class_distance[n][label] <= profile.radius:
            break
        entry = n
    return entry


def slowest_first(profile: TurnpikeProfile) -> list[int]:
    """Classes with samples, the last to stay in the tube first; ties by the distance at layer N."""
    if not profile.class_distance:  # of tokens there is none
        return []
    last = profile.class_distance[-1]
    present = [c for c in range(profile.classes) if not math.isnan(last[c])]

    def key(label: int) -> tuple[float, float]:
        entry = class_entry(profile, label)
        return (math.inf if entry is None else float(entry), last[label])

    return sorted(present, key=key, reverse=True)


def class_figure(profile: TurnpikeProfile, class_names: Sequence[str]) -> go.Figure:
    """Mean distance to the minimisers of every class over layers.

    Beyond ten classes the ten that enter the tube last are named, the others drawn in grey.
    """
    horizon = profile.horizon
    figure = layer_figure("Class by class", horizon, "mean distance")
    figure.update_yaxes(rangemode="tozero")
    shade_tube(figure, profile.radius)
    order = slowest_first(profile)
    named = sorted(order[:NAMED])
    layers = list(range(horizon + 1))
    crowd = sorted(order[NAMED:])
    if crowd:
        figure.add_trace(_crowd(profile, crowd, layers))
    for place, label in enumerate(named):
        y = [row[label] for row in profile.class_distance]
        name = html.escape(class_names[label], quote=False)
        trace = line(layers, y, name, class_color(label if not crowd else place))
        trace.update(marker_symbol=class_symbol(label if not crowd else place), line_width=1.6)
        figure.add_trace(trace)
    return figure


def _crowd(profile: TurnpikeProfile, labels: Sequence[int], layers: Sequence[int]) -> go.Scatter:
    """Many classes as one pale trace, interrupted between classes."""
    x: list[float | None] = []
    y: list[float | None] = []
    for label in labels:
        x += [*layers, None]
        y += [*(row[label] for row in profile.class_distance), None]
    return go.Scatter(
        x=x,
        y=y,
        mode="lines",
        name=f"{len(labels)} other classes",
        line={"color": GRID, "width": 1.2},
        hoverinfo="skip",
    )
