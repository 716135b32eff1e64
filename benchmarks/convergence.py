"""The study of convergence at its defaults, three seeds: python benchmarks/convergence.py.

The same as `deeplimit study convergence`, with the machine beside the figures; convergence.json
and .svg. Of every certificate the file has m, the budget and what became of it.
"""

from typing import Any

from deeplimit.meanfield import ConvergenceCertificate
from deeplimit.records import to_plain
from deeplimit.report.convergence import convergence_figures, convergence_summary
from deeplimit.studies import ConvergenceStudy, study_convergence
from study_kept import keep_study


def main() -> None:
    keep_study("convergence", study_convergence, convergence_figures, convergence_summary, kept)


def kept(study: ConvergenceStudy) -> dict[str, Any]:
    """The study without the records of its certificates."""
    plain: dict[str, Any] = to_plain(study)
    for row, training in zip(plain["trainings"], study.trainings, strict=True):
        row["initial"] = training.initial
        row["by_kernel"] = short(training.by_kernel)
        row["by_slope"] = short(training.by_slope)
    return plain


def short(certificate: ConvergenceCertificate | None) -> dict[str, Any] | None:
    """m, the budget, and by what and when it was broken."""
    if certificate is None:
        return None
    at = certificate.broken_at
    return {
        "m": certificate.m,
        "budget": certificate.budget,
        "holds": certificate.holds,
        "broken_at_time": None if at is None else certificate.times[at],
        "broken_by": list(certificate.broken_by),
    }


if __name__ == "__main__":
    main()
