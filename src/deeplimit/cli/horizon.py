"""`deeplimit study horizon`: the turnpike property, checked by training deeper and deeper."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from deeplimit.cli.options import Json
from deeplimit.cli.output import emit


@dataclass(frozen=True)
class Horizon:
    """Does the number of layers in use stay bounded as the network gets deeper?

    Trains at N, 2N and 4N layers, to convergence, with step size, stage cost and control cost per
    layer fixed, and counts the layers outside the tube around the minimisers. With a turnpike the
    count stays where it is. Leaves the runs and study.json in DIR/horizon-DATA. For example:
      deeplimit study horizon
      deeplimit study horizon --depth 10 --seeds 0 1 2 --stage-cost 0.1
    """

    data: Annotated[str, arg(metavar="DATA")] = "digits"
    """Name of the data set, as for train."""
    data_dir: Annotated[Path | None, arg(metavar="DIR")] = None
    """Folder that holds the data sets' folders; without it DEEPLIMIT_DATA says where."""
    depth: tuple[int, ...] = (10,)
    """The smallest of the three depths; several numbers are several stages."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One training at every depth for each of these seeds."""
    stage_cost: float = 0.1
    """Weight γ of the loss at every layer."""
    control_cost: float = 0.0
    """Weight r of the squared norm of every layer's control."""
    radius: float | None = None
    """Radius δ of the tube; by default a fifth of the distance of zero logits."""
    epochs: int | None = None
    """Passes over the training data; the default reaches convergence on digits."""
    runs: Annotated[Path, arg(metavar="DIR")] = Path("runs")
    """Folder for the study's folder."""
    json: Json = False

    def __call__(self) -> None:
        """Runs the study and prints its table."""
        from deeplimit.cli.horizon_table import horizon_table
        from deeplimit.studies import horizon_recipe, study_horizon

        recipe = horizon_recipe(self.data)
        recipe = replace(
            recipe,
            data_dir=self.data_dir,
            depth=self.depth,
            stage_cost=self.stage_cost,
            control_cost=self.control_cost,
            epochs=recipe.epochs if self.epochs is None else self.epochs,
        )
        study = study_horizon(recipe, seeds=self.seeds, radius=self.radius, runs=self.runs)
        emit(study, horizon_table(study), json=self.json)
