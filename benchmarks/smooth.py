"""Two-layer residuals and their Neural ODE against depth, three seeds: python benchmarks/smooth.py.

The same as `deeplimit study smooth`, with the machine beside the figures; smooth.json and .svg.
"""

from pathlib import Path

import torch

from deeplimit.cli.smooth import TITLE
from deeplimit.studies import study_smooth
from rates import keep_rates, line


def main() -> None:
    torch.set_num_threads(1)
    study = study_smooth(runs=Path("runs/benchmarks"), tell=line())
    keep_rates(study, TITLE, "smooth")


if __name__ == "__main__":
    main()
