"""The studies of rates in depth and of the horizon: tables, and the figure of the former."""

from collections.abc import Sequence

import plotly.graph_objects as go
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from deeplimit.errors import several
from deeplimit.report.console import worded
from deeplimit.report.numbers import significant
from deeplimit.report.rates import rates_figure
from deeplimit.studies import HorizonStudy, LinearStudy, SmoothStudy
from deeplimit.studies.horizon import ADDED
from deeplimit.studies.rates import Family, Quantity

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


def rates_summary(study: LinearStudy | SmoothStudy) -> RenderableType:
    """Makes the table of a study, with its settings below."""
    return rates_table(study.families, _note(study))


def rates_figures(study: LinearStudy | SmoothStudy) -> list[tuple[str, go.Figure, str]]:
    """Draws one figure with a row of panels for each activation."""
    figure = rates_figure("", study.depths, study.families)
    return [("rates", figure, f"{READ}{_note(study)}.")]


def rates_table(families: Sequence[Family], note: str) -> RenderableType:
    """Makes a table of every slope, those of the seeds after training, and the theory's."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("start", "of"):
        table.add_column(name)
    for name in ("before", "after", "worst", "seeds, after", "theory, after"):
        table.add_column(name, justify="right")
    for family in families:
        for quantity, words in QUANTITIES.items():
            before, after, worst = (r for r in family.rates if r.quantity == quantity)
            table.add_row(
                family.name.replace(", ", ",\n") if quantity == "gap" else "",
                words,
                *(_slope(rate.slope) + MARKS[rate.within] for rate in (before, after, worst)),
                f"{_slope(min(after.slopes))} … {_slope(max(after.slopes))}",
                _range(after.low, after.high),
            )
    judged = [rate.within for family in families for rate in family.rates]
    said = [within for within in judged if within is not None]
    answer = f"{sum(said)} of {len(said)} slopes are where the theory says."
    return Group(Text(answer, style="bold"), table, Text(LEGEND + note, style="dim"))


def _range(low: float | None, high: float | None) -> str:
    if low is not None and high is not None:
        return f"{(low + high) / 2:.3g} ± {(high - low) / 2:.2g}".replace("-", "−")
    if low is not None:
        return f"≥ {_slope(low)}"
    return "" if high is None else f"≤ {_slope(high)}"


def _slope(slope: float) -> str:
    text = f"{slope:.2f}"
    return ("0.00" if text == "-0.00" else text).replace("-", "−")


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


def horizon_table(study: HorizonStudy) -> RenderableType:
    """Counts layers outside the tube for every depth and seed, and how their number grows."""
    table = Table(title="Layers outside the tube", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("layers N", justify="right")
    for seed in study.seeds:
        table.add_column(f"seed {seed}", justify="right")
    for name in ("mean", "entry", "test accuracy"):
        table.add_column(name, justify="right")
    for depth in study.depths:
        table.add_row(
            str(depth.horizon),
            *map(str, depth.outside),
            f"{depth.mean_outside:.1f}",
            " ".join("–" if entry is None else str(entry) for entry in depth.entry),
            " ".join(f"{100 * accuracy:.1f}" for accuracy in depth.accuracy),
        )
    note = (
        f"{study.data}, step h = {study.step:g}, γ = {study.stage_cost:g} and r = "
        f"{study.control_cost:g} per layer, {several(study.epochs, 'epoch')}; tube δ = "
        f"{significant(study.radius)}; on test data. The runs are in {study.folder}"
    )
    return Group(
        Text(
            f"From {study.depths[0].horizon} to {study.depths[-1].horizon} layers the number "
            f"outside the tube grows by a factor of {study.growth:.2f}.",
            style="bold",
        ),
        *_verdict(study),
        table,
        Text(note, style="dim"),
    )


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
