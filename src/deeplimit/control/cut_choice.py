"""What a choice of layers to cut removes, and what cuts spend of its budget."""

import math
from bisect import bisect_left
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal, cast

from deeplimit._anatomy import Anatomy
from deeplimit.control.trials import Trials
from deeplimit.control.verdict import CONFIDENCE, FEW, excludes, most_risen, samples_needed
from deeplimit.errors import several
from deeplimit.records import Record

Budget = Literal["accuracy", "rise", "blocks", "multiply_adds", "latency"]
QUALITY: tuple[Budget, ...] = ("accuracy", "rise")  # of which most layers go; of others fewest
Score = Literal["influence", "update", "tail", "turnpike", "trial"]


@dataclass(frozen=True)
class CutChoice(Record):
    """The layers to be removed under a budget; `crop(model, choice)` removes them.

        >>> profile = turnpike_profile(model, loader, SoftCrossEntropy(4))
        >>> choice = choose_cut(model, profile, blocks=2)
        >>> choice.limit, sum(choice.layers_after)
        (2.0, 2)

    Figures that take data are None where none were given, and the latencies where latency was not
    the budget. Those of accuracy are of the data that the choice was made on: they flatter it, so
    report a cut on other data (`verify_crop`).

    Attributes:
        removed: the layers that go whole, in order of the network.
        score: what put them into that order: "influence" (block influence of the profile),
            "update" (relative update, where an older profile has no influence), "tail" (the last
            first), "turnpike" (from the exit of the tube back), "trial" (each removed by trial).
        budget: what was limited.
        limit: the accuracy that might be lost, by how much the loss might rise, the number of
            layers kept, or the fraction of the multiply-adds or of the latency kept.
        layers_before, layers_after: layers of each stage of the anatomy, counted by the state that
            enters them.
        samples: number of samples that the accuracies are of: those that put no layer in order.
        accuracy_before, accuracy_after: fractions in [0, 1]; None where the loss knows no classes.
        accuracy_error: standard error of accuracy_after − accuracy_before, paired by sample.
        multiply_adds_before, multiply_adds_after: for one sample.
        latency_before, latency_after: median seconds of a forward pass of the first batch, the two
            networks timed in turns.
        loss_before, loss_after: mean losses on these samples, where the loss was limited or knows
            no classes.
        loss_error: standard error of loss_after − loss_before, paired by sample.
        branches: where branches were chosen, the pairs (layer, branch) that go; `layers_before` and
            `layers_after`, and a limit in blocks, count branches then.
        confidence: with which the limit is kept on later samples, where that was asked for.
    """

    removed: tuple[int, ...]
    score: Score
    budget: Budget
    limit: float
    layers_before: tuple[int, ...]
    layers_after: tuple[int, ...]
    samples: int | None = None
    accuracy_before: float | None = None
    accuracy_after: float | None = None
    accuracy_error: float | None = None
    multiply_adds_before: int | None = None
    multiply_adds_after: int | None = None
    latency_before: float | None = None
    latency_after: float | None = None
    loss_before: float | None = None
    loss_after: float | None = None
    loss_error: float | None = None
    branches: tuple[tuple[int, str], ...] | None = None
    confidence: float | None = None

    @property
    def needed(self) -> int | None:
        """Samples without which the accuracy that may be lost cannot be told.

        None where there are so many, and for another budget.
        """
        if self.budget != "accuracy":
            return None
        return samples_needed(self.limit, self.samples or 0, self.confidence)

    def __str__(self) -> str:
        """A line: the layers kept of each stage, and what that costs."""
        if not (self.removed or self.branches):
            return "; ".join(["no layer is removed: the network stays the same", *self._judged()])
        stages = zip(self.layers_after, self.layers_before, strict=True)
        kept = ", ".join(f"{after} of {before}" for after, before in stages)
        of = "layers" if self.branches is None else "branches"
        parts = [f"{of} kept per stage: {kept} (by {self.score})", *self._judged()]
        if self.multiply_adds_before is not None:
            parts.append(
                f"multiply-adds {self.multiply_adds_before:,} → {self.multiply_adds_after:,}"
            )
        if self.latency_before is not None and self.latency_after is not None:
            before, after = 1000 * self.latency_before, 1000 * self.latency_after
            parts.append(f"latency {before:.3g} → {after:.3g} ms")
        return "; ".join(parts)

    def _judged(self) -> list[str]:
        """The accuracies, or losses, and how many samples could tell of what was asked."""
        name, scale, form = "accuracy", 100, ".2f"
        figures = (self.accuracy_before, self.accuracy_after)
        if None in figures:
            name, scale, form = "loss", 1, ".4g"
            figures = (self.loss_before, self.loss_after)
        if self.samples is None or None in figures:
            return []
        shown = [f"{scale * cast(float, value):{form}}" for value in figures]
        shown = shown if self.removed or self.branches else shown[:1]
        unit, on = " %" if scale == 100 else "", several(self.samples, "sample")
        parts = [f"{name} {' → '.join(shown)}{unit} of {on}"]
        sure = f"{100 * (self.confidence or CONFIDENCE):g} %"
        if self.confidence is not None:
            parts.append(f"the limit is kept with confidence {sure}")
        if self.needed is not None:
            parts.append(
                f"so few cannot exclude a loss of {several(100 * self.limit, 'point')} at {sure}, "
                f"{self.needed:,} could"
            )
        return parts


class Spending:
    """Measures cuts of so many `orders` by one budget, in which `rise` is the part of the loss.

    Where a `quality` is limited, accuracy or loss, most layers go; where a cost is, fewest, and
    `most` at most. With a `confidence` a cut is tested by `excludes` and `most_risen`, for one
    order that is walked along to the first cut that fails.
    """

    def __init__(
        self,
        structure: Anatomy,
        trials: Trials | None,
        budget: Budget,
        limit: float,
        rise: float,
        orders: int,
        confidence: float | None = None,
    ):
        self.structure, self.data = structure, trials is not None
        self.trials = cast(Trials, trials)  # asked only where there are data
        self.budget, self.limit, self._rise = budget, limit, rise
        self.quality, self.confidence = budget in QUALITY, confidence
        # Of an order that is bisected so many cuts are tried; one that is walked along stops at the
        # first cut that loses, so that none before it counts.
        tried = orders * math.ceil(math.log2(structure.horizon + 1)) + 1
        self._z = NormalDist().inv_cdf(1 - (1 - CONFIDENCE) / tried)
        self.most = structure.horizon - (int(limit) if budget == "blocks" else 0)

    def bisected(self, order: list[int]) -> tuple[int, ...] | None:
        """The beginning of an order that meets the budget; None if none does."""
        sizes = range(int(self.quality), len(order) + 1)
        k = bisect_left(sizes, 1, key=lambda size: self._turned(order[:size]))
        return tuple(order[:k]) if self.quality or k < len(sizes) else None

    def one_by_one(self, order: Iterator[int], least: int) -> tuple[int, ...] | None:
        """The same for an order that is expensive to go on with; costs are met from `least` on."""
        gone: list[int] = []
        if self.quality:
            for n in order:
                if self._turned([*gone, n]):
                    break
                gone.append(n)
            return tuple(gone)
        while len(gone) < least or not self._turned(gone):
            more = next(order, None)
            if more is None:
                return None
            gone.append(more)
        return tuple(gone)

    def _turned(self, removed: Collection[int]) -> bool:
        """Tells if a cut loses, where quality is limited, and if it fits, where a cost is."""
        if self.budget == "blocks":
            return len(removed) == self.most
        if not self.quality:
            if not removed:
                return self.limit >= 1
            before, after = self._costs(removed)
            return before == 0 or after / before <= self.limit
        if self.trials.samples < FEW:
            return True
        change, samples = self.trials.change(removed), self.trials.samples
        if self.confidence is None:
            lost = change.lost + self._z * change.accuracy_error > self.limit
            risen = change.risen + self._z * change.loss_error
        else:
            sure = self.confidence
            lost = not excludes(samples, *change.swapped, self.limit, sure)
            rise = (change.risen, change.loss_error, change.skewness)
            risen = most_risen(*rise, samples, sure)
        # A cut whose loss is not a number loses.
        return (self.budget == "accuracy" and lost) or not risen <= self._rise

    def _costs(self, removed: Collection[int]) -> tuple[float, float]:
        """Of the model and its cut: latencies, or else multiply-adds."""
        if self.budget == "latency":
            return self.trials.latencies(removed)
        whole, cut = map(self.trials.multiply_adds, ((), removed))
        return float(whole), float(cut)

    def choice(self, score: str, cut: tuple[int, ...]) -> CutChoice:
        """All figures of a cut."""
        removed = tuple(sorted(cut))
        figures: dict[str, Any] = {}
        if self.data:
            change = self.trials.change(removed)
            figures = {
                "samples": self.trials.samples,
                "multiply_adds_before": self.trials.multiply_adds(()),
                "multiply_adds_after": self.trials.multiply_adds(removed),
            }
            if self.quality or not change.has_accuracy:
                figures |= change.figures("loss")
            if change.has_accuracy:
                figures |= change.figures("accuracy")
        if self.budget == "latency":
            figures["latency_before"], figures["latency_after"] = self.trials.latencies(removed)
        return CutChoice(
            removed=removed,
            score=cast(Score, score),
            budget=self.budget,
            limit=self.limit,
            layers_before=self._kept(()),
            layers_after=self._kept(removed),
            confidence=self.confidence,
            **figures,
        )

    def _kept(self, removed: Collection[int]) -> tuple[int, ...]:
        """Layers of each stage."""
        stages = [s.stage for n, s in enumerate(self.structure.layers) if n not in removed]
        return tuple(map(stages.count, range(self.structure.stages)))

    def unmet(self) -> str:
        """Says why no cut meets the budget, and what to do."""
        horizon, fixed = self.structure.horizon, self.structure.fixed
        name = type(self.structure.model).__name__
        asked = f"at most {self.limit:g} of the {self.budget.replace('_', '-')} is to be kept"
        if self.budget == "blocks":
            asked = f"{int(self.limit)} of {several(horizon, 'layer')} are to be kept"
        why = f"; layers {', '.join(map(str, fixed))} cannot be removed" if fixed else ""
        return f"{asked}, which {name} cannot reach by removing layers{why}; give a larger budget"
