"""Gap and smoothness against depth, logarithmic: what falls as 1/N and what does not."""

from collections.abc import Sequence
from statistics import geometric_mean

import plotly.graph_objects as go

from deeplimit.report.numbers import significant
from deeplimit.report.style import (
    NETWORK,
    REFERENCE,
    TEXT,
    TUBE,
    logarithmic_panels,
    plain_figure,
    seeds_curve,
)
from deeplimit.studies.rates import Family, Rate

COLORS = {"smooth": NETWORK, "independent": REFERENCE, "alternating": TUBE}
MOMENTS = {"initial": ("before training", "dot"), "final": ("after training", "solid")}
GAP, DIFFERENCE = "gap to the Neural ODE", "max ‖θ<sub>n+1</sub> − θ<sub>n</sub>‖"
HEIGHT = 330  # of a row of panels


def rates_figure(title: str, depths: Sequence[int], families: Sequence[Family]) -> go.Figure:
    """A row of panels for each activation: gap on the left, differences on the right.

    Colour is the start; dotted is before training, solid after it. Markers are geometric means over
    the seeds, bars reach from the smallest to the largest; the thin grey line falls as 1/N.
    """
    activations = list(dict.fromkeys(family.activation for family in families))
    rows = len(activations)
    titles = [": ".join(filter(None, (a, q))) for a in activations for q in (GAP, DIFFERENCE)]
    figure = plain_figure(title, "", "")
    figure.set_subplots(
        rows,
        2,
        subplot_titles=titles,
        horizontal_spacing=0.09,
        vertical_spacing=0.25 / rows if rows > 1 else 0.0,
    )
    for row, activation in enumerate(activations, start=1):
        own = [family for family in families if family.activation == activation]
        for column, quantity in ((1, "gap"), (2, "difference")):
            rates = [(f.start, r) for f in own for r in f.rates if r.quantity == quantity]
            figure.add_trace(_one_over_n(rates[0][1], depths), row=row, col=column)
            for start, rate in rates:
                if rate.moment in MOMENTS:
                    curve = _curve(start, rate, depths, legend=row == column == 1)
                    figure.add_trace(curve, row=row, col=column)
    _axes(figure, depths, rows)
    return figure


def _curve(start: str, rate: Rate, depths: Sequence[int], *, legend: bool) -> go.Scatter:
    moment, dash = MOMENTS[rate.moment]
    curve = seeds_curve(
        depths,
        rate.values,
        f"{start}, {moment}",
        COLORS.get(start, TEXT),
        f"%{{y:.3g}} (slope {significant(rate.slope, 2)})",
        dash,
    )
    return curve.update(showlegend=legend)


def _one_over_n(rate: Rate, depths: Sequence[int]) -> go.Scatter:
    """From half the first of these values."""
    first = geometric_mean([values[0] for values in rate.values]) / 2
    return go.Scatter(
        x=[depths[0], depths[-1]],
        y=[first, first * depths[0] / depths[-1]],
        mode="lines",
        line={"color": TEXT, "width": 1},
        showlegend=False,
        hoverinfo="skip",
    )


def _axes(figure: go.Figure, depths: Sequence[int], rows: int) -> None:
    figure.update_xaxes(
        type="log", tickvals=list(depths), ticktext=[str(depth) for depth in depths], showgrid=False
    )
    figure.update_xaxes(title={"text": "layers N", "standoff": 8, "font": {"size": 13}}, row=rows)
    logarithmic_panels(figure)
    figure.update_layout(
        height=110 + HEIGHT * rows,
        margin={"t": 130},
        legend={"y": 1 + 45 / (HEIGHT * rows)},
    )
