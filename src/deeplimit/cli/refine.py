"""`deeplimit refine`: make a trained network deeper."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from deeplimit.cli.options import Json, Trust
from deeplimit.cli.output import emit
from deeplimit.errors import RunError


@dataclass(frozen=True)
class Refine:
    """Make a trained network deeper without starting again, and train on from there.

    Every stage gets so many times as many layers. Their controls are interpolated in depth and the
    step is divided, so that a network that is smooth in depth (deeplimit ode tells) computes nearly
    the same. Leaves a new run folder, RUN-x2, with the deeper network, its recipe, and the test
    accuracy before and after in refine.json. For example:
      deeplimit refine runs/mnist                       24 layers → 48
      deeplimit refine runs/mnist --factor 3 --epochs 5
      deeplimit train --resume runs/mnist-x2            go on with one that was stopped
    """

    run: Annotated[Path, Positional, arg(metavar="RUN")]
    """The run folder that train wrote, of a network of deeplimit's own or of transformers."""
    factor: Annotated[int, arg(metavar="M")] = 2
    """How many times as many layers."""
    epochs: int = 0
    """Passes over the training data from there, with the state of the optimiser carried along and
    a one-cycle schedule of their own; 0: none."""
    learning_rate: float | None = None
    """Largest learning rate of the schedule; the run's by default."""
    name: Annotated[str | None, arg(metavar="NAME")] = None
    """The new run folder's name, beside the run's; by default the run's with -x and the factor."""
    trust: Trust = False
    json: Json = False

    def __call__(self) -> None:
        """Refines the run's network, trains on, writes the page and prints the figures."""
        from deeplimit.cli.finish import renew_page
        from deeplimit.report import refinement_summary
        from deeplimit.training import RunFolder, profile_run, refine_run

        made = refine_run(
            RunFolder.open(self.run, trust=self.trust),
            self.factor,
            epochs=self.epochs,
            learning_rate=self.learning_rate,
            name=self.name,
            quiet=self.json,
        )
        with made.commit() as new:
            profile_run(new)
            page = renew_page(new)
        refinement = made.refinement()
        if refinement is None:
            raise RunError(f"{made.path}: its refine.json is gone; refine again: {self.run}")
        emit(refinement, refinement_summary(refinement), page, json=self.json)
