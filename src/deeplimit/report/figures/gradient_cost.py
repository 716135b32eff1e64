"""What the adjoint saves, as a figure: memory, time and gradient error of every method."""

import math
from collections.abc import Sequence
from textwrap import wrap

import plotly.graph_objects as go

from deeplimit.report.figures.style import GRID, NETWORK, REFERENCE, TEXT, TUBE, plain_figure
from deeplimit.report.gradient_cost import gradient_answer, short_name
from deeplimit.report.numbers import memory, seconds, significant, superscript
from deeplimit.studies.gradient_cost import GradientCost

PANELS = ("memory at the peak", "time of a step", "gradient error")
TITLE = 90  # characters in a line of the title


def gradient_cost_figure(cost: GradientCost) -> go.Figure:
    """Bars for each method: memory, time, gradient error (logarithmic, with the tolerance)."""
    methods = [method for method in cost.methods if not method.failed]
    names = [short_name(method) for method in methods]
    colors = [NETWORK if method.evaluations else REFERENCE for method in methods]
    figure = plain_figure("<br>".join(wrap(gradient_answer(cost), TITLE)), "", "")
    titles = (*PANELS[:2], f"{PANELS[2]} (dotted: {100 * cost.tolerance:g} %)")
    figure.set_subplots(1, 3, shared_yaxes=True, horizontal_spacing=0.06, subplot_titles=titles)
    errors = [100 * method.error if method.error else None for method in methods]
    panels: Sequence[tuple[list[float | None], list[str]]] = (
        ([m.memory for m in methods], [memory(m.memory or 0) for m in methods]),
        ([m.seconds for m in methods], [seconds(m.seconds or 0.0) for m in methods]),
        (errors, [f"{significant(e, 2)} %" if e else "" for e in errors]),
    )
    for column, (values, texts) in enumerate(panels, start=1):
        bars = go.Bar(
            x=values,
            y=names,
            orientation="h",
            text=texts,
            textposition="auto",
            cliponaxis=False,
            marker={"color": colors},
            hovertemplate="%{y}: %{text}<extra></extra>",
        )
        figure.add_trace(bars, row=1, col=column)
    figure.update_xaxes(showgrid=True, gridcolor=GRID, zeroline=False, showticklabels=False)
    figure.update_yaxes(autorange="reversed", automargin=True, showgrid=False)
    figure.update_annotations(font={"size": 13, "color": TEXT})
    _errors_axis(figure, cost, [e for e in errors if e])
    figure.update_layout(
        showlegend=False, hovermode="closest", bargap=0.3, height=440, margin={"t": 110}
    )
    return figure


def _errors_axis(figure: go.Figure, cost: GradientCost, errors: list[float]) -> None:
    """Powers of ten, and the tolerance as a line; exact gradients have no bar."""
    if not errors:
        return
    shown = [*errors, 100 * cost.tolerance]
    low, high = math.floor(math.log10(min(shown))) - 0.5, math.ceil(math.log10(max(shown))) + 0.3
    powers = range(math.ceil(low), math.floor(high) + 1, max(1, round((high - low) / 5)))
    figure.update_xaxes(
        type="log",
        range=[low, high],
        tickvals=[10.0**power for power in powers],
        ticktext=[f"10{superscript(power)} %" for power in powers],
        showticklabels=True,
        row=1,
        col=3,
    )
    figure.add_vline(
        x=100 * cost.tolerance,
        line={"color": TUBE, "width": 1.5, "dash": "dot"},
        row=1,
        col=3,
    )
