"""The study of consistency in words, as a table and a figure."""

import plotly.graph_objects as go
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from deeplimit.errors import several
from deeplimit.report.figures.consistency import consistency_figure
from deeplimit.studies.consistency import ConsistencyRate, ConsistencyStudy

QUANTITIES = {
    "distance": "distance d",
    "output": "outputs",
    "travelled": "travelled",
    "unscaled": "travelled, unscaled",
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
