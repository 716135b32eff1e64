"""Cuts of one model, tried on the same batches, and what they spend of a budget."""

import heapq
import math
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, cast

import torch
from torch import Tensor, nn

from deeplimit._anatomy import Anatomy
from deeplimit._anatomy.evaluation import begun
from deeplimit._anatomy.inputs import batch_of
from deeplimit.control.batches import blame_inputs, first_part, part, tensors_in
from deeplimit.control.cut_choice import Budget, CutChoice
from deeplimit.control.losses import ClassLoss, SampleLoss, check_losses
from deeplimit.control.paired import mean_and_error
from deeplimit.control.verdict import CONFIDENCE, FEW
from deeplimit.control.verifying import latencies, multiply_adds
from deeplimit.errors import InputError, several

AGAIN = 8
QUALITY: tuple[Budget, ...] = ("accuracy", "rise")
NEED = "a cut is chosen on at least one sample that counts"


MayGo = Callable[[Collection[int], int], bool]


@dataclass(frozen=True)
class Outcome:
    """Accuracy and loss of a cut, what it loses of the first, and by how much the second rises.

    The changes come with their standard errors, paired by sample. Accuracies are NaN, and nothing
    of them is lost, where the loss knows no classes.
    """

    accuracy: float
    loss: float
    lost: float
    error: float
    risen: float
    risen_error: float


class Trials:
    """Tries cuts of a model in evaluation mode, without gradients; an outcome is kept for later.

    Args:
        structure: of the model.
        loader: batches (x, y), the same in every pass over it.
        of: what is measured; by default with the plain cross-entropy.
        shift: targets of tokens are the inputs themselves: each predicts the next.

    Attributes:
        batch: the inputs of the first batch.
        samples: number of those that judge: all but the ones that `order` looks at, the first
            batch, or half of the samples if that is less.
        whole: the outcome of the model itself on them.

    Raises:
        InputError: a loader that can be gone through only once, that is empty, that gives other
            targets in a later pass, or in which nothing counts; targets that are no classes or not
            aligned, inputs that are not finite.
    """

    def __init__(
        self,
        structure: Anatomy,
        loader: Iterable[Any],
        of: SampleLoss | None = None,
        *,
        shift: bool = False,
    ):
        batches = begun(loader)
        if batches is loader:
            raise InputError(
                "the loader can be gone through only once; cuts are tried on the same batches "
                "again and again: give a DataLoader or a list"
            )
        of = of or ClassLoss(None)
        self.structure, self._of = structure, of
        self._loader, self._shift = loader, shift
        self._targets: list[Tensor] | None = None
        self._rows = 0
        self._outcomes: dict[frozenset[int], Outcome] = {}
        self.batch, targets = next(of.batches(structure, batches, NEED, shift=shift))
        own = self._run(structure)
        check_losses(own[:, 0])
        # What puts the layers in order does not judge the cuts that follow from it as well: of
        # hundreds of cuts the ones that suit these samples come first.
        count = batch_of(self.batch)
        rows = max(min(count, self._rows // 2), 1)
        self._first = first_part(self.batch, rows)
        self._first_targets = part(targets, slice(rows), count)
        self._answers = structure.run(self._first)
        parts = of.rows(structure, self._first_targets, self._answers)
        used = sum(len(of.each(z, y)) for z, y in parts)
        self._judging = slice(used if used < len(own) else 0, None)
        self._own = own[self._judging]
        self.samples = len(self._own)
        self.whole = self.outcome(())

    def cut(self, removed: Iterable[int]) -> nn.Module:
        """The model less these layers."""
        return self.structure.without(removed)

    def outcome(self, removed: Collection[int]) -> Outcome:
        """What a cut does to accuracy and loss, on the samples that judge."""
        key = frozenset(removed)
        if key not in self._outcomes:
            values = self._own
            if key:
                values = self._run(self.structure.like(self.cut(key)))[self._judging]
            accuracy, lost = math.nan, (0.0, 0.0)
            if self._of.of_classes:
                accuracy = float(values[:, 1].mean())
                lost = mean_and_error((self._own - values)[:, 1])
            risen = mean_and_error((values - self._own)[:, 0])
            self._outcomes[key] = Outcome(accuracy, float(values[:, 0].mean()), *lost, *risen)
        return self._outcomes[key]

    def divergence(self, removed: Collection[int]) -> float:
        """How far the answers of what puts in order move: mean KL(softmax z ‖ softmax z′).

        z are of the model, z′ of its cut. Without classes it is the mean of (z − z′)².
        """
        answers = self.structure.like(self.cut(removed)).run(self._first)
        total, count = 0.0, 0
        parts = self._of.rows(self.structure, self._first_targets, self._answers, answers)
        for z, w, y in parts:
            total += float(self._of.apart(z, w))
            count += len(y) if self._of.of_classes else len(z)
        return total / max(count, 1)

    def order(self, ranked: Iterable[int], may_go: MayGo | None = None) -> Iterator[int]:
        """The layers one by one: next the one whose removal adds the least divergence.

        What a layer adds is measured for all at first, then again for the eight that added least
        when last measured, and for others while that would make one of them the next (lazy greedy,
        Minoux 1978): of at most eight layers the order is the greedy one, of more nearly so. A
        measurement is a forward pass of them. Layers that the model cannot be without,
        as things stand, are left where they are.

        Args:
            ranked: the layers; those in front go first among equals.
            may_go: whether a layer may go after others; by default any may.
        """
        gone: list[int] = []
        spent = 0.0
        # What it adds, its rank, the layer, and how many were gone when that was measured.
        queue = [(-math.inf, rank, n, -1) for rank, n in enumerate(ranked)]
        while queue:
            due = [heapq.heappop(queue) for _ in range(min(AGAIN, len(queue)))]
            waiting = []
            while due or (queue and queue[0][3] < len(gone)):
                entry = due.pop() if due else heapq.heappop(queue)
                _, rank, n, _ = entry
                if may_go is not None and not may_go(gone, n):
                    waiting.append(entry)
                    continue
                try:
                    added = self.divergence([*gone, n]) - spent
                except InputError:
                    continue
                heapq.heappush(queue, (added, rank, n, len(gone)))
            if queue:
                added, _, n, _ = heapq.heappop(queue)
                gone.append(n)
                spent += added
                yield n
            elif waiting:
                return
            for entry in waiting:
                heapq.heappush(queue, entry)

    def _run(self, structure: Anatomy) -> Tensor:
        """The loss of each sample, and whether it is right where there are classes, [S, 1 or 2]."""
        values, targets, rows = [], [], 0
        for x, y in self._of.batches(structure, self._loader, NEED, shift=self._shift):
            z = structure.run(x)
            blame_inputs(x, z)
            y = self._of.fitted(z, y)
            for own, same in self._of.rows(structure, y, z):
                figures = [self._of.each(own, same)]
                if self._of.of_classes:
                    figures.append((own.argmax(-1) == same).double())
                values.append(torch.stack(figures, 1).cpu())
            targets += [t.flatten().double().nan_to_num().cpu() for t in tensors_in(y)]
            rows += batch_of(x)
        if self._targets is None:
            self._targets, self._rows = targets, rows
        elif not torch.equal(torch.cat(self._targets), torch.cat(targets)):
            raise InputError(
                "the loader gives its samples in another order every time; give one that does not "
                "shuffle"
            )
        return torch.cat(values)


class Spending:
    """One budget, and what cuts of so many orders spend of it; `rise` is the loss's part in it."""

    def __init__(
        self,
        structure: Anatomy,
        trials: Trials | None,
        budget: Budget,
        limit: float,
        rise: float,
        orders: int,
    ):
        self.structure, self.trials = structure, trials
        self.budget, self.limit, self._rise = budget, limit, rise
        # Of an order that is bisected so many cuts are tried; one that is walked along stops at the
        # first cut that loses, so that none before it counts.
        tried = orders * math.ceil(math.log2(structure.horizon + 1)) + 1
        self._z = NormalDist().inv_cdf(1 - (1 - CONFIDENCE) / tried)
        self.most = structure.horizon  # layers that may have to go
        if budget == "blocks":
            self.most -= int(limit)
        self._whole = 0
        self._latencies: dict[frozenset[int], tuple[float, float]] = {}
        if trials is not None:
            self._whole = multiply_adds(structure, first_part(trials.batch, 1))

    def bisected(self, order: list[int]) -> tuple[int, ...] | None:
        """The beginning of an order that meets the budget; None if none does."""
        if self.budget in QUALITY:
            sizes = range(1, len(order) + 1)
            return tuple(order[: bisect_left(sizes, 1, key=lambda k: self._loses(order[:k]))])
        sizes = range(len(order) + 1)
        k = bisect_left(sizes, 1, key=lambda k: self._fits(order[:k]))
        return tuple(order[:k]) if k < len(sizes) else None

    def one_by_one(self, order: Iterator[int], least: int) -> tuple[int, ...] | None:
        """The same for an order that is expensive to go on with; costs are met from `least` on."""
        gone: list[int] = []
        if self.budget in QUALITY:
            for n in order:
                if self._loses([*gone, n]):
                    break
                gone.append(n)
            return tuple(gone)
        while len(gone) < least or not self._fits(gone):
            more = next(order, None)
            if more is None:
                return None
            gone.append(more)
        return tuple(gone)

    def multiply_adds(self, removed: Collection[int]) -> tuple[int, int]:
        """Of the model and its cut, for one sample."""
        trials = cast(Trials, self.trials)
        after = self.structure.like(trials.cut(removed))
        return self._whole, multiply_adds(after, first_part(trials.batch, 1))

    def latencies(self, removed: Collection[int]) -> tuple[float, float]:
        """Of the model and its cut, for the first batch, as they were measured first."""
        key, trials = frozenset(removed), cast(Trials, self.trials)
        if key not in self._latencies:
            runs = [self.structure.run]
            if key:
                runs.append(self.structure.like(trials.cut(key)).run)
            times = latencies(runs, trials.batch)
            self._latencies[key] = times[0], times[-1]
        return self._latencies[key]

    def choice(self, score: str, cut: tuple[int, ...]) -> CutChoice:
        """All figures of a cut."""
        removed = tuple(sorted(cut))
        layers = self.structure.layers
        before, after = (
            tuple(
                sum(layer.stage == m and n not in gone for n, layer in enumerate(layers))
                for m in range(self.structure.stages)
            )
            for gone in ((), removed)
        )
        figures: dict[str, float | None] = {}
        if self.trials is not None:
            whole, outcome = self.trials.whole, self.trials.outcome(removed)
            products = self.multiply_adds(removed)
            figures |= {
                "samples": self.trials.samples,
                "multiply_adds_before": products[0],
                "multiply_adds_after": products[1],
            }
            if self.budget in QUALITY or math.isnan(whole.accuracy):
                figures |= {
                    "loss_before": whole.loss,
                    "loss_after": outcome.loss,
                    "loss_error": outcome.risen_error,
                }
            if not math.isnan(whole.accuracy):
                figures |= {
                    "accuracy_before": whole.accuracy,
                    "accuracy_after": outcome.accuracy,
                    "accuracy_error": outcome.error,
                }
        if self.budget == "latency":
            times = self.latencies(removed)
            figures |= {"latency_before": times[0], "latency_after": times[1]}
        return CutChoice(removed, score, self.budget, self.limit, before, after, **figures)  # type: ignore[arg-type]

    def unmet(self) -> str:
        """Why no cut meets the budget, and what to do."""
        horizon, fixed = self.structure.horizon, self.structure.fixed
        name = type(self.structure.model).__name__
        asked = (
            f"{int(self.limit)} of {several(horizon, 'layer')} are to be kept"
            if self.budget == "blocks"
            else f"at most {self.limit:g} of the {self.budget.replace('_', '-')} is to be kept"
        )
        why = f"; layers {', '.join(map(str, fixed))} cannot be removed" if fixed else ""
        return f"{asked}, which {name} cannot reach by removing layers{why}; give a larger budget"

    def _loses(self, removed: Collection[int]) -> bool:
        trials = cast(Trials, self.trials)
        if trials.samples < FEW:
            return True
        outcome = trials.outcome(removed)
        lost = outcome.lost + self._z * outcome.error
        risen = outcome.risen + self._z * outcome.risen_error
        # A cut whose loss is not a number loses.
        return (self.budget == "accuracy" and lost > self.limit) or not risen <= self._rise

    def _fits(self, removed: Collection[int]) -> bool:
        if self.budget == "blocks":
            return len(removed) == self.most
        if not removed:
            return self.limit >= 1
        measure = self.latencies if self.budget == "latency" else self.multiply_adds
        before, after = measure(removed)
        return before == 0 or after / before <= self.limit
