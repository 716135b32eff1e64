"""The study of consistency at its defaults, three seeds: python benchmarks/consistency.py.

The same as `deeplimit study consistency`, with the machine beside the figures; consistency.json
and .svg.
"""

from deeplimit.report.consistency import consistency_figures, consistency_summary
from deeplimit.studies import study_consistency
from study_kept import keep_study


def main() -> None:
    keep_study("consistency", study_consistency, consistency_figures, consistency_summary)


if __name__ == "__main__":
    main()
