"""Convergence: its certificate against what a training did, and its study of widths and risks."""

from statistics import fmean

import plotly.graph_objects as go
from rich.console import RenderableType

from deeplimit.errors import several
from deeplimit.meanfield.convergence import ConvergenceCertificate
from deeplimit.report import style
from deeplimit.report.console import answered, table
from deeplimit.report.numbers import significant
from deeplimit.studies.convergence import ConvergenceStudy, Source

SOURCES: dict[Source, str] = {
    "slope": "m = m̂/2 at the start",
    "kernel": "m of the features' kernel",
}
MAPS = (
    "Of all seeds so many hold; t: the time of the flow at which the first of the others was "
    "broken; no m: nothing is guaranteed from the start."
)
RATES = ("M", "λ_min of the kernel", "its m", "m̂/2 at the start", "rate fitted")


def certificate_answer(certificate: ConvergenceCertificate) -> str:
    """The verdict as a sentence."""
    return f"The certificate {'' if certificate.holds else 'is '}{certificate.verdict}."


def certificate_figures(
    certificate: ConvergenceCertificate,
) -> list[tuple[str, go.Figure, str]]:
    """(name, figure, caption): risk, distance, rate."""
    risks, m = certificate.risks, significant(certificate.m)
    pairs = zip(risks, certificate.guaranteed, strict=True)
    above = sum(risk > guaranteed * (1 + 1e-9) for risk, guaranteed in pairs)
    where = f"above it in {above} of {len(risks)} records" if above else "never above it"
    risk = (
        f"The risk above its infimum starts at {significant(risks[0])} and ends at "
        f"{significant(risks[-1])}; the guaranteed curve falls as e^(−2mt), m = {m}, and the risk "
        f"is {where}."
    )
    distance = (
        f"The layer-conditional distance from the start reaches "
        f"{significant(max(certificate.distances))}; the guarantee needs it to stay within R = "
        f"√(2L/m) = {significant(certificate.budget)}. The way itself is "
        f"{significant(certificate.path_lengths[-1])} long."
    )
    rates = [rate for rate in certificate.rates if rate is not None]
    rate = (
        "m̂ is half the squared slope over the risk; the guarantee needs it to stay above m = "
        f"{m}, which was fixed before the first step."
    ) + (f" Its least value is {significant(min(rates))}." if rates else "")
    return [
        ("certificate-risk", risk_figure(certificate), risk),
        ("certificate-distance", travelled_figure(certificate), distance),
        ("certificate-rate", rate_figure(certificate), rate),
    ]


def risk_figure(certificate: ConvergenceCertificate) -> go.Figure:
    """The risk above its infimum, and the guaranteed curve e^{−2mt} L(μ_0)."""
    guaranteed = style.reference("guaranteed", certificate.guaranteed)
    risk = style.Curve("risk", certificate.risks)
    title = ("Risk against the guarantee", "risk, logarithmic")
    return _over_time(*title, certificate, guaranteed, risk, log=True)


def travelled_figure(certificate: ConvergenceCertificate) -> go.Figure:
    """The distance travelled, the path's length, and the budget R."""
    budget = [certificate.budget] * len(certificate.times)
    return _over_time(
        "Distance against the budget",
        "distance",
        certificate,
        style.reference("budget R", budget),
        style.Curve("length of the way", certificate.path_lengths, dash="dot"),
        style.Curve("distance", certificate.distances),
    )


def rate_figure(certificate: ConvergenceCertificate) -> go.Figure:
    """m̂ and the m that was fixed at the start."""
    fixed = style.reference("m, fixed at the start", [certificate.m] * len(certificate.times))
    rate = style.Curve("m̂", certificate.rates)
    title = ("Rate against the one fixed", "rate, logarithmic")
    return _over_time(*title, certificate, fixed, rate, log=True)


def _over_time(
    title: str,
    y_title: str,
    certificate: ConvergenceCertificate,
    *curves: style.Curve,
    log: bool = False,
) -> go.Figure:
    """Curves over the flow's time, with a line where the certificate broke."""
    figure = style.plain_figure(title, "time of the flow", y_title, at="t = %{x:.3g}", zero=not log)
    if certificate.broken_at is not None:
        figure.add_vline(
            x=certificate.times[certificate.broken_at],
            line={"color": style.TUBE, "width": 1.5},
            annotation={"text": "broken", "font": {"color": style.TUBE, "size": 12}},
        )
    return style.draw(figure, certificate.times, *curves, log=log)


def convergence_summary(study: ConvergenceStudy) -> RenderableType:
    """Where certificates hold, and the rates of each width at the smallest risk."""
    columns = ("M \\ ρ", *(f"{distance:g}" for distance in study.distances))
    maps = [
        table(
            columns,
            (
                (str(width), *(_held(study, width, d, source)[0] for d in study.distances))
                for width in study.widths
            ),
            f"Certificates that hold, {words}",
        )
        for source, words in SOURCES.items()
    ]
    smallest, rows = study.distances[0], []
    for width in study.widths:
        cell = study.cell(width, smallest)
        fitted = [t.fitted for t in cell if t.fitted is not None]
        means = (
            fmean(t.kernel for t in cell),
            fmean(t.kernel_m for t in cell),
            fmean(t.by_slope.m for t in cell),
        )
        rate = significant(fmean(fitted)) if fitted else "–"
        rows.append((str(width), *map(significant, means), rate))
    rates = table(RATES, rows, f"Rates at ρ = {smallest:g}, means of the seeds")
    return answered(convergence_answer(study), *maps, rates, note=_note(study))


def convergence_answer(study: ConvergenceStudy) -> str:
    """Counts the certificates that hold in the good corner, and in the bad one."""
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
    found = [("decay", decay_figure(study), _note(study))]
    found += [
        (f"map-{source}", map_figure(study, source, words), f"Certificates with {words}. {MAPS}")
        for source, words in SOURCES.items()
    ]
    corners = ((study.widths[-1], study.distances[0]), (study.widths[0], study.distances[-1]))
    for width, distance in corners:
        certificate = study.cell(width, distance)[0].by_slope
        told = f"M = {width}, ρ = {distance:g}. {certificate_answer(certificate)} "
        found += [
            (f"{name}-{width}", figure, told + caption)
            for name, figure, caption in certificate_figures(certificate)
        ]
    return found


def _note(study: ConvergenceStudy) -> str:
    return (
        f"N = {several(study.depth, 'layer')}, {several(study.samples, 'orthogonal sample')} in d "
        f"= {study.state}; ρ: distance of the targets from the first outputs, the risk starts at "
        f"ρ²/2; flow of {several(study.steps, 'step')} of {study.learning_rate:g}; "
        f"{several(len(study.seeds), 'seed')}; float64. A risk that falls as e^(−2rt) has the rate "
        "r."
    )


def decay_figure(study: ConvergenceStudy) -> go.Figure:
    """L(t)/L(0) of the first seed: a colour for each width; the smallest risk solid, the largest
    dashed.
    """
    title = ("Risk against time", "time of the flow", "risk over the first")
    figure = style.plain_figure(*title, at="t = %{x:.3g}")
    ends = {study.distances[0]: style.SOLID, study.distances[-1]: style.DASHED}
    for k, width in enumerate(study.widths):
        for distance, dash in ends.items():
            found = study.cell(width, distance)[0].by_slope
            values = style.positive([risk / found.risks[0] for risk in found.risks])
            name = f"M = {width}, ρ = {distance:g}"
            curve = style.Curve(name, values, style.class_look(k)[0], dash)
            style.draw(figure, found.times, curve, log=True)
    figure.update_traces(mode="lines")
    return figure.update_layout(height=480, margin={"t": 170})


def map_figure(study: ConvergenceStudy, source: Source, words: str) -> go.Figure:
    """The fraction of certificates that hold, over width and ρ, with the time when one broke."""
    figure = style.plain_figure(f"Certificates, {words}", "ρ", "width M")
    z = [[study.held(width, d, source) for d in study.distances] for width in study.widths]
    texts = [
        ["<br>".join(_held(study, width, d, source)) for d in study.distances]
        for width in study.widths
    ]
    x, y = [f"{distance:g}" for distance in study.distances], [*map(str, study.widths)]
    hover = "M = %{y}, ρ = %{x}: %{text}<extra></extra>"
    return style.heat_map(figure, x, y, z, texts, 1, hover).update_layout(height=420)


def _held(study: ConvergenceStudy, width: int, distance: float, source: Source) -> tuple[str, ...]:
    """`3/3`, or `0/3` and `t = 1.5`, when the first of the others was broken; or `no m`."""
    found = [t.certificate(source) for t in study.cell(width, distance)]
    there = [c for c in found if c is not None]
    if not there:
        return ("no m",)
    times = [c.times[c.broken_at] for c in there if c.broken_at is not None]
    held = f"{sum(c.holds for c in there)}/{len(found)}"
    return (held, f"t = {min(times):.2g}") if times else (held,)
