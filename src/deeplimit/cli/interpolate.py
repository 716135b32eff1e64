"""`deeplimit interpolate`: loss and accuracy between two networks."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from deeplimit.cli.options import Json, Trust
from deeplimit.cli.output import emit


@dataclass(frozen=True)
class Interpolate:
    """What lies between two trained networks, of any widths and depths?

    Loss and accuracy on test data along the geodesic of layer-conditional optimal transport, where
    every point is a network, beside the plain average of parameters, where there is one; and the
    barrier of each: how far the loss rises above the line between its ends. Leaves a page and a
    .json file beside the first run, A-to-B.html. For example:
      deeplimit interpolate runs/a runs/b
      deeplimit interpolate runs/a runs/b --frame interpolate --align
      deeplimit interpolate runs/a runs/b --save 0.5 --name between
    """

    first: Annotated[Path, Positional, arg(metavar="RUN_A")]
    """The run folder of t = 0."""
    second: Annotated[Path, Positional, arg(metavar="RUN_B")]
    """The run folder of t = 1, on the same data."""
    points: Annotated[int, arg(metavar="K")] = 11
    """How many t, from 0 to 1."""
    frame: Literal["equal", "interpolate"] | None = None
    """What becomes of stem, head, norms and output biases: equal: they must be; interpolate: they
    move linearly. By default equal, and with --align interpolate."""
    align: bool = False
    """Take the second network in the basis of its residual stream nearest to the first one's, as
    found on training data; of a network of kind vector with a linear stem, or convolutional of one
    stage without norms."""
    save: Annotated[float | None, arg(metavar="T")] = None
    """Write the network at this t, and say how far it is from both ends: for unequal widths not as
    the geodesic's point, since a network's neurons have no weights."""
    name: Annotated[str | None, arg(metavar="NAME")] = None
    """Where to: a new run folder's name, beside the first run, or FILE.safetensors."""
    figure: Annotated[Path | None, arg(metavar="FILE")] = None
    """Where to write the page instead."""
    trust: Trust = False
    json: Json = False

    def __call__(self) -> None:
        """Interpolates, writes page and figures, and prints the answer."""
        from deeplimit.cli.figure_page import check_place, write_figures
        from deeplimit.cli.finish import renew_page
        from deeplimit.cli.study_output import progress
        from deeplimit.report.measures import interpolation_figures, interpolation_summary
        from deeplimit.studies import interpolate_runs
        from deeplimit.training import RunFolder, profile_run
        from deeplimit.training.new_folder import check_beside

        check_place(self.figure)
        if self.figure is None and self.first.is_dir():
            check_beside(self.first)
        frame = self.frame or ("interpolate" if self.align else "equal")
        with progress(quiet=self.json, doing="measuring") as tell:
            found = interpolate_runs(
                self.first,
                self.second,
                points=self.points,
                frame=frame,
                align=self.align,
                save=self.save,
                name=self.name,
                trust=self.trust,
                tell=tell,
            )
        here = self.first.resolve().parent
        aligned = "-aligned" if self.align else ""
        name = f"{self.first.resolve().name}-to-{self.second.resolve().name}{aligned}.html"
        place = here / name if self.figure is None else self.figure
        turned = ", turned into the first one's basis" if found.aligned else ""
        title = f"From {found.names[0]} to {found.names[1]}{turned}"
        written = [write_figures(place, title, interpolation_figures(found), found)]
        if found.saved is not None and Path(found.saved).is_dir():
            with RunFolder.open(found.saved).commit() as new:
                profile_run(new)
                written.append(renew_page(new))
        emit(found, interpolation_summary(found), *written, json=self.json)
