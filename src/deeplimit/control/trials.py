"""Cuts of one model, each made for a moment and tried on the same batches."""

import heapq
import math
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deeplimit._anatomy import Anatomy
from deeplimit._anatomy.evaluation import begun
from deeplimit._anatomy.inputs import batch_of
from deeplimit.control.batches import blame_inputs, first_part, part, tensors_in
from deeplimit.control.losses import ClassLoss, SampleLoss
from deeplimit.control.paired import mean_and_error
from deeplimit.errors import InputError

AGAIN = 8
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
