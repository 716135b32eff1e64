"""`deeplimit study consistency`: training that does not depend on width and depth."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from deeplimit.cli.options import Json
from deeplimit.cli.output import emit

TITLE = "Does training stop depending on width and depth?"


@dataclass(frozen=True)
class Consistency:
    """Does training stop depending on width and depth as both grow?

    Trains networks of (N, M) layers and particles by gradient flow, steps scaled by N·M, for one
    time, and compares successive sizes: their distance from a start of few atoms, smooth in depth,
    and their outputs from independent samples; and how far training moves a network, with the
    scaling and without. Leaves study.json and study.html in DIR/consistency; takes minutes. For
    example:
      deeplimit study consistency
      deeplimit study consistency --depths 8 16 32 --widths 64 128 256 --seeds 0
    """

    depths: tuple[int, ...] = (8, 16, 32, 64)
    """Numbers of layers N, from the smallest to the largest."""
    widths: tuple[int, ...] = (64, 128, 256, 512)
    """Numbers of particles M of each layer, one for each depth."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One regression and one initial measure for each of these seeds."""
    draws: int = 16
    """Independent samples of every size, over which outputs are compared."""
    atoms: int = 16
    """Atoms of the initial measure; every width is a multiple."""
    learning_rate: float = 0.1
    """Step of the flow's time."""
    time: float = 2.0
    """How long the flow is."""
    runs: Annotated[Path, arg(metavar="DIR")] = Path("runs")
    """Folder for the study's folder."""
    json: Json = False

    def __call__(self) -> None:
        """Runs the study, writes its figure and prints its table."""
        from deeplimit.cli.study_output import FIGURE, progress
        from deeplimit.report.consistency import consistency_figures, consistency_summary
        from deeplimit.report.page import write_figures
        from deeplimit.studies import study_consistency

        with progress(quiet=self.json) as tell:
            study = study_consistency(
                depths=self.depths,
                widths=self.widths,
                seeds=self.seeds,
                draws=self.draws,
                atoms=self.atoms,
                learning_rate=self.learning_rate,
                time=self.time,
                runs=self.runs,
                tell=tell,
            )
        written = write_figures(Path(study.folder) / FIGURE, TITLE, consistency_figures(study))
        emit(study, consistency_summary(study), written, json=self.json)
