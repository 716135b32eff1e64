"""Networks as measures: their distance in depth, and loss and accuracy on the way between two."""

from collections.abc import Callable

import plotly.graph_objects as go

from deeplimit.report.figures.style import (
    CLASSES,
    DASHED,
    NETWORK,
    REFERENCE,
    SHADE,
    line,
    plain_figure,
)
from deeplimit.report.numbers import significant
from deeplimit.studies.comparison import ComparedLayer, Comparison
from deeplimit.studies.interpolation import Interpolation
from deeplimit.training.results import Score


def path_loss_figure(found: Interpolation) -> go.Figure:
    """Test loss over t: the geodesic solid, the averages of parameters dashed."""
    figure = _over_t("Loss between the networks", "nats")
    return _add_paths(figure, found, lambda score: score.loss)


def path_accuracy_figure(found: Interpolation) -> go.Figure:
    """Test accuracy over t, likewise."""
    figure = _over_t("Accuracy between the networks", "percent")
    return _add_paths(figure, found, lambda score: 100 * score.accuracy, "%{y:.2f} %")


def _add_paths(
    figure: go.Figure,
    found: Interpolation,
    value: Callable[[Score], float],
    *hover: str,
) -> go.Figure:
    curves = [("geodesic", found.geodesic, NETWORK, "solid")]
    if found.naive is not None:
        curves.append(("parameters averaged", found.naive, REFERENCE, DASHED))
    for name, scores, color, dash in curves:
        figure.add_trace(line(found.ts, [value(s) for s in scores], name, color, dash, *hover))
    return figure


def layer_distance_figure(
    layers: tuple[ComparedLayer, ...], title: str = "Distance in depth"
) -> go.Figure:
    """W_2 over the depth s, constant in each cell; dashed with neurons matched by their numbers."""
    figure = _over_depth(title)
    figure.add_trace(_steps(layers, [layer.distance for layer in layers], "matched", NETWORK))
    by_number = [layer.by_number for layer in layers]
    if any(value is not None for value in by_number):
        trace = _steps(layers, by_number, "by their numbers", REFERENCE)
        figure.add_trace(trace.update(line={"dash": DASHED}))
    return figure


def comparison_figure(found: Comparison) -> go.Figure:
    """W_2 over the depth s, a curve for every two networks."""
    figure = _over_depth("Distance in depth")
    for k, pair in enumerate(found.pairs):
        names = [found.networks[n].name for n in (pair.first, pair.second)]
        values = [layer.distance for layer in pair.layers]
        color = CLASSES[k % len(CLASSES)]
        figure.add_trace(_steps(pair.layers, values, " – ".join(names), color))
    return figure


def distance_map_figure(found: Comparison) -> go.Figure:
    """The distance of every two networks."""
    names = [network.name for network in found.networks]
    every = range(len(names))
    z = [[found.distance(i, j) if i != j else None for j in every] for i in every]
    texts = [["" if d is None else significant(d) for d in row] for row in z]
    figure = plain_figure("Distances", "", "")
    figure.add_trace(
        go.Heatmap(
            z=z,
            x=names,
            y=names,
            text=texts,
            texttemplate="%{text}",
            zmin=0,
            zmax=max(pair.distance for pair in found.pairs) or 1,
            colorscale=[[0, SHADE], [1, NETWORK]],
            showscale=False,
            xgap=2,
            ygap=2,
            hoverongaps=False,
            hovertemplate="%{y} and %{x}: d = %{text}<extra></extra>",
        )
    )
    figure.update_xaxes(type="category")
    figure.update_yaxes(type="category", showgrid=False, autorange="reversed")
    return figure.update_layout(hovermode="closest", height=100 + 44 * len(names), margin={"t": 56})


def _over_t(title: str, y_title: str) -> go.Figure:
    figure = plain_figure(title, "t, from the first network to the second", y_title)
    return figure.update_xaxes(range=[-0.03, 1.03], unifiedhovertitle={"text": "t = %{x:.3g}"})


def _over_depth(title: str) -> go.Figure:
    figure = plain_figure(title, "depth s, from the input to the output", "W<sub>2</sub>")
    figure.update_yaxes(rangemode="tozero")
    return figure.update_xaxes(range=[-0.03, 1.03], unifiedhovertitle={"text": "s = %{x:.3g}"})


def _steps(
    layers: tuple[ComparedLayer, ...],
    values: list[float] | list[float | None],
    name: str,
    color: str,
) -> go.Scatter:
    """One value for each cell, held until the next."""
    x = [*(layer.start for layer in layers), layers[-1].end]
    trace = line(x, [*values, values[-1]], name, color, "solid", "%{y:.3g}")
    return trace.update(mode="lines", line={"shape": "hv"})
