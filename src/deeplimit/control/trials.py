"""Cuts of one model, tried on the same batches, and what they spend of a budget."""

import heapq
import math
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Iterator
from statistics import NormalDist
from typing import Any, cast

import torch
from torch import Tensor

from deeplimit._anatomy import Anatomy
from deeplimit._anatomy.evaluation import begun
from deeplimit._anatomy.inputs import batch_of
from deeplimit._anatomy.nested import tensors_in
from deeplimit.control.batches import blame_inputs, first_part, part
from deeplimit.control.cropping import Budget, CutChoice, Score
from deeplimit.control.losses import ClassLoss, Figures, SampleLoss, check_losses, joined
from deeplimit.control.verdict import CONFIDENCE, FEW, excludes, most_risen
from deeplimit.control.verifying import Change, latencies, multiply_adds
from deeplimit.errors import InputError, several

AGAIN = 8
NEED = "a cut is chosen on at least one sample that counts"
QUALITY: tuple[Budget, ...] = ("accuracy", "rise")  # of which most layers go; of others fewest

MayGo = Callable[[Collection[int], int], bool]


class Trials:
    """Tries cuts of a model in evaluation mode, without gradients; what is found is kept for later.

    The batches are the same in every pass over the loader. The first, or half of the samples if
    that is less, is what `order` looks at; `samples` others judge, or without `ordering` all.
    """

    def __init__(
        self,
        structure: Anatomy,
        loader: Iterable[Any],
        of: SampleLoss | None = None,
        *,
        shift: bool = False,
        ordering: bool = True,
    ):
        batches = begun(loader)
        if batches is loader:
            raise InputError(
                "the loader can be gone through only once; cuts are tried on the same batches "
                "again and again: give a DataLoader or a list"
            )
        of = of or ClassLoss(None)
        self.structure, self._of = structure, of
        self._loader, self._shift, self.ordering = loader, shift, ordering
        self._targets: list[Tensor] | None = None
        self._rows = 0
        self._changes: dict[frozenset[int], Change] = {}
        self._multiply_adds: dict[frozenset[int], int] = {}
        self._latencies: dict[frozenset[int], tuple[float, float]] = {}
        self._batch, targets = next(of.batches(structure, batches, NEED, shift=shift))
        own = self._run(structure)
        check_losses(own["loss"][0])
        # What puts the layers in order does not judge the cuts that follow from it as well: of
        # hundreds of cuts the ones that suit these samples come first.
        count = batch_of(self._batch)
        rows = max(min(count, self._rows // 2), 1)
        self._first = first_part(structure, self._batch, rows)
        self._first_targets = part(targets, slice(batch_of(self._first)), count)
        self._one = first_part(structure, self._batch, 1)
        self._answers = structure.run(self._first)
        first = of.measured(structure, self._first, self._first_targets, [self._answers])
        used, every = first["loss"].shape[1], own["loss"].shape[1]
        self._judging = slice(used if ordering and used < every else 0, None)
        self._own = self._judged(own)
        self.samples = self._own["loss"].shape[-1]

    def change(self, removed: Collection[int]) -> Change:
        """What a cut does to accuracy and loss, on the samples that judge."""
        key = frozenset(removed)
        if key not in self._changes:
            cut = self._judged(self._run(self._cut(key))) if key else self._own
            self._changes[key] = Change.of(self._own, cut)
        return self._changes[key]

    def multiply_adds(self, removed: Collection[int]) -> int:
        """Of a cut, for one sample."""
        key = frozenset(removed)
        if key not in self._multiply_adds:
            products = multiply_adds(self._cut(key), self._one)
            self._multiply_adds[key] = products // batch_of(self._one)
        return self._multiply_adds[key]

    def latencies(self, removed: Collection[int]) -> tuple[float, float]:
        """Of the model and its cut, for the first batch, as they were measured first."""
        key = frozenset(removed)
        if key not in self._latencies:
            networks = [self.structure, *([self._cut(key)] if key else [])]
            times = latencies([network.run for network in networks], self._batch)
            self._latencies[key] = times[0], times[-1]
        return self._latencies[key]

    def divergence(self, removed: Collection[int]) -> float:
        """The mean KL(softmax z ‖ softmax z′) over the samples that put in order.

        z are of the model, z′ of its cut. Without classes it is the mean of (z − z′)².
        """
        answers = self._cut(removed).run(self._first)
        return self._of.apart(self.structure, self._first_targets, self._answers, answers)

    def order(self, ranked: Iterable[int], may_go: MayGo | None = None) -> Iterator[int]:
        """The layers one by one: next the one whose removal adds the least divergence.

        What a layer adds is measured for all at first, then again for the eight that added least
        when last measured, and for others while that would make one of them the next (lazy greedy,
        Minoux 1978): of at most eight layers the order is the greedy one, of more nearly so. A
        measurement is a forward pass of them. Those in front of `ranked` go first among equals.
        Layers that the model cannot be without, as things stand, are left where they are.
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

    def _cut(self, removed: Collection[int]) -> Anatomy:
        return self.structure.like(self.structure.without(removed)) if removed else self.structure

    def _judged(self, figures: Figures) -> Figures:
        """The figures that are judged: a loss of each sample, and whether the answer is right."""
        judged = figures.keys() & {"loss", "right"}
        return {name: figures[name][0, self._judging] for name in judged}

    def _run(self, structure: Anatomy) -> Figures:
        """The figures of all samples, which are the same in every pass."""
        figures, targets, rows = [], [], 0
        for x, y in self._of.batches(structure, self._loader, NEED, shift=self._shift):
            z = structure.run(x)
            blame_inputs(x, z)
            figures.append(self._of.measured(structure, x, y, [z]))
            targets += [t.flatten().double().nan_to_num().cpu() for t in tensors_in(y)]
            rows += batch_of(x)
        if self._targets is None:
            self._targets, self._rows = targets, rows
        elif not torch.equal(torch.cat(self._targets), torch.cat(targets)):
            raise InputError(
                "the loader gives its samples in another order every time; give one that does not "
                "shuffle"
            )
        return joined(figures)


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
