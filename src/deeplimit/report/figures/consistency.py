"""Consistency in width and depth: distances and outputs of successive sizes, distance travelled."""

import plotly.graph_objects as go

from deeplimit.report.figures.marks import logarithmic_panels, seeds_curve
from deeplimit.report.figures.style import NETWORK, REFERENCE, TUBE, plain_figure
from deeplimit.report.numbers import significant
from deeplimit.studies.consistency import ConsistencyRate, ConsistencyStudy

PANELS = (
    ("successive sizes", (("distance", "atoms"), ("output", "independent"), ("output", "tied"))),
    ("distance travelled", (("travelled", "independent"), ("unscaled", "independent"))),
)
LOOKS = {
    ("distance", "atoms"): ("distance d, from atoms", NETWORK),
    ("output", "independent"): ("outputs, independent samples", TUBE),
    ("output", "tied"): ("outputs, tied samples", REFERENCE),
    ("travelled", "independent"): ("steps scaled by N·M", NETWORK),
    ("unscaled", "independent"): ("steps not scaled", REFERENCE),
}


def consistency_figure(study: ConsistencyStudy) -> go.Figure:
    """Two panels over N: what falls as the networks grow, and what stays.

    Markers are geometric means over the seeds, bars reach from the smallest to the largest.
    """
    figure = plain_figure("Training against width and depth", "", "")
    titles = [title for title, _ in PANELS]
    figure.set_subplots(1, 2, subplot_titles=titles, horizontal_spacing=0.1)
    for column, (_, shown) in enumerate(PANELS, start=1):
        for key in shown:
            curve = _curve(study.rate(*key), study, *LOOKS[key])
            figure.add_trace(curve, row=1, col=column)
    ticks = [f"{n}, {m}" for n, m in zip(study.depths, study.widths, strict=True)]
    figure.update_xaxes(
        type="log",
        tickvals=list(study.depths),
        ticktext=ticks,
        showgrid=False,
        title={"text": "layers N, particles M", "standoff": 8, "font": {"size": 13}},
    )
    logarithmic_panels(figure)
    return figure.update_layout(height=440, margin={"t": 140}, legend={"y": 1.14})


def _curve(rate: ConsistencyRate, study: ConsistencyStudy, name: str, color: str) -> go.Scatter:
    return seeds_curve(
        study.depths,
        rate.values,
        name,
        color,
        f"%{{y:.3g}} (slope {significant(rate.slope, 2)} in {rate.against})",
    )
