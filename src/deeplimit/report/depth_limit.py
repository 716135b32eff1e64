"""A network and its Neural ODE in words and tables; for the terminal and the page."""

from collections.abc import Sequence

import plotly.graph_objects as go
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from deeplimit.errors import several
from deeplimit.ode import DepthLimit, DiscretizationGap, SolverAccuracy, StageSmoothness
from deeplimit.report.figures.depth_limit import controls_figure, gap_figure, smoothness_figure
from deeplimit.report.numbers import layers, percent, significant


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
