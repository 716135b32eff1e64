"""The study of convergence at its defaults, three seeds: python benchmarks/convergence.py.

The same as `deeplimit study convergence`, with the machine beside the figures; convergence.json
and .svg.
"""

from deeplimit.report.convergence import convergence_figures, convergence_summary
from deeplimit.studies import study_convergence
from study_kept import keep_study


def main() -> None:
    keep_study("convergence", study_convergence, convergence_figures, convergence_summary)


if __name__ == "__main__":
    main()
