"""What linear.py and smooth.py share: the figures printed, and kept as .json and .svg."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

from deeplimit.records import to_plain
from deeplimit.report import rates_figure
from deeplimit.studies import LinearStudy, SmoothStudy
from drawing import write
from machine import machine

RESULTS = Path(__file__).parent / "results"


def line() -> Callable[[str, float], None]:
    """Says what is done, where it is something new."""
    said: list[str] = []

    def tell(message: str, done: float) -> None:
        if message not in said[-1:]:
            said.append(message)
            print(f"{done:4.0%} {message}", file=sys.stderr, flush=True)

    return tell


def keep_rates(study: LinearStudy | SmoothStudy, title: str, name: str) -> None:
    """Prints the slopes; writes results/NAME.json, with the machine, and results/NAME.svg."""
    for family in study.families:
        for rate in family.rates:
            slopes = " ".join(f"{slope:+.3f}" for slope in rate.slopes)
            asked = "" if rate.within is None else f"  as the theory says: {rate.within}"
            found = f"{rate.quantity}, {rate.moment}: {rate.slope:+.3f} ({slopes})"
            print(f"{family.name}: {found}{asked}")
    result = {"machine": machine()} | to_plain(study) | {"folder": None}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    drawn = rates_figure(title, study.depths, study.families)
    write(drawn.update_layout(width=1000), RESULTS / f"{name}.svg")
