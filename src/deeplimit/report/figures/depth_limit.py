"""A network beside its Neural ODE: gap and bounds, smoothness, and the controls as curves in n."""

import math

import plotly.graph_objects as go

from deeplimit.ode import ControlCurves, DiscretizationGap, StageSmoothness
from deeplimit.report.figures.marks import layer_figure, logarithmic
from deeplimit.report.figures.style import (
    CLASSES,
    DASHED,
    NETWORK,
    REFERENCE,
    TEXT,
    TUBE,
    line,
)

SEEN = 1e3  # times the largest gap, above which a bound would only squeeze all else together


def gap_figure(measured: DiscretizationGap) -> go.Figure:
    """‖x_n − x(s_n)‖ over the layers, the bounds above it and the size of the state."""
    figure = layer_figure(
        _of_stage("Distance to the Neural ODE", measured.stage),
        measured.horizon,
        "Euclidean norm, logarithmic",
    )
    top = SEEN * max(measured.gap)
    curves = [
        ("state", measured.state_norm, TEXT, "solid"),
        ("bound", measured.bound, REFERENCE, DASHED),
        ("integral form", measured.integral_bound, REFERENCE, "solid"),
        ("gap", measured.gap, NETWORK, "solid"),
        ("mean gap", measured.mean_gap, NETWORK, DASHED),
    ]
    drawn: list[float | None] = []
    for name, values, color, dash in curves:
        if values is None:
            continue
        shown = [v if 0 < v <= top else None for v in values]
        if any(v is not None for v in shown):
            figure.add_trace(line(range(len(shown)), shown, name, color, dash, "%{y:.3g}"))
            drawn += shown
    logarithmic(figure, drawn)
    return figure


def smoothness_figure(measured: StageSmoothness) -> go.Figure:
    """N‖θ_{n+1} − θ_n‖ in units of ‖θ‖, all together and parameter by parameter."""
    figure = layer_figure(
        _of_stage("Smoothness in depth", measured.stage),
        len(measured.overall),
        "speed of θ, logarithmic",
    )
    figure.update_xaxes(unifiedhovertitle={"text": "between layers, at %{x}"})
    places = [n + 0.5 for n in range(len(measured.overall))]
    drawn: list[float | None] = []
    largest = sorted(measured.groups.items(), key=lambda item: -max(item[1]))
    for i, (name, speeds) in enumerate(largest[: len(CLASSES)]):
        shown = [v if v > 0 else None for v in speeds]
        if any(shown):
            figure.add_trace(line(places, shown, name, CLASSES[i], "solid", "%{y:.3g}"))
            figure.data[-1].update(line={"width": 1.2}, marker={"size": 3})
            drawn += shown
    together = [v if v > 0 else None for v in measured.overall]
    figure.add_trace(line(places, together, "all together", NETWORK, "solid", "%{y:.3g}"))
    figure.data[-1].update(line={"width": 3.2})
    independent = math.sqrt(2) * measured.horizon
    figure.add_hline(y=independent, line={"color": TUBE, "width": 1.5, "dash": "dot"})
    figure.add_annotation(
        x=1,
        xref="paper",
        y=math.log10(independent),
        text="independent layers",
        showarrow=False,
        xanchor="right",
        yanchor="bottom",
        font={"color": TUBE, "size": 12},
    )
    logarithmic(figure, [*drawn, *together, independent])
    return figure


def controls_figure(curves: ControlCurves) -> go.Figure:
    """Some numbers of θ_n over n, a colour for each parameter."""
    nodes = max((len(c) for group in curves.groups.values() for c in group), default=1)
    figure = layer_figure(
        _of_stage("Controls as curves in depth", curves.stage), nodes - 1, "θ<sub>n</sub>"
    )
    figure.update_layout(hovermode="closest")
    for i, (name, group) in enumerate(curves.groups.items()):
        for j, values in enumerate(group):
            trace = line(range(len(values)), values, name, CLASSES[i], "solid", "%{y:.3g}")
            trace.update(
                legendgroup=name, showlegend=j == 0, line={"width": 1.4}, marker={"size": 3}
            )
            figure.add_trace(trace)
    return figure


def _of_stage(title: str, stage: int) -> str:
    return title if stage == 0 else f"{title}, stage {stage}"
