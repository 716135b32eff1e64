"""The study of consistency: answer, table, figure."""

import plotly.graph_objects as go
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from deeplimit.errors import several
from deeplimit.report.numbers import significant
from deeplimit.report.style import (
    NETWORK,
    REFERENCE,
    TUBE,
    logarithmic_panels,
    plain_figure,
    seeds_curve,
)
from deeplimit.studies.consistency import ConsistencyRate, ConsistencyStudy

QUANTITIES = {
    "distance": "distance d",
    "output": "outputs",
    "travelled": "travelled",
    "unscaled": "travelled, unscaled",
}
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


def consistency_summary(study: ConsistencyStudy) -> RenderableType:
    """Every slope beside what the theory says."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("start", "of"):
        table.add_column(name, no_wrap=True)
    for name in ("against", "slope", "theory"):
        table.add_column(name, justify="right", no_wrap=True)
    for rate in study.rates:
        table.add_row(rate.start, QUANTITIES[rate.quantity], *_cells(rate))
    right = sum(rate.within for rate in study.rates)
    answer = f"{right} of {len(study.rates)} slopes are where the theory says."
    return Group(Text(answer, style="bold"), table, Text(_note(study), style="dim"))


def consistency_figures(study: ConsistencyStudy) -> list[tuple[str, go.Figure, str]]:
    """One figure with a panel for each quantity."""
    return [("consistency", consistency_figure(study), _note(study))]


def _cells(rate: ConsistencyRate) -> tuple[str, ...]:
    return (
        rate.against,
        _slope(rate.slope) + (" ✓" if rate.within else " ✗"),
        f"{(rate.low + rate.high) / 2:.3g} ± {(rate.high - rate.low) / 2:.2g}".replace("-", "−"),
    )


def _slope(slope: float) -> str:
    text = f"{slope:.2f}"
    return ("0.00" if text == "-0.00" else text).replace("-", "−")


def _note(study: ConsistencyStudy) -> str:
    sizes = zip(study.depths, study.widths, strict=True)
    return (
        f"(N, M) = {', '.join(f'({n}, {m})' for n, m in sizes)}; start: {study.atoms} atoms smooth "
        "in depth, or samples around them, independent in every layer or the same in all (tied); "
        f"d = {study.state}, {several(study.samples, 'sample')}, flow of "
        f"{several(study.steps, 'step')} of "
        f"{study.learning_rate:g}; {several(len(study.seeds), 'seed')}, "
        f"{several(study.draws, 'draw')}; float64. Slopes "
        "of log value against log of what stands beside it, means of the seeds'; d and outputs: of "
        "successive sizes; travelled: d from the start of training to its end, with steps scaled "
        "by N·M and without."
    )


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
