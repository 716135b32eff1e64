"""The certificate of convergence: verdict, and what a training did against what was guaranteed."""

from collections.abc import Sequence

import plotly.graph_objects as go

from deeplimit.meanfield.convergence import ConvergenceCertificate
from deeplimit.report.numbers import significant
from deeplimit.report.style import DASHED, NETWORK, REFERENCE, TUBE, line, logarithmic, plain_figure


def certificate_figures(
    certificate: ConvergenceCertificate,
) -> list[tuple[str, go.Figure, str]]:
    """(name, figure, caption): risk, distance, rate."""
    return [
        ("certificate-risk", risk_figure(certificate), _risk_caption(certificate)),
        ("certificate-distance", travelled_figure(certificate), _distance_caption(certificate)),
        ("certificate-rate", rate_figure(certificate), _rate_caption(certificate)),
    ]


def certificate_answer(certificate: ConvergenceCertificate) -> str:
    """The verdict as a sentence."""
    return f"The certificate {'' if certificate.holds else 'is '}{certificate.verdict}."


def _risk_caption(certificate: ConvergenceCertificate) -> str:
    m, first = significant(certificate.m), significant(certificate.risks[0])
    above = sum(
        risk > curve * (1 + 1e-9)
        for risk, curve in zip(certificate.risks, certificate.guaranteed, strict=True)
    )
    where = (
        f"above it in {above} of {len(certificate.risks)} records" if above else "never above it"
    )
    return (
        f"The risk above its infimum starts at {first} and ends at "
        f"{significant(certificate.risks[-1])}; the guaranteed curve falls as e^(−2mt), m = {m}, "
        f"and the risk is {where}."
    )


def _distance_caption(certificate: ConvergenceCertificate) -> str:
    return (
        f"The layer-conditional distance from the start reaches "
        f"{significant(max(certificate.distances))}; the guarantee needs it to stay within R = "
        f"√(2L/m) = {significant(certificate.budget)}. The way itself is "
        f"{significant(certificate.path_lengths[-1])} long."
    )


def _rate_caption(certificate: ConvergenceCertificate) -> str:
    rates = [rate for rate in certificate.rates if rate is not None]
    lowest = f" Its least value is {significant(min(rates))}." if rates else ""
    return (
        f"m̂ is half the squared slope over the risk; the guarantee needs it to stay above m = "
        f"{significant(certificate.m)}, which was fixed before the first step.{lowest}"
    )


def risk_figure(certificate: ConvergenceCertificate) -> go.Figure:
    """The risk above its infimum, and the guaranteed curve e^{−2mt} L(μ_0)."""
    figure = _over_time("Risk against the guarantee", "risk, logarithmic", certificate)
    guaranteed, risks = _positive(certificate.guaranteed), _positive(certificate.risks)
    times = certificate.times
    figure.add_trace(line(times, guaranteed, "guaranteed", REFERENCE, DASHED, "%{y:.3g}"))
    figure.add_trace(line(times, risks, "risk", NETWORK, "solid", "%{y:.3g}"))
    logarithmic(figure, [*guaranteed, *risks])
    return figure


def travelled_figure(certificate: ConvergenceCertificate) -> go.Figure:
    """The distance travelled, the path's length, and the budget R."""
    figure = _over_time("Distance against the budget", "distance", certificate)
    figure.update_yaxes(rangemode="tozero")
    times, budget = certificate.times, [certificate.budget] * len(certificate.times)
    figure.add_trace(line(times, budget, "budget R", REFERENCE, DASHED, "%{y:.3g}"))
    figure.add_trace(
        line(times, certificate.path_lengths, "length of the way", NETWORK, "dot", "%{y:.3g}")
    )
    figure.add_trace(line(times, certificate.distances, "distance", NETWORK, "solid", "%{y:.3g}"))
    return figure


def rate_figure(certificate: ConvergenceCertificate) -> go.Figure:
    """m̂ and the m that was fixed at the start."""
    figure = _over_time("Rate against the one fixed", "rate, logarithmic", certificate)
    times, m = certificate.times, [certificate.m] * len(certificate.times)
    rates = [rate or None for rate in certificate.rates]
    figure.add_trace(line(times, m, "m, fixed at the start", REFERENCE, DASHED, "%{y:.3g}"))
    figure.add_trace(line(times, rates, "m̂", NETWORK, "solid", "%{y:.3g}"))
    logarithmic(figure, [*m, *rates])
    return figure


def _over_time(title: str, y_title: str, certificate: ConvergenceCertificate) -> go.Figure:
    """An empty figure over the flow's time, with a line where the certificate broke."""
    figure = plain_figure(title, "time of the flow", y_title)
    figure.update_xaxes(unifiedhovertitle={"text": "t = %{x:.3g}"})
    if certificate.broken_at is not None:
        figure.add_vline(
            x=certificate.times[certificate.broken_at],
            line={"color": TUBE, "width": 1.5},
            annotation={"text": "broken", "font": {"color": TUBE, "size": 12}},
        )
    return figure


def _positive(values: Sequence[float]) -> list[float | None]:
    """What a logarithmic axis can show."""
    return [value if value > 0 else None for value in values]
