"""A network and its Neural ODE: verdict, tables, figures with captions."""

import math
from collections.abc import Sequence

import plotly.graph_objects as go
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from deeplimit.errors import several
from deeplimit.ode import (
    ControlCurves,
    DepthLimit,
    DiscretizationGap,
    SolverAccuracy,
    StageSmoothness,
)
from deeplimit.report.numbers import layers, percent, significant
from deeplimit.report.style import (
    CLASSES,
    DASHED,
    NETWORK,
    REFERENCE,
    TEXT,
    TUBE,
    layer_figure,
    line,
    logarithmic,
)

SEEN = 1e3  # times the largest gap, above which a bound would only squeeze all else together


def depth_limit_summary(limit: DepthLimit) -> RenderableType:
    """The verdict, a row for each stage, accuracy against cost, and what was measured."""
    parts: list[RenderableType] = [Text(limit.smoothness.verdict, style="bold")]
    table = Table(title="Distance to the Neural ODE", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("stage", "layers", "h", "roughness", "gap", "gap/state", "bound", "integral"):
        table.add_column(name, justify="right", no_wrap=True)
    smooth = {stage.stage: stage for stage in limit.smoothness.stages}
    for gap in limit.gaps:
        mine = smooth.get(gap.stage)
        table.add_row(
            str(gap.stage),
            str(gap.horizon),
            significant(gap.step),
            "–" if mine is None else significant(mine.roughness, 2),
            significant(max(gap.gap)),
            percent(relative_gap(gap)),
            "–" if gap.bound is None else significant(gap.bound[-1], 2),
            "–" if gap.integral_bound is None else significant(gap.integral_bound[-1], 2),
        )
    parts.append(table)
    if limit.solvers:
        parts.append(_solver_table(limit.solvers))
    return Group(*parts, Text(measured(limit), style="dim"))


def _solver_table(solvers: Sequence[SolverAccuracy]) -> RenderableType:
    table = Table(title="Accuracy against cost", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("solver", "steps", "evaluations of φ", "accuracy", "agreement"):
        table.add_column(name, justify="left" if name == "solver" else "right", no_wrap=True)
    for row in solver_rows(solvers):
        table.add_row(*row)
    return table


def solver_rows(solvers: Sequence[SolverAccuracy]) -> list[tuple[str, str, str, str, str]]:
    """Solver, steps, evaluations, accuracy, agreement with the network."""
    return [
        (
            "the network itself" if row.solver == "network" else row.solver,
            "adaptive" if row.steps is None else str(row.steps),
            f"{row.evaluations:.0f}",
            percent(row.accuracy, row.samples),
            percent(row.agreement, row.samples),
        )
        for row in solvers
    ]


def relative_gap(gap: DiscretizationGap) -> float:
    """The largest mean gap in units of the mean state there."""
    pairs = zip(gap.mean_gap, gap.state_norm, strict=True)
    return max((distance / size for distance, size in pairs if size), default=0.0)


def measured(limit: DepthLimit) -> str:
    """What the figures are of."""
    gap = limit.gaps[0]
    return (
        f"Gap: the largest ‖x_n − x(s_n)‖ over {several(gap.samples, 'sample')} and all "
        f"layers, controls {'piecewise ' + gap.interpolation} in depth; gap/state: its mean in "
        "units of the state. "
        f"Bounds (integral: the sharper one) at the last layer, from Jacobians at "
        f"{several(gap.segment_points, 'point')} of each segment. "
        f"Solver's error at most {significant(max(g.solver_error for g in limit.gaps), 2)}."
    )


def gap_caption(gap: DiscretizationGap) -> str:
    """How far, compared with the state, and how loose the bounds are."""
    text = (
        f"The states of {layers(gap.horizon)} stay within {significant(max(gap.gap))} of the "
        "Neural "
        f"ODE through the same controls (piecewise {gap.interpolation}, "
        f"{several(gap.samples, 'sample')}): "
        f"{percent(relative_gap(gap))} of the state's length in the mean."
    )
    if gap.bound is None or gap.integral_bound is None or not gap.gap[-1]:
        return text
    return text + (
        f" At the last layer the bound is {significant(gap.bound[-1] / gap.gap[-1], 2)} times the "
        f"gap, its integral form {significant(gap.integral_bound[-1] / gap.gap[-1], 2)} times."
    )


def smoothness_caption(stage: StageSmoothness) -> str:
    """The roughness and what it means."""
    return (
        f"How far θ moves over the whole depth at the speed it has between two layers, in units of "
        f"its own size. Roughness {significant(stage.roughness, 2)}: 1 for independent layers "
        f"(dotted), of the order of 1/N = {significant(1 / stage.horizon, 2)} for a smooth curve."
    )


def depth_limit_figures(limit: DepthLimit) -> list[tuple[str, go.Figure, str]]:
    """(name, figure, caption) for every stage."""
    shown = [(f"gap-{gap.stage}", gap_figure(gap), gap_caption(gap)) for gap in limit.gaps]
    shown += [
        (f"smoothness-{stage.stage}", smoothness_figure(stage), smoothness_caption(stage))
        for stage in limit.smoothness.stages
    ]
    shown += [
        (
            f"controls-{curves.stage}",
            controls_figure(curves),
            "A few numbers of each parameter, layer by layer. Smooth curves are a Neural ODE's "
            "controls; a zigzag is not.",
        )
        for curves in limit.curves
        if curves.groups
    ]
    order = ("gap", "smoothness", "controls")
    return sorted(shown, key=lambda s: (int(s[0].split("-")[1]), order.index(s[0].split("-")[0])))


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
