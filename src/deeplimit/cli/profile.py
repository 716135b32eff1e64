"""`deeplimit profile`: the turnpike of a trained network."""

from dataclasses import dataclass

from deeplimit.cli.options import Json
from deeplimit.cli.output import emit
from deeplimit.cli.source import Source


@dataclass(frozen=True)
class Profile(Source):
    """Measure the turnpike of a trained network, layer by layer, and show it.

    Loss, accuracy, distance to the minimisers and relative update of every layer, on training,
    validation and test data; written to RUN/profile.json and into the page. For example:
      deeplimit profile runs/digits
      deeplimit profile transformers:my-vit --data cifar10      a model trained elsewhere
      deeplimit profile transformers:my-llama --data text:book.txt        a language model
      deeplimit profile transformers:my-bert --data table:reviews.csv     a classifier of texts
      deeplimit profile resnet20.safetensors --data cifar10 --data-dir DIR

    A model that was trained elsewhere gets a run folder, runs/NAME, that crop and heal go on with.
    """

    json: Json = False

    def __call__(self) -> None:
        """Profiles the run, renews its page and prints the profile on validation data."""
        from deeplimit.cli.finish import renew_page
        from deeplimit.report import profile_table
        from deeplimit.training import profile_run

        with self.opened() as folder, folder.commit() as new:
            profiles = profile_run(new)
            page = renew_page(new)
        emit(profiles, profile_table(profiles.validation), page, json=self.json)
