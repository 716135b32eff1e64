"""`deeplimit heal`: train a cut network a little more."""

from dataclasses import dataclass, fields
from typing import Annotated, Literal

from tyro.conf import arg

from deeplimit.cli.options import Json
from deeplimit.cli.output import emit
from deeplimit.cli.source import Source
from deeplimit.errors import InputError


@dataclass(frozen=True)
class Heal(Source):
    """Train a cut network a little more, and measure on test data what that recovers.

    The layers cut are not gone at once: they fade out in the first part of the training; a cut that
    was bridged (crop --bridge) is trained as it is. The full
    network teaches the cut one: beside the labels it learns the full one's answers (soft targets).
    Everything else is the run's own recipe. Writes RUN/healed.safetensors (of a transformers model
    the folder RUN/healed), the figures to RUN/heal.json and into the page. For
    example:
      deeplimit crop runs/mnist --to 6
      deeplimit heal runs/mnist --epochs 1
      deeplimit heal runs/mnist --teacher none              plain fine-tuning
      deeplimit heal runs/vit --teacher beside              the full network learns beside
      deeplimit heal runs/mnist --resume                    go on with one that was stopped
      deeplimit heal transformers:my-vit --data cifar10     cut to the depth that is enough, heal
    """

    epochs: int = 1
    """Passes over the training data."""
    learning_rate: float | None = None
    """Largest learning rate of the one-cycle schedule; a tenth of the run's by default."""
    teacher: Literal["full", "beside", "none"] = "full"
    """full: the network before the cut teaches; beside: it does, and learns too, on the same
    batches: for a model trained on other data, at more than twice the time; none: labels alone."""
    teacher_weight: Annotated[float, arg(metavar="W")] = 0.5
    """Weight of the teacher's answers, from 0 to 1; the labels have the rest."""
    fade: float | None = None
    """Part of the training in which the layers to be cut lose their step size, 0.45 by default;
    0: cut at once, as a bridged cut always is."""
    temperature: float = 2.0
    """How much both networks' answers are softened before they are compared; 1: not at all."""
    resume: bool = False
    """Go on with a healing that was stopped, by its own settings; goes with json alone."""
    json: Json = False

    def __call__(self) -> None:
        """Heals the run's cut, renews its page and prints what it recovered."""
        from deeplimit.cli.finish import renew_page
        from deeplimit.report import healing_summary
        from deeplimit.training import RunFolder, crop_run, heal_run, resume_heal
        from deeplimit.training.healing import check_healing

        if self.resume:
            self._refuse_others()
            with RunFolder.open(self.run, trust=self.trust).commit() as new:
                healing = resume_heal(new, quiet=self.json)
                page = renew_page(new)
        else:
            # Before a model gets a run folder.
            check_healing(self.epochs, self.teacher_weight, self.temperature, self.fade or 0.0)
            folder = self.folder()
            if self.data is not None:  # a run made just now
                crop_run(folder)
            with folder.commit() as new:
                healing = heal_run(
                    new,
                    epochs=self.epochs,
                    learning_rate=self.learning_rate,
                    teacher=self.teacher,
                    teacher_weight=self.teacher_weight,
                    temperature=self.temperature,
                    fade=self.fade,
                    quiet=self.json,
                )
                page = renew_page(new)
        emit(healing, healing_summary(healing), page, json=self.json)

    def _refuse_others(self) -> None:
        for field in fields(self):
            if field.name in ("run", "resume", "trust", "json"):
                continue
            if getattr(self, field.name) != field.default:
                option = f"--{field.name.replace('_', '-')}"
                raise InputError(
                    f"{option} and --resume given; a healing goes on by its own settings: leave "
                    "one of them out"
                )
