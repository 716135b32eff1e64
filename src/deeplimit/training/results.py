"""What a run leaves: numbers only; `deeplimit.report` renders them."""

from dataclasses import dataclass, field
from typing import Any

from deeplimit.control.crop_report import CropReport
from deeplimit.control.projection import TrajectoryPicture
from deeplimit.control.turnpike import TurnpikeProfile


@dataclass(frozen=True)
class Profiles:
    """Turnpike profiles of one network; the depth is chosen on validation, figures are test's."""

    train: TurnpikeProfile
    validation: TurnpikeProfile
    test: TurnpikeProfile


@dataclass(frozen=True)
class Cut:
    """A cut that was made.

    Attributes:
        removed: the layers that were taken out.
        tolerance: the accuracy that might be lost where the depth was chosen from the validation
            profile; None where the user gave the depth.
        report: before and after, on test data.
    """

    removed: tuple[int, ...]
    tolerance: float | None
    report: CropReport


@dataclass(frozen=True)
class Reference:
    """The same network trained without stage cost: what a cut costs where there is no turnpike."""

    test: TurnpikeProfile
    report: CropReport


@dataclass(frozen=True)
class RunResults:
    """All results in a run folder; what is not there yet is None or empty.

    Attributes:
        name: the run folder's name.
        recipe: the recipe's fields, as in recipe.toml.
        class_names: names of the classes.
        metrics: one row per epoch: epoch, loss, accuracy (training), validation_loss,
            validation_accuracy, entry (empty while no layer is in the tube), learning_rate,
            seconds, drift (the largest of all steps; empty under backprop).
    """

    name: str
    recipe: dict[str, Any]
    class_names: tuple[str, ...]
    metrics: tuple[dict[str, float | None], ...] = field(default=())
    profiles: Profiles | None = None
    picture: TrajectoryPicture | None = None
    cut: Cut | None = None
    reference: Reference | None = None
