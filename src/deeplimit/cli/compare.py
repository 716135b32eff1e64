"""`deeplimit compare`: how far networks are from one another."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from deeplimit.cli.options import Json, Trust
from deeplimit.cli.output import emit


@dataclass(frozen=True)
class Compare:
    """How far are networks from one another, whatever their widths and depths?

    The layer-conditional optimal transport distance: in every layer particles are matched as
    cheaply as possible, so that the order of neurons does not count. Of two networks it says where
    in depth they differ and what the matching does; of more it prints the distance of every two.
    For example:
      deeplimit compare runs/digits runs/digits-2
      deeplimit compare runs/a runs/b runs/c --figure distances.html
    """

    runs: Annotated[tuple[str, ...], Positional, arg(metavar="RUN|MODEL")]
    """Run folders that train wrote, two or more; or models as in deeplimit gradient."""
    sinkhorn: Annotated[float | None, arg(metavar="EPS")] = None
    """For layers of thousands of neurons: couplings regularised by EPS, 0.01 say, times the mean
    cost; distances are then given with a bound from below."""
    seed: int = 0
    """Of random parameters."""
    figure: Annotated[Path | None, arg(metavar="FILE")] = None
    """Write the distance of every layer to this HTML file, which opens offline, and all figures
    to the .json file beside it."""
    trust: Trust = False
    json: Json = False

    def __call__(self) -> None:
        """Compares, writes what is asked for, and prints the table."""
        from deeplimit.cli.figure_page import check_place, write_figures
        from deeplimit.cli.study_output import progress
        from deeplimit.report.measures import comparison_figures, comparison_summary
        from deeplimit.studies import compare_runs

        check_place(self.figure)
        with progress(quiet=self.json, doing="comparing") as tell:
            found = compare_runs(
                self.runs, sinkhorn=self.sinkhorn, seed=self.seed, trust=self.trust, tell=tell
            )
        written = []
        if self.figure is not None:
            names = ", ".join(network.name for network in found.networks)
            title = f"{names}: distance, layer by layer"
            written.append(write_figures(self.figure, title, comparison_figures(found), found))
        emit(found, comparison_summary(found), *written, json=self.json)
