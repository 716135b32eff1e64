"""`deeplimit merge`: several networks joined in one."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from deeplimit.cli.options import Json, Trust
from deeplimit.cli.output import emit


@dataclass(frozen=True)
class Merge:
    """Join trained networks of any widths and depths in one.

    A barycentre of layer-conditional optimal transport: in every layer matched particles are
    averaged, not neurons of the same number. Leaves a new run folder beside the first run, with the
    network and merge.json, the test accuracy of the networks and of what was made of them. For
    example:
      deeplimit merge runs/a runs/b
      deeplimit merge runs/a runs/b runs/c --width 64 --name abc
    """

    runs: Annotated[tuple[Path, ...], Positional, arg(metavar="RUN")]
    """Run folders on the same data, two or more; the first gives the width."""
    weights: Annotated[tuple[float, ...], arg(metavar="W")] = ()
    """Of the networks, of sum 1; by default equal."""
    width: Annotated[int | None, arg(metavar="M")] = None
    """At most so many neurons in a layer."""
    frame: Literal["equal", "interpolate"] | None = None
    """What becomes of stem, head, norms and output biases: equal: they must be; interpolate: their
    mean. By default equal, and with --align interpolate."""
    align: bool = False
    """Take all networks in the basis of the first one's residual stream, as in interpolate."""
    name: Annotated[str, arg(metavar="NAME")] = "merged"
    """The new run folder's name."""
    trust: Trust = False
    json: Json = False

    def __call__(self) -> None:
        """Merges, writes the run folder with its page, and prints the accuracies."""
        from deeplimit.cli.finish import renew_page
        from deeplimit.cli.study_output import progress
        from deeplimit.report.measures import merge_summary
        from deeplimit.studies import merge_runs
        from deeplimit.training import RunFolder, profile_run

        with progress(quiet=self.json, doing="merging") as tell:
            found = merge_runs(
                self.runs,
                weights=self.weights or None,
                width=self.width,
                frame=self.frame or ("interpolate" if self.align else "equal"),
                align=self.align,
                name=self.name,
                trust=self.trust,
                tell=tell,
            )
        with RunFolder.open(found.folder).commit() as new:
            profile_run(new)
            page = renew_page(new)
        emit(found, merge_summary(found), page, json=self.json)
