"""The turnpike of a trained network: what every layer's state achieves, and where it may be cut.

The states of a network that was trained with a stage cost reach the minimisers Z*_y of the soft
cross-entropy early and stay there ([PF24] arXiv 2405.19013, [PHFF25] arXiv 2506.21453). Here it is
measured, layer by layer, on held-out data.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deeplimit._anatomy import Anatomy, anatomy
from deeplimit._anatomy.checks import IGNORED, check_number
from deeplimit._anatomy.evaluation import evaluating
from deeplimit.control import verdict
from deeplimit.control.batches import blame_inputs
from deeplimit.control.losses import (
    ConstantAnswer,
    Figures,
    Loss,
    SampleLoss,
    check_callable,
    sample_loss,
)
from deeplimit.errors import InputError, several
from deeplimit.records import Record
from deeplimit.tables import number, percent, table

ACCURACY_TOLERANCE = 0.005
TUBE = 0.2
NEED = "a profile needs at least one sample that counts"


def loss_tolerance(accuracy: float) -> float:
    """The part of the loss range by which the loss may rise beside a loss of accuracy.

    1 %, or as large a part as the accuracy that may be lost where that is more.
    """
    return max(verdict.LOSS_TOLERANCE, accuracy)


@dataclass(frozen=True)
class TurnpikeProfile(Record):
    """Per layer n = 0 … N, over all samples: loss, accuracy, distance to the minimisers, update.

    z_n are the logits of the state x_n, carried through the remaining projection shortcuts and the
    network's own head; ℓ is the soft cross-entropy. Layer N is the network's own output.

    Of another loss than the soft cross-entropy there are no minimisers and no distances, and of one
    that knows no classes no accuracies: these are empty then.

        >>> profile = turnpike_profile(model, loader, SoftCrossEntropy(4))
        >>> len(profile.loss) == profile.horizon + 1, profile.outside() <= profile.horizon + 1
        (True, True)

    Where there are logits for every token a sample is a token whose target is not −100. Tokens of
    one text are no independent samples: the standard errors are then too small.

    Attributes:
        samples: number of samples profiled.
        classes: number of classes C; 0 where the loss knows none.
        softness: softness ε of the loss; 0 of a plain cross-entropy, NaN without classes.
        minimum: H(q), the least value that ℓ can take; NaN without classes.
        loss: mean ℓ(z_n, y), N + 1 values, in nats or in units of the loss.
        accuracy: fraction of samples whose largest logit is their class's, N + 1 values.
        distance: d_n = mean dist(z_n, Z*_y), N + 1 values.
        class_distance: the same for each class, [N + 1][C]; NaN for a class with no samples. Empty
            for tokens.
        relative_update: mean ‖x_{n+1} − x_n‖ / ‖x_n‖ per sample, N values; at a change of stage x_n
            is carried to the shape of x_{n+1} first. Of states [B, L, d] padding, where the inputs'
            attention mask is 0, is no part of a sample. Samples with x_n = 0 are left out; NaN
            where no other is left.
        loss_error: standard error of mean(ℓ_n − ℓ_N), paired by sample, N + 1 values.
        accuracy_error: standard error of accuracy_n − accuracy_N, paired by sample, N + 1 values.
        influence: 1 − mean cos(x_n, x_{n+1}) per sample, N values from 0 (the layer turns no state)
            to 2, of the same samples as `relative_update` and carried as there: the block influence
            of ShortGPT (arXiv 2403.03853). None where it was not measured.
        constant: the mean loss of the best constant answer, where the loss knows no classes and the
            targets have the form of the outputs (`control.losses.ConstantAnswer`); else None.
    """

    samples: int
    classes: int
    softness: float
    minimum: float
    loss: tuple[float, ...]
    accuracy: tuple[float, ...]
    distance: tuple[float, ...]
    class_distance: tuple[tuple[float, ...], ...]
    relative_update: tuple[float, ...]
    loss_error: tuple[float, ...]
    accuracy_error: tuple[float, ...]
    influence: tuple[float, ...] | None = None
    constant: float | None = None

    def __post_init__(self) -> None:
        """Checks the lengths, which a file that was changed by hand may not have."""
        sizes = {"relative_update": self.horizon, "influence": self.horizon}
        for name in ("accuracy", "distance", "loss_error", "accuracy_error", *sizes):
            found, expected = getattr(self, name), sizes.get(name, len(self.loss))
            if found and len(found) != expected:
                raise InputError(
                    f"{name} has {len(found)} values; expected {expected}, as loss has "
                    f"{len(self.loss)}: measure the profile again"
                )

    @property
    def horizon(self) -> int:
        """N, the number of layers (residual steps) of the network."""
        return len(self.loss) - 1

    @property
    def radius(self) -> float:
        """The default tube radius δ = 0.2·d_0.

        d_0 = log((1−ε)(C−1)/ε)·√(1−1/C) is the distance of zero logits from the minimisers: a
        network inside the tube has gone four fifths of the way from knowing nothing. NaN where the
        loss has no minimisers: no layer is in the tube.
        """
        if not self.distance:
            return math.nan
        contrast = math.log((1 - self.softness) * (self.classes - 1) / self.softness)
        return TUBE * contrast * math.sqrt(1 - 1 / self.classes)

    def exit(self, radius: float | None = None) -> int | None:
        """Last layer in the tube: n_out(δ) = max{n ≤ N : d_n ≤ δ}; None if no layer is in it."""
        limit = self._limit(radius)
        return max((n for n, d in enumerate(self.distance) if d <= limit), default=None)

    def entry(self, radius: float | None = None) -> int | None:
        """First layer from which on all are in the tube up to the exit; None if none is in it.

        n_in(δ) = min{n : d_k ≤ δ for n ≤ k ≤ n_out}.
        """
        limit, last = self._limit(radius), self.exit(radius)
        if last is None:
            return None
        outside = (n for n in range(last, -1, -1) if not self.distance[n] <= limit)
        return next(outside, -1) + 1

    def outside(self, radius: float | None = None) -> int:
        """Number of layers 0 … N outside the tube, the count that the turnpike theorem bounds."""
        limit = self._limit(radius)
        return sum(not d <= limit for d in self.distance)

    def depth_within(
        self,
        accuracy: float = ACCURACY_TOLERANCE,
        loss: float | None = None,
        *,
        rise: float | None = None,
    ) -> int:
        """The smallest depth whose output is as good as the full network's, within tolerances.

        The rule, one-sided (a shallower network may be better, never worse), for the layer n:

            accuracy_N − accuracy_n + z·se  ≤ accuracy              (0.005 = half a point)
            loss_n − loss_N + z·se          ≤ loss·loss_range,      or ≤ rise

        with se the standard error of the difference, paired by sample, and z = 1.645, its 95 %
        quantile. The second tolerance is a part of the loss's range, so that it does not depend on
        the number of classes; without one it is `loss_tolerance`; `rise` gives it in units of the
        loss. Where there are no accuracies the second condition is the rule. Layer N satisfies
        both. Choose on validation data, report on test data.

        Where no sample differs the standard error is 0. What so few samples cannot tell is not
        made up for: `samples_to_exclude(accuracy)` says how many could. Of fewer than 11 samples
        (`verdict.FEW`) standard errors mean nothing: the depth is N.
        """
        verdict.check_tolerance(accuracy)
        if rise is None:
            rise = (loss_tolerance(accuracy) if loss is None else loss) * self.loss_range
        else:
            verdict.check_rise(rise)
        for n in range(self.horizon if self.samples >= verdict.FEW else 0):
            risen = self.loss[n] - self.loss[-1] + verdict.Z * self.loss_error[n]
            if self.accuracy:
                lost = self.accuracy[-1] - self.accuracy[n] + verdict.Z * self.accuracy_error[n]
            else:
                lost = 0.0
            if lost <= accuracy and risen <= rise:
                return n
        return self.horizon

    @property
    def loss_range(self) -> float:
        """The range log C − H(q), from the minimum of the loss to that of knowing nothing.

        Without classes the range from the network's own mean loss to that of the best constant
        answer, 0 if it is no better; where that is not known the size of its own mean loss.
        """
        if self.classes:
            return math.log(self.classes) - self.minimum
        return verdict.range_of(self.loss[-1], self.constant)

    @property
    def recommended_depth(self) -> int:
        """`depth_within` the defaults: half a point of accuracy, 1 % of the loss range."""
        return self.depth_within()

    def __str__(self) -> str:
        """A row per layer: loss, accuracy, distance, update, influence; of many layers some."""
        columns = {
            "layer": [str(n) for n in range(self.horizon + 1)],
            "loss": [number(v) for v in self.loss],
            "accuracy": [percent(v) for v in self.accuracy],
            "distance": [number(v, 3) for v in self.distance],
            "update": ["", *(number(v, 3) for v in self.relative_update)],
            "influence": ["", *(number(v, 3) for v in self.influence or ())],
        }
        full = {name: column for name, column in columns.items() if len(column) > self.horizon}
        return (
            f"{several(self.samples, 'sample')}; depth {self.recommended_depth} of {self.horizon} "
            f"is as good as all\n{table(list(full), list(zip(*full.values(), strict=True)))}"
        )

    def _limit(self, radius: float | None) -> float:
        if radius is None:
            return self.radius
        return check_number("the tube radius", radius, "a number ≥ 0", lambda r: r >= 0)


@torch.no_grad()
def turnpike_profile(
    model: nn.Module | Anatomy,
    loader: Iterable[Any],
    loss: Loss,
    *,
    updates: bool = True,
    shift: bool = False,
) -> TurnpikeProfile:
    """Profiles a model layer by layer over a loader of (x, y), in one pass.

    The model runs in evaluation mode and is left in the mode it was in. One batch's states are in
    memory at a time; of logits for every token, [B, L, C], the model's own and a chunk of one
    layer's. Targets of tokens [B, L] are aligned with the logits; −100 does not count.

        >>> profile = turnpike_profile(model, loader, SoftCrossEntropy(4))
        >>> 0 <= profile.recommended_depth <= profile.horizon
        True

    Args:
        model: the network.
        loader: batches (x, y).
        loss: the loss that was trained. With a `SoftCrossEntropy` all is measured; with
            `nn.CrossEntropyLoss` there are no minimisers and no distances; of any other
            ℓ(outputs, targets) nothing but its values is known, one per sample
            (`control.losses.OtherLoss`), and there are no accuracies either. Where the loader gives
            mappings it is ℓ(outputs, batch).
        updates: whether to measure what each layer does to the states; without it
            `relative_update` is empty and `influence` None, and the profile is there sooner.
        shift: targets of tokens are the inputs themselves: each predicts the next.

    Raises:
        InputError: a loader that is empty or has no token that counts, targets that are no classes
            or not aligned, inputs that are not finite, a loss without values of single samples, or
            a model that `anatomy` cannot read.
    """
    check_callable(loss)
    of = sample_loss(loss)
    structure = anatomy(model)
    sums: Figures = {}
    constant, classes = ConstantAnswer(of), 0
    with evaluating(structure.model):
        for x, y in of.batches(structure, loader, NEED, shift=shift):
            states, output = structure.states(x)
            constant.add(output, y)
            classes = output.shape[-1] if of.of_classes else 0
            batch = _sums(structure, x, y, of, states, output)
            blame_inputs(x, batch["loss"])
            if updates and len(states) > 1:
                batch |= _changes(structure, x, y, of, states)
            del states, output  # before those of the next batch are there
            sums = {name: sums.get(name, 0) + value for name, value in batch.items()}
        least = constant.losses()
    n = int(sums["count"])
    softness, minimum = of.softness_and_minimum(classes)

    def mean(name: str, over: str = "count") -> tuple[Any, ...]:
        found = (sums[name] / sums[over]).tolist() if name in sums else ()
        return tuple(tuple(v) if isinstance(v, list) else v for v in found)

    def error(name: str) -> tuple[float, ...]:
        if name not in sums:
            return ()
        spread = sums[f"{name} squared"] / n - (sums[f"{name} gap"] / n) ** 2
        return tuple((spread.clamp(min=0) / n).sqrt().tolist())

    return TurnpikeProfile(
        samples=n,
        classes=classes,
        softness=softness,
        minimum=minimum,
        loss=mean("loss"),
        accuracy=mean("right"),
        distance=mean("distance"),
        class_distance=mean("class distance", "of class"),
        relative_update=mean("update", "updated"),
        loss_error=error("loss"),
        accuracy_error=error("right"),
        influence=mean("influence", "updated") if updates else None,
        constant=None if least is None else float(least.mean()),
    )


def _sums(
    structure: Anatomy, x: Any, y: Any, of: SampleLoss, states: list[Tensor], output: Tensor
) -> Figures:
    """Sums over the samples of a batch: of figures [N + 1, S], and of their gaps to layer N's."""
    soft = of.soft

    def measure(z: Tensor, y: Any) -> Figures:
        return of.figures(z, y) | ({} if soft is None else {"distance": soft.distance(z, y)})

    figures = of.measured(structure, x, y, [output], *states[:-1], measure=measure)
    sums = {"count": torch.tensor(figures["loss"].shape[1])}
    for name in figures.keys() & {"loss", "right", "distance"}:
        values = figures[name].double()
        gap = values - values[-1]
        sums |= {name: values.sum(1), f"{name} gap": gap.sum(1)}
        sums[f"{name} squared"] = gap.square().sum(1)
    if soft is not None and not structure.tokens:
        own = F.one_hot(figures["targets"], soft.classes).double()
        sums |= {"class distance": figures["distance"] @ own, "of class": own.sum(0)}
    return sums


def _that_count(state: Tensor, counts: Tensor) -> Tensor:
    """The samples [S, …] of a state that count, of targets [B], or [B, L] of tokens.

    A state may have its samples second, as recurrent networks have, several rows for each, such as
    a text for each choice, or be of another text than the targets.
    """
    if state.shape[: counts.dim()] == counts.shape:
        return state[counts]
    counts = counts.flatten(1).any(1) if counts.dim() > 1 else counts
    samples = len(counts)
    if len(state) != samples and state.dim() > 2 and state.shape[1] == samples:
        state = state.transpose(0, 1)
    if samples and len(state) % samples == 0:
        return state.reshape(samples, -1)[counts]
    return state


def _changes(structure: Anatomy, x: Any, y: Any, of: SampleLoss, states: list[Tensor]) -> Figures:
    """Relative update and influence, summed over samples with x_n ≠ 0, and their number, per layer.

    Σ_i ‖x_{n+1} − x_n‖ / ‖x_n‖ and Σ_i (1 − cos), the latter as half the squared distance of the
    two directions: exactly zero for a layer that does nothing, and exact near zero. Of states
    [B, L, d] padding is no part of a sample.
    """
    of_tokens = of.of_classes and structure.tokens
    mask: Tensor | None = x.get("attention_mask") if isinstance(x, Mapping) else None
    mask = None if mask is None else mask.flatten(0, -2)
    if of_tokens or (mask is not None and any(s.shape[:2] != mask.shape for s in states)):
        mask = None

    def rows(state: Tensor) -> Tensor:
        state = state if mask is None else state.masked_fill((mask == 0)[..., None], 0)
        every = _that_count(state, y != IGNORED) if of.of_classes else state
        return every.flatten(1).double()

    table = []
    for n in range(len(states) - 1):
        before, after = rows(structure.carried(n, states[n], x)), rows(states[n + 1])
        size = torch.linalg.vector_norm(before, dim=1)
        ratio = torch.linalg.vector_norm(after - before, dim=1) / size
        turned = (F.normalize(after, dim=1) - F.normalize(before, dim=1)).square().sum(1) / 2
        # A state that becomes zero has no direction left: orthogonal to what it was.
        turned = turned.where(after.any(1), 1.0)
        moved = size != 0
        table.append(
            torch.stack([v.where(moved, 0.0).sum() for v in (ratio, turned, moved.double())])
        )
    update, influence, updated = torch.stack(table, 1).cpu()
    return {"update": update, "influence": influence, "updated": updated}
