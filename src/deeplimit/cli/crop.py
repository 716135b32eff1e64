"""`deeplimit crop`: cut a trained network."""

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import arg

from deeplimit.cli.options import Json
from deeplimit.cli.output import emit
from deeplimit.cli.source import Source
from deeplimit.errors import InputError


@dataclass(frozen=True)
class Crop(Source):
    """Cut a trained network to fewer layers, and measure on test data what that changes.

    Writes the smaller network to RUN/cropped.safetensors, the figures to RUN/crop.json and into the
    page. For example:
      deeplimit crop runs/digits --to 5
      deeplimit crop runs/digits --to auto
      deeplimit crop runs/mnist --to auto --points 0.1
      deeplimit crop runs/cifar10 --multiply-adds 0.5
      deeplimit crop runs/cifar10 --blocks 20 --bridge
      deeplimit crop transformers:my-vit --data cifar10         a model trained elsewhere
      deeplimit crop transformers:my-llama --data text:FILE     a language model, by its loss

    Of a transformers model the smaller one is the folder RUN/cropped, which plain transformers
    loads. A model that was trained elsewhere gets a run folder, runs/NAME, without any training.
    """

    to: Annotated[
        int | Literal["auto"],
        arg(
            metavar="K|auto",
            help="How many layers to keep, the first so many; auto: the fewest that are as good as "
            "the full network on validation data, of a network with several stages from any place.",
        ),
    ] = "auto"
    points: Annotated[
        float | None,
        arg(
            metavar="P",
            help="With auto: how many points of accuracy (percent of the samples) may be lost; the "
            "recipe's if not given, 0.5. On validation data 1.645 standard errors are added, and "
            "the loss may rise by 1 % of its range, or as large a part as the points, if more. "
            "Test data then say whether it was kept.",
        ),
    ] = None
    rise: Annotated[
        float | None,
        arg(
            metavar="NATS",
            help="Of a language model, with auto: by how many nats a token its loss may rise, in "
            "place of points; the recipe's if not given, 0.05: a perplexity 5 % higher.",
        ),
    ] = None
    blocks: Annotated[
        int | None,
        arg(metavar="K", help="Keep K layers from any place, chosen on validation data."),
    ] = None
    multiply_adds: Annotated[
        float | None,
        arg(
            metavar="F",
            help="Remove layers from any place until at most this fraction of the multiply-adds is "
            "left, chosen on validation data.",
        ),
    ] = None
    latency: Annotated[
        float | None,
        arg(metavar="F", help="The same for the latency, measured on this machine."),
    ] = None
    bridge: bool = False
    """Fit what the removed layers did on training data, by least squares, and fold it into the
    weights before them; heal then starts from there."""
    json: Json = False

    def __call__(self) -> None:
        """Cuts the run's network, renews its page and prints the cut."""
        from deeplimit.cli.finish import renew_page
        from deeplimit.report import crop_summary
        from deeplimit.training import crop_run

        budgets = {
            "blocks": self.blocks,
            "multiply_adds": self.multiply_adds,
            "latency": self.latency,
        }
        given = [
            f"--{name.replace('_', '-')}" for name, value in budgets.items() if value is not None
        ]
        given += ["--to"] * (self.to != "auto") + ["--points"] * (self.points is not None)
        given += ["--rise"] * (self.rise is not None)
        if len(given) > 1:
            raise InputError(
                f"{' and '.join(given)} given; a cut follows from one of them: give one"
            )
        accuracy = {} if self.points is None else {"accuracy": self.points / 100}
        with self.opened() as folder, folder.commit() as new:
            cut = crop_run(new, self.to, rise=self.rise, bridge=self.bridge, **accuracy, **budgets)  # type: ignore[arg-type]
            shown, page = crop_summary(cut, new.reference(), new.profiles()), renew_page(new)
        emit(cut, shown, page, json=self.json)
