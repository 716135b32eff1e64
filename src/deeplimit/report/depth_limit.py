"""A network and its Neural ODE: verdict, tables, figures with captions."""

import math
from collections.abc import Sequence

import plotly.graph_objects as go
from rich.console import RenderableType

from deeplimit.errors import several
from deeplimit.ode import (
    ControlCurves,
    DepthLimit,
    DiscretizationGap,
    SolverAccuracy,
    StageSmoothness,
)
from deeplimit.report import style
from deeplimit.report.console import answered, table
from deeplimit.report.numbers import layers, percent, significant

SEEN = 1e3  # times the largest gap, above which a bound would only squeeze all else together
COLUMNS = ("stage", "layers", "h", "roughness", "gap", "gap/state", "bound", "integral")
SOLVERS = ("solver", "steps", "evaluations of φ", "accuracy", "agreement")
CONTROLS = (
    "A few numbers of each parameter, layer by layer. Smooth curves are a Neural ODE's controls; a "
    "zigzag is not."
)


def depth_limit_summary(limit: DepthLimit) -> RenderableType:
    """The verdict, a row for each stage, accuracy against cost, and what was measured."""
    smooth = {stage.stage: [stage.roughness] for stage in limit.smoothness.stages}

    def last(values: Sequence[float] | None) -> str:
        return "–" if values is None else significant(values[-1], 2)

    rows = [
        (
            str(gap.stage),
            str(gap.horizon),
            significant(gap.step),
            last(smooth.get(gap.stage)),
            significant(max(gap.gap)),
            percent(relative_gap(gap)),
            last(gap.bound),
            last(gap.integral_bound),
        )
        for gap in limit.gaps
    ]
    parts = [table(COLUMNS, rows, "Distance to the Neural ODE")]
    if limit.solvers:
        title = "Accuracy against cost"
        parts.append(table(SOLVERS, solver_rows(limit.solvers), title, left=SOLVERS[:1]))
    return answered(limit.smoothness.verdict, *parts, note=measured(limit))


def solver_rows(solvers: Sequence[SolverAccuracy]) -> list[tuple[str, ...]]:
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
    """Says what the figures are of."""
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
    """Says how far, compared with the state, and how loose the bounds are."""
    text = (
        f"The states of {layers(gap.horizon)} stay within {significant(max(gap.gap))} of the "
        f"Neural ODE through the same controls (piecewise {gap.interpolation}, "
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
    """(name, figure, caption) of gap, smoothness and controls, stage by stage."""
    shown = [
        *((gap.stage, "gap", gap_figure(gap), gap_caption(gap)) for gap in limit.gaps),
        *(
            (stage.stage, "smoothness", smoothness_figure(stage), smoothness_caption(stage))
            for stage in limit.smoothness.stages
        ),
        *((c.stage, "controls", controls_figure(c), CONTROLS) for c in limit.curves if c.groups),
    ]
    by_stage = sorted(shown, key=lambda one: one[0])
    return [(f"{name}-{stage}", figure, caption) for stage, name, figure, caption in by_stage]


def gap_figure(measured: DiscretizationGap) -> go.Figure:
    """‖x_n − x(s_n)‖ over the layers, the bounds above it and the size of the state."""
    title, top = _of_stage("Distance to the Neural ODE", measured.stage), SEEN * max(measured.gap)
    figure = style.layer_figure(title, measured.horizon, "Euclidean norm, logarithmic")
    curves = (
        style.Curve("state", measured.state_norm, style.TEXT),
        style.reference("bound", measured.bound or ()),
        style.Curve("integral form", measured.integral_bound or (), style.REFERENCE),
        style.Curve("gap", measured.gap),
        style.Curve("mean gap", measured.mean_gap, dash=style.DASHED),
    )
    for curve in curves:
        shown = [v if v and 0 < v <= top else None for v in curve.values]
        if any(shown):
            style.draw(figure, range(len(shown)), curve._replace(values=shown))
    return style.logarithmic(figure)


def smoothness_figure(measured: StageSmoothness) -> go.Figure:
    """N‖θ_{n+1} − θ_n‖ in units of ‖θ‖, all together and parameter by parameter."""
    title, steps = _of_stage("Smoothness in depth", measured.stage), len(measured.overall)
    figure = style.layer_figure(title, steps, "speed of θ, logarithmic", between=True)
    places = [n + 0.5 for n in range(steps)]
    largest = sorted(measured.groups.items(), key=lambda item: -max(item[1]))
    for color, (name, speeds) in zip(style.CLASSES, largest, strict=False):
        if any(v > 0 for v in speeds):
            style.draw(figure, places, style.Curve(name, style.positive(speeds), color))
    figure.update_traces(line_width=1.2, marker_size=3)
    style.draw(figure, places, style.Curve("all together", style.positive(measured.overall)))
    figure.data[-1].update(line_width=3.2)
    independent = math.sqrt(2) * measured.horizon
    style.mark_value(figure, independent, "independent layers", log=True)
    return style.logarithmic(figure, independent)


def controls_figure(curves: ControlCurves) -> go.Figure:
    """Some numbers of θ_n over n, a colour for each parameter."""
    nodes = max((len(c) for group in curves.groups.values() for c in group), default=1)
    title = _of_stage("Controls as curves in depth", curves.stage)
    figure = style.layer_figure(title, nodes - 1, "θ<sub>n</sub>")
    for i, (name, group) in enumerate(curves.groups.items()):
        for j, values in enumerate(group):
            curve = style.Curve(name, values, style.class_look(i)[0])
            style.draw(figure, range(len(values)), curve)
            figure.data[-1].update(legendgroup=name, showlegend=j == 0)
    figure.update_traces(line_width=1.4, marker_size=3)
    return figure.update_layout(hovermode="closest")


def _of_stage(title: str, stage: int) -> str:
    return title if stage == 0 else f"{title}, stage {stage}"
