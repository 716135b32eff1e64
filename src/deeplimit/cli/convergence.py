"""`deeplimit study convergence`: where training converges at a rate known before it starts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from deeplimit.cli.options import Json
from deeplimit.cli.output import emit

TITLE = "Where training converges at a rate known before it starts"


@dataclass(frozen=True)
class Convergence:
    """Where does training converge at a rate that is known before it starts?

    Trains networks by gradient flow on D samples, from widths below D, where the kernel of the
    features is singular, to far above, and from small initial risks to large ones, each with a
    certificate of convergence; fits the rate of the risk and draws where certificates hold. Leaves
    study.json and study.html in DIR/convergence; takes minutes. For example:
      deeplimit study convergence
      deeplimit study convergence --widths 4 128 --distances 0.1 10 --seeds 0
    """

    widths: tuple[int, ...] = (4, 8, 16, 32, 64, 128, 256)
    """Numbers of particles M, from the smallest to the largest."""
    distances: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0, 3.0)
    """How far the targets are from the first outputs, root mean square; the risk starts at half the
    square."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One training of every cell for each of these seeds."""
    depth: int = 8
    """Number of layers N."""
    samples: int = 8
    """Number of samples D, 2 to 16."""
    learning_rate: float = 0.1
    """Step of the flow's time."""
    time: float = 30.0
    """How long the flow is."""
    runs: Annotated[Path, arg(metavar="DIR")] = Path("runs")
    """Folder for the study's folder."""
    json: Json = False

    def __call__(self) -> None:
        """Runs the study, writes its figures and prints its maps."""
        from deeplimit.cli.study_output import FIGURE, progress
        from deeplimit.report.convergence import convergence_figures, convergence_summary
        from deeplimit.report.page import write_figures
        from deeplimit.studies import study_convergence

        with progress(quiet=self.json) as tell:
            study = study_convergence(
                widths=self.widths,
                distances=self.distances,
                seeds=self.seeds,
                depth=self.depth,
                samples=self.samples,
                learning_rate=self.learning_rate,
                time=self.time,
                runs=self.runs,
                tell=tell,
            )
        written = write_figures(Path(study.folder) / FIGURE, TITLE, convergence_figures(study))
        emit(study, convergence_summary(study), written, json=self.json)
