"""`deeplimit demo`: everything at once on data that need no download."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from deeplimit.cli.options import Json


@dataclass(frozen=True)
class Demo:
    """Show all of it on scikit-learn's digits, within a minute.

    Trains 20 layers with a stage cost, measures the turnpike, cuts to the depth that is enough. As
    the control it trains the same network without stage cost and cuts it alike, and one of the
    cut's depth from scratch. Leaves a run folder with a page. For example:
      deeplimit demo
    """

    seed: int = 0
    """Seed of the initial parameters and of the order of the samples."""
    runs: Annotated[Path, arg(metavar="DIR")] = Path("runs")
    """Folder for the run folder."""
    json: Json = False

    def __call__(self) -> None:
        """Runs the demo, writes its page and prints the answer."""
        from deeplimit.cli.finish import show
        from deeplimit.studies import demo_recipe, run_demo

        show(run_demo(demo_recipe(self.seed), runs=self.runs), json=self.json)
