"""The study of convergence: answer, maps, figures."""

from statistics import fmean

import plotly.graph_objects as go
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from deeplimit.errors import several
from deeplimit.report.certificate import certificate_answer, certificate_figures
from deeplimit.report.numbers import significant
from deeplimit.report.style import CLASSES, DASHED, NETWORK, SHADE, line, logarithmic, plain_figure
from deeplimit.studies.convergence import ConvergenceStudy, Source

SOURCES: dict[Source, str] = {
    "slope": "m = m̂/2 at the start",
    "kernel": "m of the features' kernel",
}
MAPS = (
    "Of all seeds so many hold; t: the time of the flow at which the first of the others was "
    "broken; no m: nothing is guaranteed from the start."
)


def convergence_summary(study: ConvergenceStudy) -> RenderableType:
    """Where certificates hold, and the rates of each width at the smallest risk."""
    parts: list[RenderableType] = [Text(convergence_answer(study), style="bold")]
    parts += [_map(study, source) for source in SOURCES]
    return Group(*parts, _rates(study), Text(_note(study), style="dim"))


def convergence_answer(study: ConvergenceStudy) -> str:
    """How many certificates hold in the good corner, and in the bad one."""
    corners = [
        (study.widths[-1], study.distances[0], "widest network, smallest risk"),
        (study.widths[0], study.distances[-1], "narrowest network, largest risk"),
    ]
    total = len(study.seeds)
    told = (
        f"{name}: {round(study.held(width, distance, 'slope') * total)} of {total} hold"
        for width, distance, name in corners
    )
    return f"Certificates with m = m̂/2 at the start. {'; '.join(told).capitalize()}."


def convergence_figures(study: ConvergenceStudy) -> list[tuple[str, go.Figure, str]]:
    """Risk against time, both maps, and the certificates of the two corners."""
    narrow, wide = study.widths[0], study.widths[-1]
    small, large = study.distances[0], study.distances[-1]
    found = [("decay", decay_figure(study), _note(study))]
    found += [
        (f"map-{source}", map_figure(study, source, words), f"Certificates with {words}. {MAPS}")
        for source, words in SOURCES.items()
    ]
    for width, distance in ((wide, small), (narrow, large)):
        certificate = study.cell(width, distance)[0].by_slope
        told = f"M = {width}, ρ = {distance:g}. {certificate_answer(certificate)} "
        found += [
            (f"{name}-{width}", figure, told + caption)
            for name, figure, caption in certificate_figures(certificate)
        ]
    return found


def _map(study: ConvergenceStudy, source: Source) -> Table:
    title = f"Certificates that hold, {SOURCES[source]}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("M \\ ρ", justify="right")
    for distance in study.distances:
        table.add_column(f"{distance:g}", justify="right", no_wrap=True)
    for width in study.widths:
        cells = []
        for distance in study.distances:
            there = [t.certificate(source) for t in study.cell(width, distance)]
            held = sum(c is not None and c.holds for c in there)
            cells.append("no m" if all(c is None for c in there) else f"{held}/{len(there)}")
        table.add_row(str(width), *cells)
    return table


def _rates(study: ConvergenceStudy) -> Table:
    distance = study.distances[0]
    title = f"Rates at ρ = {distance:g}, means of the seeds"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("M", "λ_min of the kernel", "its m", "m̂/2 at the start", "rate fitted"):
        table.add_column(name, justify="right", no_wrap=True)
    for width in study.widths:
        cell = study.cell(width, distance)
        fitted = [t.fitted for t in cell if t.fitted is not None]
        table.add_row(
            str(width),
            significant(fmean(t.kernel for t in cell)),
            significant(fmean(t.kernel_m for t in cell)),
            significant(fmean(t.by_slope.m for t in cell)),
            significant(fmean(fitted)) if fitted else "–",
        )
    return table


def _note(study: ConvergenceStudy) -> str:
    return (
        f"N = {several(study.depth, 'layer')}, {several(study.samples, 'orthogonal sample')} in d "
        f"= {study.state}; ρ: "
        "distance of the targets from the first outputs, the risk starts at ρ²/2; flow of "
        f"{several(study.steps, 'step')} of {study.learning_rate:g}; "
        f"{several(len(study.seeds), 'seed')}; "
        "float64. A risk that falls as e^(−2rt) has the rate r."
    )


def decay_figure(study: ConvergenceStudy) -> go.Figure:
    """L(t)/L(0) of the first seed: a colour for each width; the smallest risk solid, the largest
    dashed.
    """
    figure = plain_figure("Risk against time", "time of the flow", "risk over the first")
    figure.update_xaxes(unifiedhovertitle={"text": "t = %{x:.3g}"})
    drawn: list[float | None] = []
    ends = {study.distances[0]: "solid", study.distances[-1]: DASHED}
    for k, width in enumerate(study.widths):
        for distance, dash in ends.items():
            found = study.cell(width, distance)[0].by_slope
            values = [risk / found.risks[0] or None for risk in found.risks]
            name = f"M = {width}, ρ = {distance:g}"
            color = CLASSES[k % len(CLASSES)]
            figure.add_trace(line(found.times, values, name, color, dash, "%{y:.3g}"))
            figure.data[-1].update(mode="lines")
            drawn += values
    logarithmic(figure, drawn)
    return figure.update_layout(height=480, margin={"t": 170})


def map_figure(study: ConvergenceStudy, source: Source, words: str) -> go.Figure:
    """The fraction of certificates that hold, over width and ρ, with the time when one broke."""
    figure = plain_figure(f"Certificates, {words}", "ρ", "width M")
    z, texts = [], []
    for width in study.widths:
        z.append([study.held(width, distance, source) for distance in study.distances])
        texts.append([_text(study, width, distance, source) for distance in study.distances])
    figure.add_trace(
        go.Heatmap(
            z=z,
            x=[f"{distance:g}" for distance in study.distances],
            y=[str(width) for width in study.widths],
            text=texts,
            texttemplate="%{text}",
            zmin=0,
            zmax=1,
            colorscale=[[0, SHADE], [1, NETWORK]],
            showscale=False,
            xgap=2,
            ygap=2,
            hovertemplate="M = %{y}, ρ = %{x}: %{text}<extra></extra>",
        )
    )
    figure.update_xaxes(type="category")
    figure.update_yaxes(type="category", showgrid=False)
    return figure.update_layout(hovermode="closest", height=420)


def _text(study: ConvergenceStudy, width: int, distance: float, source: Source) -> str:
    """`3/3`, or `0/3, broken at t = 1.5` with the earliest time, or `no m`."""
    found = [t.certificate(source) for t in study.cell(width, distance)]
    there = [c for c in found if c is not None]
    if not there:
        return "no m"
    times = [c.times[c.broken_at] for c in there if c.broken_at is not None]
    held = f"{sum(c.holds for c in there)}/{len(found)}"
    return f"{held}<br>t = {min(times):.2g}" if times else held
