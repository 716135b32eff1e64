"""The study of convergence: risk against time, and where certificates hold."""

import plotly.graph_objects as go

from deeplimit.report.figures.marks import logarithmic
from deeplimit.report.figures.style import CLASSES, DASHED, NETWORK, SHADE, line, plain_figure
from deeplimit.studies.convergence import ConvergenceStudy, Source


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
