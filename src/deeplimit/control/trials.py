"""Cuts of one model, tried on the same batches."""

import heapq
import math
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from deeplimit._anatomy import Anatomy
from deeplimit._anatomy.evaluation import begun
from deeplimit._anatomy.inputs import batch_of
from deeplimit.control.batches import blame_inputs, first_part, part, tensors_in
from deeplimit.control.losses import ClassLoss, Figures, SampleLoss, check_losses, joined
from deeplimit.control.verifying import Change, latencies, multiply_adds
from deeplimit.errors import InputError

AGAIN = 8
NEED = "a cut is chosen on at least one sample that counts"

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
            one = first_part(self.structure, self._batch, 1)
            self._multiply_adds[key] = multiply_adds(self._cut(key), one) // batch_of(one)
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
