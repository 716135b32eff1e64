"""The limit of infinite depth rendered: the numbers in figures, tables and captions are its own."""

import math

import plotly.graph_objects as go
import pytest
from rich.console import Console

from deeplimit.ode import (
    ControlCurves,
    DepthLimit,
    DiscretizationGap,
    Smoothness,
    SolverAccuracy,
    StageSmoothness,
)
from deeplimit.report.depth_limit import (
    controls_figure,
    depth_limit_figures,
    depth_limit_summary,
    gap_caption,
    gap_figure,
    relative_gap,
    smoothness_figure,
    solver_rows,
)


def a_gap(**changes: object) -> DiscretizationGap:
    values = {
        "stage": 0,
        "horizon": 2,
        "step": 0.5,
        "scheme": "euler",
        "interpolation": "linear",
        "samples": 7,
        "gap": (0.0, 0.5, 0.8),
        "mean_gap": (0.0, 0.2, 0.6),
        "state_norm": (1.0, 2.0, 4.0),
        "bound": (0.0, 5.0, 5e9),
        "integral_bound": (0.0, 0.75, 1.6),
        "lipschitz": (1.0, 2.0),
        "lipschitz_residual": 1e-9,
        "segment_points": 3,
        "acceleration": (1.0, 2.0),
        "solver": "dopri8",
        "solver_error": 1e-6,
    }
    return DiscretizationGap(**(values | changes))  # type: ignore[arg-type]


SMOOTH = StageSmoothness(
    0, 0, 2, {"weight": (1.0, 4.0), "bias": (0.0, 0.0)}, (1.0, 4.0), 0.2, "smooth"
)
LIMIT = DepthLimit(
    Smoothness((SMOOTH,), "ODE-like (roughness 0.20): so be it"),
    (a_gap(),),
    (ControlCurves(0, {"weight": ((0.1, 0.2, 0.3), (1.0, 1.1, 1.2)), "bias": ((5.0, 6.0, 7.0),)}),),
    (
        SolverAccuracy("network", 2, 2.0, 1000, 0.98, 1.0),
        SolverAccuracy("rk4", 1, 4.0, 1000, 0.9, 0.91),
        SolverAccuracy("dopri5", None, 37.4, 1000, 0.97, 0.95),
    ),
)


def curves(figure: go.Figure) -> dict[str, tuple[float | None, ...]]:
    return {trace.name: tuple(trace.y) for trace in figure.data}


def test_the_gap_and_what_is_above_it() -> None:
    drawn = curves(gap_figure(a_gap()))
    assert drawn["gap"] == (None, 0.5, 0.8)  # a logarithmic scale has no 0
    assert drawn["mean gap"] == (None, 0.2, 0.6)
    assert drawn["integral form"] == (None, 0.75, 1.6)
    assert drawn["state"] == (1.0, 2.0, 4.0)
    assert drawn["bound"] == (None, 5.0, None)  # so far above all else that nothing else were seen


def test_a_gap_without_bounds() -> None:
    bare = a_gap(scheme="heun", bound=None, integral_bound=None, lipschitz=None, acceleration=None)
    assert set(curves(gap_figure(bare))) == {"gap", "mean gap", "state"}
    assert "bound" not in gap_caption(bare)


def test_smoothness_beside_what_independent_layers_have() -> None:
    figure = smoothness_figure(SMOOTH)
    drawn = curves(figure)
    assert drawn["all together"] == (1.0, 4.0)
    assert drawn["weight"] == (1.0, 4.0)
    assert "bias" not in drawn  # zero throughout
    assert tuple(figure.data[0].x) == (0.5, 1.5)
    (line,) = figure.layout.shapes
    assert line.y0 == pytest.approx(2 * math.sqrt(2))


def test_controls_are_curves_in_n() -> None:
    figure = controls_figure(LIMIT.curves[0])
    assert [tuple(trace.y) for trace in figure.data] == [
        (0.1, 0.2, 0.3),
        (1.0, 1.1, 1.2),
        (5.0, 6.0, 7.0),
    ]
    assert [trace.name for trace in figure.data] == ["weight", "weight", "bias"]
    assert [trace.showlegend for trace in figure.data] == [True, False, True]


def test_the_captions_have_the_numbers() -> None:
    assert relative_gap(a_gap()) == pytest.approx(0.15)  # 0.6 of 4, more than 0.2 of 2
    caption = gap_caption(a_gap())
    assert "within 0.8" in caption
    assert "15.0 %" in caption.replace("\N{NO-BREAK SPACE}", " ")
    assert "its integral form 2 times" in caption.replace("2.0 times", "2 times")


def test_every_stage_has_its_figures_in_order() -> None:
    second = DepthLimit(
        LIMIT.smoothness, (a_gap(), a_gap(stage=1)), (*LIMIT.curves, ControlCurves(1, {}))
    )
    names = [name for name, _, _ in depth_limit_figures(second)]
    assert names == ["gap-0", "smoothness-0", "controls-0", "gap-1"]
    titles = [figure.layout.title.text for _, figure, _ in depth_limit_figures(second)]
    assert titles[-1] == "Distance to the Neural ODE, stage 1"


def test_the_table_for_the_terminal() -> None:
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(depth_limit_summary(LIMIT))
    text = console.export_text().replace("\N{NO-BREAK SPACE}", " ")
    assert text.startswith("ODE-like (roughness 0.20)")
    for figure in ("0.800", "15.0 %", "98.0 %", "91.0 %", "37", "adaptive", "the network itself"):
        assert figure in text, figure
    assert "…" not in text  # nothing is cut off at 80 columns


def test_solver_rows() -> None:
    assert [row[:3] for row in solver_rows(LIMIT.solvers)] == [
        ("the network itself", "2", "2"),
        ("rk4", "1", "4"),
        ("dopri5", "adaptive", "37"),
    ]
