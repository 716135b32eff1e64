"""Results that a run leaves: numbers only; `deeplimit.report` renders them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from deeplimit.control.bridge import Bridge
from deeplimit.control.cropping import CutChoice
from deeplimit.control.depth_table import DepthTable
from deeplimit.control.trajectories import TrajectoryPicture
from deeplimit.control.turnpike import TurnpikeProfile, loss_tolerance
from deeplimit.control.verdict import Verdict, samples_needed
from deeplimit.control.verifying import CropResult
from deeplimit.data import DataSet
from deeplimit.meanfield.convergence import ConvergenceCertificate
from deeplimit.ode import DepthLimit
from deeplimit.records import newer


@dataclass(frozen=True)
class Profiles:
    """Turnpike profiles of one network; the depth is chosen on validation, figures are test's.

    That of test data says what each depth costs too, and which one validation data recommend.

    Attributes:
        control_norms: as `control_norms` measures them; None where the controls cost nothing.
    """

    train: TurnpikeProfile
    validation: TurnpikeProfile
    test: DepthTable
    control_norms: tuple[float, ...] | None = None

    @property
    def vanished(self) -> tuple[int, ...]:
        """The layers whose controls are exactly 0."""
        return tuple(n for n, norm in enumerate(self.control_norms or ()) if norm == 0)


@dataclass(frozen=True)
class Parts:
    """Numbers of samples of the three parts of the data, and the tokens of each in a text."""

    train: int
    validation: int
    test: int
    tokens: int | None = None

    @classmethod
    def of(cls, data: DataSet) -> "Parts":
        """Those of a data set."""
        tokens = None if data.vocabulary is None else data.shape[0]
        return cls(len(data.train), len(data.validation), len(data.test), tokens)


@dataclass(frozen=True)
class Tried:
    """A depth that a search tried.

    Attributes:
        removed: the layers of the full network that are gone.
        report: the full network and the one healed on its way there, on validation data.
    """

    removed: tuple[int, ...]
    report: CropResult


@dataclass(frozen=True)
class Cut:
    """A cut that was made.

    Attributes:
        removed: the layers that were taken out.
        tolerance: the accuracy that might be lost where the depth was chosen from the validation
            profile; None where the user gave the depth or another budget.
        report: before and after, on test data.
        choice: how layers of any place were chosen; None where the first so many were kept, or what
            the profile of a network of one stage says.
        parts: of the data; None in a cut saved before they were.
        bridge: what was fitted in place of the layers; None where that was not asked for.
        search: the depths that were tried, where the cut is the last of them that was kept: its
            network was healed on the way down, and `report` is of that. Else none.
    """

    removed: tuple[int, ...]
    tolerance: float | None
    report: CropResult
    choice: CutChoice | None = None
    parts: Parts | None = None
    bridge: Bridge | None = None
    search: tuple[Tried, ...] = newer(())

    @property
    def loss_tolerance(self) -> float:
        """The part of its range by which the loss might rise where a depth was chosen."""
        return loss_tolerance(self.tolerance or 0.0)

    @property
    def needed(self) -> int | None:
        """Validation samples without which `tolerance` cannot be told, where they are too few."""
        if self.tolerance is None or self.parts is None:
            return None
        if self.choice is not None and self.choice.confidence is not None:
            return self.choice.needed
        return samples_needed(self.tolerance, self.parts.validation)


@dataclass(frozen=True)
class Plan:
    """The plan by which a run's cut is healed; kept while that goes on.

    Attributes:
        removed: the layers that had been taken out.
        teacher: whether the full network teaches it, or does so while it learns beside it.
        teacher_weight: w of `Distillation`, the weight of what the teacher says; 0 without one.
        temperature: τ of `Distillation`, at which both networks' answers are compared.
        epochs: passes over the training data.
        learning_rate: the largest of the one-cycle schedule.
        fade: the part of the training in which the layers fade out; 0: they are cut before it.
    """

    removed: tuple[int, ...]
    teacher: Literal["full", "beside", "none"]
    teacher_weight: float
    temperature: float
    epochs: int
    learning_rate: float
    fade: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Healing(Plan):
    """A cut network that was trained a little more, as its plan says.

    Attributes:
        from_full: the full network and the healed one, on test data.
        from_cropped: the network as it was cut and the healed one, on test data.
        parts: of the data; None in a healing saved before they were.
    """

    from_full: CropResult
    from_cropped: CropResult
    parts: Parts | None = None


@dataclass(frozen=True)
class Refinement:
    """A run's network, made deeper.

    Attributes:
        source: the run folder that it was refined from.
        factor: m; every stage has m times as many layers.
        report: the network before and after, on test data.
        epochs, learning_rate: of the training from there; 0 epochs: none.
        carried: whether the optimiser's state was carried along.
        trained: the network before, and what came of it by that training, on test data; None
            without one, or if it was stopped and went on by itself.
    """

    source: str
    factor: int
    report: CropResult
    epochs: int
    learning_rate: float
    carried: bool
    trained: CropResult | None = None


@dataclass(frozen=True)
class Score:
    """Mean loss in nats and accuracy, a fraction, of a network on held-out samples."""

    loss: float
    accuracy: float


@dataclass(frozen=True)
class MergedRuns:
    """Networks, what was made of them, and all of them on test data.

    Attributes:
        folder: the new run folder, with the merged network.
        runs: as they were given.
        names, weights: what they are called, and λ_k.
        frame: what became of stem, head and norms: "equal", or "interpolate".
        aligned: whether the others were taken in the first one's basis of the stream.
        samples, parts: of the test data, and of all data.
        parents, merged: the networks themselves, and what was made of them.
        averaged: the plain average of their parameters; None for networks of several shapes.
        distances: d from the barycentre to each of them.
        objectives: Σ_k λ_k d² at the start and after each iteration.
        depth, width: of the merged network; of the widest layer.
        narrowed: d from the barycentre to the network of fewer neurons; None if it is as wide.
        verdict: on the best of the networks and what was made of them, on test data.
        lower: proven bounds of the distances from below. It, parts and verdict are None in a result
            saved before they were there.
    """

    folder: str
    runs: tuple[str, ...]
    names: tuple[str, ...]
    weights: tuple[float, ...]
    frame: str
    aligned: bool
    samples: int
    parents: tuple[Score, ...]
    merged: Score
    averaged: Score | None
    distances: tuple[float, ...]
    objectives: tuple[float, ...]
    depth: int
    width: int
    narrowed: float | None
    verdict: Verdict | None = None
    parts: Parts | None = None
    lower: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Reference:
    """The control of a cut: networks trained by the same recipe without stage cost.

    Attributes:
        test: the network of full depth, on test data.
        report: it and its cut alike, on test data: what a cut costs where there is no turnpike.
        small: the network of the cut's depth, trained from scratch (before), and the run's own cut
            (after), on the same test samples. None where there is no such network (a stage of the
            cut has no layer), or in an older file.
        removed: the layers that the cut is without; None in an older file.
    """

    test: TurnpikeProfile
    report: CropResult
    small: CropResult | None = None
    removed: tuple[int, ...] | None = None

    def is_of(self, cut: Cut) -> bool:
        """Says whether it is the control of this cut, not of one that was made before."""
        if self.removed is not None:
            return self.removed == cut.removed
        return self.report.horizon_after == cut.report.horizon_after


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
    healing: Healing | None = None
    refinement: Refinement | None = None
    merging: MergedRuns | None = None
    depth_limit: DepthLimit | None = None
    certificate: ConvergenceCertificate | None = None


@dataclass(frozen=True)
class Finished:
    """A run that is trained, cut and shown: its folder, its page and what is in the folder."""

    run: Path
    page: Path
    results: RunResults
