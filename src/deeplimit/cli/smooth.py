"""`deeplimit study smooth`: two-layer residuals and their Neural ODE, against depth."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from deeplimit.cli.options import Json
from deeplimit.cli.output import emit

TITLE = "Two-layer residuals: distance to the Neural ODE against depth"


@dataclass(frozen=True)
class Smooth:
    """Do trained two-layer residual networks stay near a Neural ODE if they start smooth in depth?

    Trains x + V σ(W x + b)/N on a small regression at every depth for one flow time, from controls
    that are a Gaussian process in depth and from independent ones, and measures the gap to the
    Neural ODE through its controls and the largest ‖θ_{n+1} − θ_n‖, each against N. Leaves
    study.json and study.html in DIR/smooth; takes minutes. For example:
      deeplimit study smooth
      deeplimit study smooth --activations tanh --depths 8 16 32 --seeds 0
    """

    activations: tuple[str, ...] = ("tanh", "gelu", "relu")
    """Activation functions σ: relu, gelu, tanh or silu."""
    depths: tuple[int, ...] = (16, 32, 64, 128)
    """Numbers of layers N, from the smallest to the largest, which all others divide."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One training from every start at every depth for each of these seeds."""
    length_scale: float = 0.5
    """Length scale ℓ of the smooth start, as a fraction of the whole depth."""
    learning_rate: float = 0.1
    """Step η of the gradient flow; a layer's own is η N."""
    steps: int = 200
    """Steps of gradient descent."""
    runs: Annotated[Path, arg(metavar="DIR")] = Path("runs")
    """Folder for the study's folder."""
    json: Json = False

    def __call__(self) -> None:
        """Runs the study, writes its figure and prints its table."""
        from deeplimit.cli.rates_table import rates_table
        from deeplimit.cli.study_output import progress, write_rates
        from deeplimit.errors import several
        from deeplimit.studies import study_smooth

        with progress(quiet=self.json) as tell:
            study = study_smooth(
                activations=self.activations,
                depths=self.depths,
                seeds=self.seeds,
                length_scale=self.length_scale,
                learning_rate=self.learning_rate,
                steps=self.steps,
                runs=self.runs,
                tell=tell,
            )
        note = (
            f"N = {study.depths[0]} … {study.depths[-1]}; "
            f"d = {study.width}, {several(study.hidden, 'unit')}, "
            f"{several(study.samples, 'sample')}; start's length "
            f"scale {study.length_scale:g}; η = {study.learning_rate:g}, "
            f"{several(study.steps, 'step')}, "
            f"looked at {several(len(study.looked_at), 'time')}; "
            f"{several(len(study.seeds), 'seed')}; float64"
        )
        written = write_rates(study.folder, TITLE, study.depths, study.families, note)
        emit(study, rates_table(study.families, note), written, json=self.json)
