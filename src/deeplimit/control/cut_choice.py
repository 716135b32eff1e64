"""What a choice of layers to cut removes, and what that spends of its budget."""

from dataclasses import dataclass
from typing import Literal

from deeplimit.control.verdict import samples_needed
from deeplimit.errors import several
from deeplimit.tables import Shown

Budget = Literal["accuracy", "rise", "blocks", "multiply_adds", "latency"]


@dataclass(frozen=True)
class CutChoice(Shown):
    """The layers to be removed under a budget; `crop(model, remove=choice.removed)` removes them.

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
    """

    removed: tuple[int, ...]
    score: Literal["influence", "update", "tail", "turnpike", "trial"]
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

    @property
    def needed(self) -> int | None:
        """Samples without which the accuracy that may be lost cannot be told.

        None where there are so many, and for another budget.
        """
        return samples_needed(self.limit, self.samples or 0) if self.budget == "accuracy" else None

    def __str__(self) -> str:
        """What is kept of each stage and what that costs, in a line."""
        if not (self.removed or self.branches):
            return "; ".join(["no layer is removed: the network stays the same", *self._judged()])
        stages = zip(self.layers_after, self.layers_before, strict=True)
        kept = ", ".join(f"{after} of {before}" for after, before in stages)
        of = "layers" if self.branches is None else "branches"
        parts = [f"{of} kept per stage: {kept} (by {self.score})"]
        parts += self._judged()
        if self.multiply_adds_before is not None:
            parts.append(
                f"multiply-adds {self.multiply_adds_before:,} → {self.multiply_adds_after:,}"
            )
        if self.latency_before is not None and self.latency_after is not None:
            before, after = 1000 * self.latency_before, 1000 * self.latency_after
            parts.append(f"latency {before:.3g} → {after:.3g} ms")
        return "; ".join(parts)

    def _judged(self) -> list[str]:
        """The accuracies, and how many samples could tell of what was asked, if any did.

        Without classes the losses.
        """
        if self.samples is None:
            return []
        on = several(self.samples, "sample")
        if self.accuracy_before is not None and self.accuracy_after is not None:
            name, unit = "accuracy", " %"
            shown = [f"{100 * a:.2f}" for a in (self.accuracy_before, self.accuracy_after)]
        elif self.loss_before is not None and self.loss_after is not None:
            name, unit = "loss", ""
            shown = [f"{a:.4g}" for a in (self.loss_before, self.loss_after)]
        else:
            return []
        shown = shown if self.removed or self.branches else shown[:1]
        parts = [f"{name} {' → '.join(shown)}{unit} of {on}"]
        if self.needed is not None:
            parts.append(
                f"so few cannot exclude a loss of {several(100 * self.limit, 'point')} at 95 %, "
                f"{self.needed:,} could"
            )
        return parts
