"""What the studies of rates in depth share: their figure's page."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deeplimit.cli.output import progress as progress

if TYPE_CHECKING:
    from deeplimit.studies import Family

FIGURE = "study.html"
READ = (
    "Dotted before training, solid after it; markers are means over the seeds, bars reach from the "
    "smallest to the largest; the thin grey line falls as 1/N. "
)


def write_rates(
    folder: str, title: str, depths: Sequence[int], families: "Sequence[Family]", note: str
) -> str:
    """Writes study.html, which opens offline; what to say of it."""
    from deeplimit.report import rates_figure
    from deeplimit.report.page import write_figures

    figure = rates_figure("", depths, families)
    return write_figures(Path(folder) / FIGURE, title, [("rates", figure, f"{READ}{note}.")])
