"""Linear residuals and their Neural ODE against depth, three seeds: python benchmarks/linear.py.

The same as `deeplimit study linear`, with the machine beside the figures; linear.json and .svg.
"""

from pathlib import Path

import torch

from deeplimit.cli.linear import TITLE
from deeplimit.studies import study_linear
from rates import keep_rates, line


def main() -> None:
    torch.set_num_threads(1)
    study = study_linear(runs=Path("runs/benchmarks"), tell=line())
    keep_rates(study, TITLE, "linear")


if __name__ == "__main__":
    main()
