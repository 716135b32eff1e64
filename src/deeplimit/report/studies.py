"""The studies of rates in depth, of consistency, of the horizon: answers, tables, figures."""

from collections.abc import Sequence
from statistics import geometric_mean

import plotly.graph_objects as go
from rich.console import RenderableType
from rich.text import Text

from deeplimit.errors import several
from deeplimit.report import style
from deeplimit.report.console import answered, table, worded
from deeplimit.report.numbers import significant
from deeplimit.studies import ConsistencyStudy, HorizonStudy, LinearStudy, SmoothStudy
from deeplimit.studies.horizon import ADDED
from deeplimit.studies.rates import Family, Quantity, Rate

READ = (
    "Dotted before training, solid after it; markers are means over the seeds, bars reach from the "
    "smallest to the largest; the thin grey line falls as 1/N. "
)
QUANTITIES: dict[Quantity, str] = {"gap": "gap", "difference": "max ‖Δθ‖"}
MARKS = {True: " ✓", False: " ✗", None: "  "}
LEGEND = (
    "Slopes of log value against log N, means of the seeds', before and after training and of the "
    "largest values over training; gap: max ‖xₙ − x(sₙ)‖ to the Neural ODE, Δθ: θₙ₊₁ − θₙ. "
    "✓ where the slope of every seed is as the theory says, ✗ where not. "
)
COLORS = {"smooth": style.NETWORK, "independent": style.REFERENCE, "alternating": style.TUBE}
MOMENTS = {"initial": ("before training", "dot"), "final": ("after training", "solid")}
PANELS: dict[Quantity, str] = {
    "gap": "gap to the Neural ODE",
    "difference": "max ‖θ<sub>n+1</sub> − θ<sub>n</sub>‖",
}
HEIGHT = 330  # of a row of panels
CONSISTENT = {
    "distance": "distance d",
    "output": "outputs",
    "travelled": "travelled",
    "unscaled": "travelled, unscaled",
}
SIZES = {
    "successive sizes": (
        ("distance", "atoms", "distance d, from atoms", style.NETWORK),
        ("output", "independent", "outputs, independent samples", style.TUBE),
        ("output", "tied", "outputs, tied samples", style.REFERENCE),
    ),
    "distance travelled": (
        ("travelled", "independent", "steps scaled by N·M", style.NETWORK),
        ("unscaled", "independent", "steps not scaled", style.REFERENCE),
    ),
}


def rates_summary(study: LinearStudy | SmoothStudy) -> RenderableType:
    """Makes the table of a study, with its settings below."""
    return rates_table(study.families, _note(study))


def rates_figures(study: LinearStudy | SmoothStudy) -> list[tuple[str, go.Figure, str]]:
    """Draws one figure with a row of panels for each activation."""
    figure = rates_figure("", study.depths, study.families)
    return [("rates", figure, f"{READ}{_note(study)}.")]


def rates_table(families: Sequence[Family], note: str) -> RenderableType:
    """Makes a table of every slope, those of the seeds after training, and the theory's."""
    rows = []
    for family in families:
        for quantity, words in QUANTITIES.items():
            before, after, worst = (r for r in family.rates if r.quantity == quantity)
            name = family.name.replace(", ", ",\n") if quantity == "gap" else ""
            slopes = (_slope(rate.slope) + MARKS[rate.within] for rate in (before, after, worst))
            seeds = f"{_slope(min(after.slopes))} … {_slope(max(after.slopes))}"
            rows.append((name, words, *slopes, seeds, _range(after.low, after.high)))
    headings = ("start", "of", "before", "after", "worst", "seeds, after", "theory, after")
    made = table(headings, rows, left=headings[:2], bold="")
    return answered(_right([r.within for f in families for r in f.rates]), made, note=LEGEND + note)


def _right(judged: Sequence[bool | None]) -> str:
    said = [within for within in judged if within is not None]
    return f"{sum(said)} of {len(said)} slopes are where the theory says."


def _range(low: float | None, high: float | None) -> str:
    if low is not None and high is not None:
        return f"{(low + high) / 2:.3g} ± {(high - low) / 2:.2g}".replace("-", "−")
    if low is not None:
        return f"≥ {_slope(low)}"
    return "" if high is None else f"≤ {_slope(high)}"


def _slope(slope: float) -> str:
    return f"{slope:.2f}".replace("-0.00", "0.00").replace("-", "−")


def _note(study: LinearStudy | SmoothStudy) -> str:
    own = ""
    if isinstance(study, SmoothStudy):
        own = (
            f"{several(study.hidden, 'unit')}, {several(study.samples, 'sample')}; start's length "
            f"scale {study.length_scale:g}; "
        )
    return (
        f"N = {study.depths[0]} … {study.depths[-1]}; d = {study.width}, {own}"
        f"η = {study.learning_rate:g}, {several(study.steps, 'step')}, looked at "
        f"{several(len(study.looked_at), 'time')}; {several(len(study.seeds), 'seed')}; float64"
    )


def rates_figure(title: str, depths: Sequence[int], families: Sequence[Family]) -> go.Figure:
    """A row of panels for each activation: gap on the left, differences on the right.

    Colour is the start; dotted is before training, solid after it. Markers are geometric means over
    the seeds, bars reach from the smallest to the largest; the thin grey line falls as 1/N.
    """
    activations = list(dict.fromkeys(family.activation for family in families))
    rows = len(activations)
    figure = style.plain_figure(title, "", "").set_subplots(
        rows,
        2,
        subplot_titles=[
            ": ".join(filter(None, (a, q))) for a in activations for q in PANELS.values()
        ],
        horizontal_spacing=0.09,
        vertical_spacing=0.25 / rows if rows > 1 else 0.0,
    )
    for row, activation in enumerate(activations, start=1):
        own = [family for family in families if family.activation == activation]
        for column, quantity in enumerate(PANELS, start=1):
            rates = [(f.start, r) for f in own for r in f.rates if r.quantity == quantity]
            drawn = [_one_over_n(rates[0][1], depths)]
            for start, rate in rates:
                if rate.moment in MOMENTS:
                    moment, dash = MOMENTS[rate.moment]
                    name, color = f"{start}, {moment}", COLORS.get(start, style.TEXT)
                    hover = f"%{{y:.3g}} (slope {significant(rate.slope, 2)})"
                    curve = style.seeds_curve(depths, rate.values, name, color, hover, dash)
                    drawn.append(curve.update(showlegend=row == column == 1))
            figure.add_traces(drawn, rows=row, cols=column)
    style.logarithmic_panels(figure, depths, map(str, depths))
    figure.update_xaxes(title={"text": "layers N", "standoff": 8, "font": {"size": 13}}, row=rows)
    legend = {"y": 1 + 45 / (HEIGHT * rows)}
    return figure.update_layout(height=110 + HEIGHT * rows, margin={"t": 130}, legend=legend)


def _one_over_n(rate: Rate, depths: Sequence[int]) -> go.Scatter:
    """From half the first of these values."""
    first = geometric_mean([values[0] for values in rate.values]) / 2
    return go.Scatter(
        x=[depths[0], depths[-1]],
        y=[first, first * depths[0] / depths[-1]],
        mode="lines",
        line={"color": style.TEXT, "width": 1},
        showlegend=False,
        hoverinfo="skip",
    )


def consistency_summary(study: ConsistencyStudy) -> RenderableType:
    """Every slope beside what the theory says."""
    rows = [
        (
            rate.start,
            CONSISTENT[rate.quantity],
            rate.against,
            _slope(rate.slope) + MARKS[rate.within],
            _range(rate.low, rate.high),
        )
        for rate in study.rates
    ]
    headings = ("start", "of", "against", "slope", "theory")
    made = table(headings, rows, left=headings[:2])
    return answered(_right([r.within for r in study.rates]), made, note=_consistency_note(study))


def _consistency_note(study: ConsistencyStudy) -> str:
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


def consistency_figures(study: ConsistencyStudy) -> list[tuple[str, go.Figure, str]]:
    """One figure of two panels over N: what falls as the networks grow, and what stays.

    Markers are geometric means over the seeds, bars reach from the smallest to the largest.
    """
    figure = style.plain_figure("Training against width and depth", "", "").set_subplots(
        1, 2, subplot_titles=list(SIZES), horizontal_spacing=0.1
    )
    for column, shown in enumerate(SIZES.values(), start=1):
        for quantity, start, name, color in shown:
            rate = study.rate(quantity, start)
            hover = f"%{{y:.3g}} (slope {significant(rate.slope, 2)} in {rate.against})"
            curve = style.seeds_curve(study.depths, rate.values, name, color, hover)
            figure.add_trace(curve, row=1, col=column)
    sizes = (f"{n}, {m}" for n, m in zip(study.depths, study.widths, strict=True))
    style.logarithmic_panels(figure, study.depths, sizes)
    title = {"text": "layers N, particles M", "standoff": 8, "font": {"size": 13}}
    figure.update_xaxes(title=title)
    figure.update_layout(height=440, margin={"t": 140}, legend={"y": 1.14})
    return [("consistency", figure, _consistency_note(study))]


def horizon_table(study: HorizonStudy) -> RenderableType:
    """Counts layers outside the tube for every depth and seed, and how their number grows."""
    seeds = (f"seed {seed}" for seed in study.seeds)
    rows = [
        (
            str(depth.horizon),
            *map(str, depth.outside),
            f"{depth.mean_outside:.1f}",
            " ".join("–" if entry is None else str(entry) for entry in depth.entry),
            " ".join(f"{100 * accuracy:.1f}" for accuracy in depth.accuracy),
        )
        for depth in study.depths
    ]
    headings = ("layers N", *seeds, "mean", "entry", "test accuracy")
    note = (
        f"{study.data}, step h = {study.step:g}, γ = {study.stage_cost:g} and r = "
        f"{study.control_cost:g} per layer, {several(study.epochs, 'epoch')}; tube δ = "
        f"{significant(study.radius)}; on test data. The runs are in {study.folder}"
    )
    answer = (
        f"From {study.depths[0].horizon} to {study.depths[-1].horizon} layers the number "
        f"outside the tube grows by a factor of {study.growth:.2f}."
    )
    made = table(headings, rows, "Layers outside the tube")
    return answered(answer, *_verdict(study), made, note=note)


def _verdict(study: HorizonStudy) -> list[Text]:
    """Puts the study's verdict in a sentence; nothing for a study made before there was one."""
    if study.verdict is None or study.added is None:
        return []
    why = f"{100 * study.added:.1f} % of the layers added lie outside, mean over the seeds"
    rest = {
        "kept": f"the count stays: {why}, shown to be at most {100 * ADDED:g} % (95 %)",
        "lost": f"the count grows: {why}, shown to be more than {100 * ADDED:g} % (95 %)",
        "unresolved": f"{why}; these seeds do not tell whether it is at most {100 * ADDED:g} %, "
        "more seeds would",
        "nothing learnt": "a network is not shown to be better on test data than always answering "
        "the largest class; train longer",
    }[study.verdict]
    return [Text.assemble(worded(study.verdict), f": {rest}.")]
