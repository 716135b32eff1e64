"""`deeplimit report`: the page of a run, again."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from deeplimit.cli.options import Json


@dataclass(frozen=True)
class Report:
    """Write the page of a run again from the results in its folder; nothing is computed.

    One self-contained file, RUN/report.html, that opens offline. For example:
      deeplimit report runs/digits
    """

    run: Annotated[Path, Positional, arg(metavar="RUN")]
    """The run folder that train wrote."""
    json: Json = False

    def __call__(self) -> None:
        """Writes the page and prints the answer and where the page is."""
        from deeplimit.cli.finish import show
        from deeplimit.training import RunFolder

        show(RunFolder.open(self.run), json=self.json)
