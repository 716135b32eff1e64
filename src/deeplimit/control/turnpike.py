"""The turnpike of a trained network: what every layer's state achieves, and where it may be cut.

The states of a network that was trained with a stage cost reach the minimisers Z*_y of the soft
cross-entropy early and stay there ([PF24] arXiv 2405.19013, [PHFF25] arXiv 2506.21453). Here it is
measured, layer by layer, on held-out data.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deeplimit._anatomy import Anatomy, anatomy
from deeplimit._anatomy.checks import check_number
from deeplimit._anatomy.evaluation import Inputs, evaluating
from deeplimit.control.batches import aligned_batches, blame_inputs
from deeplimit.control.soft_cross_entropy import SoftCrossEntropy, check_loss
from deeplimit.control.token_losses import CountedTokens, drop_ignored
from deeplimit.control.verdict import FEW, Z, check_tolerance

ACCURACY_TOLERANCE = 0.005
LOSS_TOLERANCE = 0.01
TUBE = 0.2
NEED = "a profile needs at least one sample that counts"


def loss_tolerance(accuracy: float) -> float:
    """The part of the loss range by which the loss may rise beside a loss of accuracy.

    1 %, or as large a part as the accuracy that may be lost where that is more.
    """
    return max(LOSS_TOLERANCE, accuracy)


@dataclass(frozen=True)
class TurnpikeProfile:
    """Per layer n = 0 … N, over all samples: loss, accuracy, distance to the minimisers, update.

    z_n are the logits of the state x_n, carried through the remaining projection shortcuts and the
    network's own head; ℓ is the soft cross-entropy. Layer N is the network's own output.

    Where there are logits for every token a sample is a token whose target is not −100. Tokens of
    one text are no independent samples: the standard errors are then too small.

    Attributes:
        samples: number of samples profiled.
        classes: number of classes C.
        softness: softness ε of the loss.
        minimum: H(q), the least value that ℓ can take.
        loss: mean ℓ(z_n, y), N + 1 values, in nats.
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

    @property
    def horizon(self) -> int:
        """N, the number of layers (residual steps) of the network."""
        return len(self.loss) - 1

    @property
    def radius(self) -> float:
        """The default tube radius δ = 0.2·d_0.

        d_0 = log((1−ε)(C−1)/ε)·√(1−1/C) is the distance of zero logits from the minimisers: a
        network inside the tube has gone four fifths of the way from knowing nothing.
        """
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
        limit = self._limit(radius)
        last = self.exit(radius)
        if last is None:
            return None
        first = last
        while first > 0 and self.distance[first - 1] <= limit:
            first -= 1
        return first

    def outside(self, radius: float | None = None) -> int:
        """Number of layers 0 … N outside the tube, the count that the turnpike theorem bounds."""
        limit = self._limit(radius)
        return sum(not d <= limit for d in self.distance)

    def depth_within(self, accuracy: float = ACCURACY_TOLERANCE, loss: float | None = None) -> int:
        """The smallest depth whose output is as good as the full network's, within tolerances.

        The rule, one-sided (a shallower network may be better, never worse), for the layer n:

            accuracy_N − accuracy_n + z·se  ≤ accuracy              (0.005 = half a point)
            loss_n − loss_N + z·se          ≤ loss·(log C − H(q))

        with se the standard error of the difference, paired by sample, and z = 1.645, its 95 %
        quantile. log C − H(q) is the loss of knowing nothing above the minimum, so that the second
        tolerance does not depend on the number of classes; without one it is `loss_tolerance`.
        Layer N satisfies both. Choose on validation data, report on test data.

        Where no sample differs the standard error is 0. What so few samples cannot tell is not
        made up for: `samples_to_exclude(accuracy)` says how many could. Of fewer than 11 samples
        (`verdict.FEW`) standard errors mean nothing: the depth is N.
        """
        check_tolerance(accuracy)
        rise = (loss_tolerance(accuracy) if loss is None else loss) * self.loss_range
        for n in range(self.horizon if self.samples >= FEW else 0):
            lost = self.accuracy[-1] - self.accuracy[n] + Z * self.accuracy_error[n]
            risen = self.loss[n] - self.loss[-1] + Z * self.loss_error[n]
            if lost <= accuracy and risen <= rise:
                return n
        return self.horizon

    @property
    def loss_range(self) -> float:
        """The range log C − H(q), from the minimum of the loss to that of knowing nothing."""
        return math.log(self.classes) - self.minimum

    @property
    def recommended_depth(self) -> int:
        """`depth_within` the defaults: half a point of accuracy, 1 % of the loss range."""
        return self.depth_within()

    def _limit(self, radius: float | None) -> float:
        if radius is None:
            return self.radius
        return check_number("the tube radius", radius, "a number ≥ 0", lambda r: r >= 0)


@torch.no_grad()
def turnpike_profile(
    model: nn.Module | Anatomy,
    loader: Iterable[tuple[Inputs, Tensor]],
    loss: SoftCrossEntropy,
    *,
    updates: bool = True,
    shift: bool = False,
) -> TurnpikeProfile:
    """Profiles a model layer by layer over a loader of (x, y), in one pass.

    The model runs in evaluation mode and is left in the mode it was in. One batch's states are in
    memory at a time; of logits for every token, [B, L, C], the model's own and a chunk of one
    layer's. Targets of tokens [B, L] are aligned with the logits; −100 does not count.

    Args:
        model: the network.
        loader: batches (x, y).
        loss: the loss that was trained.
        updates: whether to measure what each layer does to the states; without it
            `relative_update` is empty and `influence` None, and the profile is there sooner.
        shift: targets of tokens are the inputs themselves: each predicts the next.

    Raises:
        InputError: a loader that is empty or has no token that counts, targets that are no classes
            or not aligned, inputs that are not finite, another loss, or a model that `anatomy`
            cannot read.
    """
    check_loss(loss)
    structure = anatomy(model)
    model = structure.model
    sums: _Sums | None = None
    with evaluating(model):
        for x, y in aligned_batches(structure, loader, shift, NEED):
            batch = _measure(structure, x, y, loss, updates)
            blame_inputs(x, batch.loss)
            sums = batch if sums is None else sums + batch
    profile = cast(_Sums, sums).profile(loss)
    return profile if updates else replace(profile, influence=None)


@dataclass(frozen=True)
class _Sums:
    """Sums over samples, per layer, in float64."""

    count: int
    loss: Tensor
    correct: Tensor
    distance: Tensor
    update: Tensor
    influence: Tensor
    update_count: Tensor
    loss_gap: Tensor
    loss_gap_squared: Tensor
    hit_gap_squared: Tensor
    class_distance: Tensor
    class_count: Tensor

    def __add__(self, other: "_Sums") -> "_Sums":
        mine, theirs = vars(self), vars(other)
        return _Sums(**{name: mine[name] + theirs[name] for name in mine})

    def profile(self, loss: SoftCrossEntropy) -> TurnpikeProfile:
        n = self.count
        mean_gap = self.loss_gap / n
        hit_gap = (self.correct - self.correct[-1]) / n
        spread = (self.loss_gap_squared / n - mean_gap**2).clamp(min=0)
        hit_spread = (self.hit_gap_squared / n - hit_gap**2).clamp(min=0)
        per_class = self.class_distance / self.class_count
        return TurnpikeProfile(
            samples=n,
            classes=loss.classes,
            softness=loss.softness,
            minimum=loss.minimum,
            loss=tuple((self.loss / n).tolist()),
            accuracy=tuple((self.correct / n).tolist()),
            distance=tuple((self.distance / n).tolist()),
            class_distance=tuple(tuple(row) for row in per_class.tolist()),
            relative_update=tuple((self.update / self.update_count).tolist()),
            loss_error=tuple((spread / n).sqrt().tolist()),
            accuracy_error=tuple((hit_spread / n).sqrt().tolist()),
            influence=tuple((self.influence / self.update_count).tolist()),
        )


def _measure(
    structure: Anatomy, x: Inputs, y: Tensor, loss: SoftCrossEntropy, updates: bool
) -> _Sums:
    def measure(z: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hits = (z.argmax(-1) == targets).double()
        return loss(z, targets), loss.distance(z, targets), hits

    states, output = structure.states(x)
    counted = CountedTokens(y, loss.classes) if structure.tokens else None
    padding = _padding(x, states)
    if counted is None:
        y = loss.fitted(output, y)
        *states, padding, output, y = drop_ignored(y, *states, padding, output)
    if counted is not None:
        values, distance, hits = counted.measured(structure, x, states[:-1], output, measure)
    else:
        below = [structure.logits(states[:-1], x=x)] if states[1:] else []
        logits = torch.cat([*below, output[None]]).double()
        values, distance, hits = measure(logits, y.expand(len(logits), *y.shape))
    gap, none = values - values[-1], torch.zeros(0)
    own = None if counted is not None else torch.nn.functional.one_hot(y, loss.classes).double()
    rows = counted.of if counted is not None else partial(_flat, padding)
    changes, influences, update_count = _changes(structure, x, states if updates else [], rows)
    return _Sums(
        count=values.shape[1],
        loss=values.sum(1).cpu(),
        correct=hits.sum(1).cpu(),
        distance=distance.sum(1).cpu(),
        update=changes.cpu(),
        influence=influences.cpu(),
        update_count=update_count.cpu(),
        loss_gap=gap.sum(1).cpu(),
        loss_gap_squared=gap.square().sum(1).cpu(),
        hit_gap_squared=(hits - hits[-1]).square().sum(1).cpu(),
        class_distance=none if own is None else (distance @ own).cpu(),
        class_count=none if own is None else own.sum(0).cpu(),
    )


def _padding(x: Inputs, states: list[Tensor]) -> Tensor:
    """Where states [B, L, d] are of padding, [B, L]: not of a sample, whatever a layer does there.

    Without an attention mask no token is; of states of another form [B, 0].
    """
    mask = None if isinstance(x, Tensor) else x.get("attention_mask")
    shape = states[0].shape[:2]
    if mask is None or mask.shape != shape or any(s.shape[:2] != shape for s in states):
        return torch.zeros(len(states[0]), 0, dtype=torch.bool, device=states[0].device)
    return mask == 0


def _flat(padding: Tensor, state: Tensor) -> Tensor:
    if padding.shape[1]:
        state = state.masked_fill(padding[..., None], 0)
    return state.flatten(1)


def _changes(
    structure: Anatomy, x: Inputs, states: list[Tensor], rows: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Relative update and influence, summed over samples with x_n ≠ 0, and their number, per layer.

    Σ_i ‖x_{n+1} − x_n‖ / ‖x_n‖ and Σ_i (1 − cos), the latter as half the squared distance of the
    two directions: exactly zero for a layer that does nothing, and exact near zero. `rows` makes
    samples [S, …] of a state.
    """
    updates, influences, counts = [], [], []
    for n in range(len(states) - 1):
        before = rows(structure.carried(n, states[n], x)).double()
        after = rows(states[n + 1]).double()
        size = torch.linalg.vector_norm(before, dim=1)
        ratio = torch.linalg.vector_norm(after - before, dim=1) / size
        turned = (F.normalize(after, dim=1) - F.normalize(before, dim=1)).square().sum(1) / 2
        # A state that becomes zero has no direction left: orthogonal to what it was.
        turned = turned.where(after.any(1), 1.0)
        updates.append(ratio.where(size != 0, 0.0).sum())
        influences.append(turned.where(size != 0, 0.0).sum())
        counts.append((size != 0).sum())
    if not counts:
        none = torch.zeros(0, dtype=torch.float64)
        return none, none, torch.zeros(0, dtype=torch.long)
    return torch.stack(updates), torch.stack(influences), torch.stack(counts)
