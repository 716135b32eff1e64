"""`deeplimit crop`: cut a trained network."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from deeplimit.cli.options import Json
from deeplimit.cli.output import emit


@dataclass(frozen=True)
class Crop:
    """Cut a trained network to fewer layers, and measure on test data what that changes.

    Writes the smaller network to RUN/cropped.safetensors, the figures to RUN/crop.json and into the
    page. For example:
      deeplimit crop runs/digits --to 5
      deeplimit crop runs/digits --to auto
      deeplimit crop runs/mnist --to auto --points 0.1
    """

    run: Annotated[Path, Positional, arg(metavar="RUN")]
    """The run folder that train wrote."""
    to: Annotated[
        int | Literal["auto"],
        arg(
            metavar="K|auto",
            help="How many layers to keep; auto: the fewest that are as good as the full network "
            "on validation data.",
        ),
    ] = "auto"
    points: Annotated[
        float,
        arg(
            metavar="P",
            help="With auto: how many points of accuracy (percent of the samples) may be lost on "
            "validation data, its standard error included.",
        ),
    ] = 0.5
    json: Json = False

    def __call__(self) -> None:
        """Cuts the run's network, renews its page and prints the cut."""
        from deeplimit.cli.finish import renew_page
        from deeplimit.report import crop_summary
        from deeplimit.training import RunFolder, crop_run

        folder = RunFolder.open(self.run)
        cut = crop_run(folder, self.to, accuracy=self.points / 100)
        emit(cut, crop_summary(cut, folder.reference()), renew_page(folder), json=self.json)
