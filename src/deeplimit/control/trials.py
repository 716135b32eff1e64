"""Cuts of one model, each made for a moment and tried on the same batches."""

import heapq
import math
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deeplimit._anatomy import Anatomy
from deeplimit._anatomy.checks import fitted
from deeplimit._anatomy.evaluation import Inputs, begun, first_samples
from deeplimit.control.batches import aligned_batches, blame_inputs
from deeplimit.control.soft_cross_entropy import SoftCrossEntropy
from deeplimit.control.token_losses import CountedTokens, drop_ignored
from deeplimit.errors import InputError

AGAIN = 8
NEED = "a cut is chosen on at least one sample that counts"


MayGo = Callable[[Collection[int], int], bool]


def _any(gone: Collection[int], n: int) -> bool:
    return True


@dataclass(frozen=True)
class Outcome:
    """Accuracy of a cut, what it loses of it, and by how much the loss rises.

    The changes come with their standard errors, paired by sample.
    """

    accuracy: float
    lost: float
    error: float
    risen: float
    risen_error: float


class Trials:
    """Tries cuts of a model in evaluation mode, without gradients; an outcome is kept for later.

    Args:
        structure: of the model.
        loader: batches (x, y), the same in every pass over it.
        loss: what is measured beside the accuracy; None: nothing.
        shift: targets of tokens are the inputs themselves: each predicts the next.

    Attributes:
        batch: the inputs of the first batch.
        samples: number of those that judge: all but the ones that `order` looks at, the first
            batch, or half of the samples if that is less.
        accuracy: of the model on them.

    Raises:
        InputError: a loader that can be gone through only once, that is empty, that gives other
            targets in a later pass, or in which nothing counts; targets that are no classes or not
            aligned, inputs that are not finite.
    """

    def __init__(
        self,
        structure: Anatomy,
        loader: Iterable[tuple[Inputs, Tensor]],
        loss: SoftCrossEntropy | None = None,
        shift: bool = False,
    ):
        batches = begun(loader)
        if batches is loader:
            raise InputError(
                "the loader can be gone through only once; cuts are tried on the same batches "
                "again and again: give a DataLoader or a list"
            )
        self.structure, self._loss = structure, loss
        self._loader, self._shift = loader, shift
        self._targets: list[Tensor] | None = None
        self._rows = 0
        self._outcomes: dict[frozenset[int], Outcome] = {}
        self.batch, targets = next(aligned_batches(structure, batches, shift, NEED))
        own = self._run(structure)
        # What puts the layers in order does not judge the cuts that follow from it as well: of
        # hundreds of cuts the ones that suit these samples come first.
        rows = max(min(len(targets), self._rows // 2), 1)
        self._first, self._first_targets = first_samples(self.batch, rows), targets[:rows]
        self._answers = structure.run(self._first)
        parts = self._parts(self._answers, self._first_targets)
        used = sum(len(part[-1]) for part in parts)
        self._judging = slice(used if used < len(own[0]) else 0, None)
        self._hits, self._losses = (figure[self._judging] for figure in own)
        self.samples = len(self._hits)
        self.accuracy = float(self._hits.mean())

    def cut(self, removed: Iterable[int]) -> nn.Module:
        """The model less these layers."""
        return self.structure.without(removed)

    def outcome(self, removed: Collection[int]) -> Outcome:
        """What a cut does to accuracy and loss, on the samples that judge."""
        key = frozenset(removed)
        if key not in self._outcomes:
            hits, losses = self._hits, self._losses
            if key:
                hits, losses = (
                    x[self._judging] for x in self._run(self.structure.like(self.cut(key)))
                )
            figures = []
            for change in (self._hits - hits, losses - self._losses):
                error = float(change.std(correction=0)) / math.sqrt(self.samples)
                figures += [float(change.mean()), error]
            self._outcomes[key] = Outcome(float(hits.mean()), *figures)
        return self._outcomes[key]

    def divergence(self, removed: Collection[int]) -> float:
        """Mean KL(softmax z ‖ softmax z′) of what puts in order: z of the model, z′ of its cut."""
        answers = self.structure.like(self.cut(removed)).run(self._first)
        total, count = 0.0, 0
        for z, w, y in self._parts(self._answers, answers, self._first_targets):
            own, other = z.double().log_softmax(-1), w.double().log_softmax(-1)
            total += float(F.kl_div(other, own, reduction="sum", log_target=True))
            count += len(y)
        return total / max(count, 1)

    def order(self, ranked: Iterable[int], may_go: MayGo = _any) -> Iterator[int]:
        """The layers one by one: next the one whose removal adds the least divergence.

        What a layer adds is measured for all at first, then again for the eight that added least
        when last measured, and for others while that would make one of them the next (lazy greedy,
        Minoux 1978): of at most eight layers the order is the greedy one, of more nearly so. A
        measurement is a forward pass of them. Layers that the model cannot be without,
        as things stand, are left where they are.

        Args:
            ranked: the layers; those in front go first among equals.
            may_go: whether a layer may go after others.
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
                if not may_go(gone, n):
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

    def _run(self, structure: Anatomy) -> tuple[Tensor, Tensor]:
        """Whether each sample is right, 0 or 1, and its loss, over the whole loader."""
        none = torch.zeros(0, dtype=torch.float64)
        hits, losses, targets, rows = [none], [none], [], 0
        for x, y in aligned_batches(structure, self._loader, self._shift, NEED):
            z = structure.run(x)
            blame_inputs(x, z)
            y = fitted(z, y)
            for part, same in self._parts(z, y):
                hits.append((part.argmax(-1) == same).double().cpu())
                if self._loss is not None:
                    losses.append(self._loss(part.double(), same).cpu())
            targets.append(y.flatten().cpu())
            rows += len(y)
        if self._targets is None:
            self._targets, self._rows = targets, rows
        elif not torch.equal(torch.cat(self._targets), torch.cat(targets)):
            raise InputError(
                "the loader gives its samples in another order every time; give one that does not "
                "shuffle"
            )
        if self._loss is None:
            losses = [torch.zeros(sum(map(len, hits)), dtype=torch.float64)]
        return torch.cat(hits), torch.cat(losses)

    def _parts(self, *values: Tensor) -> Iterable[tuple[Tensor, ...]]:
        """Logits and targets as they are; of tokens, chunks of those that count."""
        *logits, y = values
        if not self.structure.tokens:
            return [drop_ignored(y, *logits)]
        return CountedTokens(y, logits[0].shape[-1]).chunks(*logits)
