"""The certificate of convergence in words, and its figures with captions; for a page."""

import plotly.graph_objects as go

from deeplimit.meanfield.convergence import ConvergenceCertificate
from deeplimit.report.figures.certificate import rate_figure, risk_figure, travelled_figure
from deeplimit.report.numbers import significant


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
