"""`deeplimit study linear`: linear residuals and their Neural ODE, against depth."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from deeplimit.cli.options import Json
from deeplimit.cli.output import emit

TITLE = "Linear residuals: distance to the Neural ODE against depth"


@dataclass(frozen=True)
class Linear:
    """Do linear residual networks stay near a Neural ODE while they train?

    Trains x + θ_n x/N by gradient flow at every depth, from controls that are smooth in depth,
    drawn independently, and of alternating sign, and measures the gap to the Neural ODE through
    its controls and the largest ‖θ_{n+1} − θ_n‖, each against N. Both fall as 1/N from the smooth
    start only. Leaves study.json and study.html in DIR/linear; takes a minute. For example:
      deeplimit study linear
      deeplimit study linear --depths 8 16 32 64 --seeds 0
    """

    depths: tuple[int, ...] = (8, 16, 32, 64, 128, 256, 512)
    """Numbers of layers N, from the smallest to the largest."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One training from every start at every depth for each of these seeds."""
    learning_rate: float = 0.05
    """Step η of the gradient flow; a layer's own is η N."""
    steps: int = 400
    """Steps of the gradient flow."""
    runs: Annotated[Path, arg(metavar="DIR")] = Path("runs")
    """Folder for the study's folder."""
    json: Json = False

    def __call__(self) -> None:
        """Runs the study, writes its figure and prints its table."""
        from deeplimit.cli.rates_table import rates_table
        from deeplimit.cli.study_output import progress, write_rates
        from deeplimit.errors import several
        from deeplimit.studies import study_linear

        with progress(quiet=self.json) as tell:
            study = study_linear(
                depths=self.depths,
                seeds=self.seeds,
                learning_rate=self.learning_rate,
                steps=self.steps,
                runs=self.runs,
                tell=tell,
            )
        note = (
            f"N = {study.depths[0]} … {study.depths[-1]}; "
            f"d = {study.width}, η = {study.learning_rate:g}, {several(study.steps, 'step')}, "
            "looked at "
            f"{several(len(study.looked_at), 'time')}; {several(len(study.seeds), 'seed')}; float64"
        )
        written = write_rates(study.folder, TITLE, study.depths, study.families, note)
        emit(study, rates_table(study.families, note), written, json=self.json)
