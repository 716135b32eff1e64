"""`deeplimit profile`: the turnpike of a trained network."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from deeplimit.cli.options import Json
from deeplimit.cli.output import emit


@dataclass(frozen=True)
class Profile:
    """Measure the turnpike of a trained network, layer by layer, and show it.

    Loss, accuracy, distance to the minimisers and relative update of every layer, on training,
    validation and test data; written to RUN/profile.json and into the page. For example:
      deeplimit profile runs/digits
    """

    run: Annotated[Path, Positional, arg(metavar="RUN")]
    """The run folder that train wrote."""
    json: Json = False

    def __call__(self) -> None:
        """Profiles the run, renews its page and prints the profile on validation data."""
        from deeplimit.cli.finish import renew_page
        from deeplimit.report import profile_table
        from deeplimit.training import RunFolder, profile_run

        folder = RunFolder.open(self.run)
        profiles = profile_run(folder)
        emit(profiles, profile_table(profiles.validation), renew_page(folder), json=self.json)
