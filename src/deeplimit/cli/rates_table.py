"""The studies of rates in depth for the terminal."""

from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from deeplimit.studies.rates import Family, Quantity

QUANTITIES: dict[Quantity, str] = {"gap": "gap", "difference": "max ‖Δθ‖"}
MARKS = {True: " ✓", False: " ✗", None: "  "}
LEGEND = (
    "Slopes of log value against log N, means of the seeds', before and after training and of the "
    "largest values over training; gap: max ‖xₙ − x(sₙ)‖ to the Neural ODE, Δθ: θₙ₊₁ − θₙ. "
    "✓ where the slope of every seed is as the theory says, ✗ where not. "
)


def rates_table(families: Sequence[Family], note: str) -> RenderableType:
    """Every slope, those of the seeds after training, and whether they are as the theory says."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("start", "of"):
        table.add_column(name)
    for name in ("before", "after", "worst", "seeds, after", "theory, after"):
        table.add_column(name, justify="right")
    for family in families:
        for quantity, words in QUANTITIES.items():
            before, after, worst = (r for r in family.rates if r.quantity == quantity)
            table.add_row(
                family.name.replace(", ", ",\n") if quantity == "gap" else "",
                words,
                *(_slope(rate.slope) + MARKS[rate.within] for rate in (before, after, worst)),
                f"{_slope(min(after.slopes))} … {_slope(max(after.slopes))}",
                _range(after.low, after.high),
            )
    judged = [rate.within for family in families for rate in family.rates]
    said = [within for within in judged if within is not None]
    answer = f"{sum(said)} of {len(said)} slopes are where the theory says."
    return Group(Text(answer, style="bold"), table, Text(LEGEND + note, style="dim"))


def _range(low: float | None, high: float | None) -> str:
    if low is not None and high is not None:
        return f"{(low + high) / 2:.3g} ± {(high - low) / 2:.2g}".replace("-", "−")
    if low is not None:
        return f"≥ {_slope(low)}"
    return "" if high is None else f"≤ {_slope(high)}"


def _slope(slope: float) -> str:
    text = f"{slope:.2f}"
    return ("0.00" if text == "-0.00" else text).replace("-", "−")
