"""The certificate of convergence: verdict, and what a training did against what was guaranteed."""

import plotly.graph_objects as go

from deeplimit.meanfield.convergence import ConvergenceCertificate
from deeplimit.report.numbers import significant
from deeplimit.report.style import (
    DASHED,
    NETWORK,
    REFERENCE,
    SOLID,
    TUBE,
    Curve,
    draw,
    plain_figure,
)


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
    guaranteed = ("guaranteed", certificate.guaranteed, REFERENCE, DASHED)
    risk = ("risk", certificate.risks, NETWORK, SOLID)
    title = ("Risk against the guarantee", "risk, logarithmic")
    return _over_time(*title, certificate, guaranteed, risk, log=True)


def travelled_figure(certificate: ConvergenceCertificate) -> go.Figure:
    """The distance travelled, the path's length, and the budget R."""
    budget = [certificate.budget] * len(certificate.times)
    return _over_time(
        "Distance against the budget",
        "distance",
        certificate,
        ("budget R", budget, REFERENCE, DASHED),
        ("length of the way", certificate.path_lengths, NETWORK, "dot"),
        ("distance", certificate.distances, NETWORK, SOLID),
    )


def rate_figure(certificate: ConvergenceCertificate) -> go.Figure:
    """m̂ and the m that was fixed at the start."""
    fixed = ("m, fixed at the start", [certificate.m] * len(certificate.times), REFERENCE, DASHED)
    rate = ("m̂", certificate.rates, NETWORK, SOLID)
    title = ("Rate against the one fixed", "rate, logarithmic")
    return _over_time(*title, certificate, fixed, rate, log=True)


def _over_time(
    title: str,
    y_title: str,
    certificate: ConvergenceCertificate,
    *curves: Curve,
    log: bool = False,
) -> go.Figure:
    """Curves over the flow's time, with a line where the certificate broke."""
    figure = plain_figure(title, "time of the flow", y_title, at="t = %{x:.3g}", zero=not log)
    if certificate.broken_at is not None:
        figure.add_vline(
            x=certificate.times[certificate.broken_at],
            line={"color": TUBE, "width": 1.5},
            annotation={"text": "broken", "font": {"color": TUBE, "size": 12}},
        )
    return draw(figure, certificate.times, *curves, log=log)
