"""Cuts of one model, each made for a moment and tried on the same batches."""

import heapq
import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deeplimit.control.alignment import aligned_batches
from deeplimit.control.finite import blame_inputs
from deeplimit.control.token_losses import CountedTokens, labelled
from deeplimit.errors import InputError
from deeplimit.network.anatomy import Anatomy, anatomy
from deeplimit.network.modes import Inputs, begun
from deeplimit.network.targets import fitted

AGAIN = 8


@dataclass(frozen=True)
class Outcome:
    """Accuracy of a cut on all batches, its change, and the change's paired standard error."""

    accuracy: float
    change: float
    error: float


class Trials:
    """Tries cuts of a model in evaluation mode, without gradients; an outcome is kept for later.

    Args:
        structure: of the model.
        loader: batches (x, y), the same in every pass over it.
        shift: targets of tokens are the inputs themselves: each predicts the next.

    Raises:
        InputError: a loader that can be gone through only once, that is empty, that gives other
            targets in a later pass, or in which nothing counts; targets that are no classes or not
            aligned, inputs that are not finite.
    """

    def __init__(
        self, structure: Anatomy, loader: Iterable[tuple[Inputs, Tensor]], shift: bool = False
    ):
        batches = begun(loader)
        if batches is loader:
            raise InputError(
                "the loader can be gone through only once; cuts are tried on the same batches "
                "again and again: give a DataLoader or a list"
            )
        self.structure = structure
        self._loader, self._shift = loader, shift
        self._targets: list[Tensor] | None = None
        self._outcomes: dict[frozenset[int], Outcome] = {}
        first = next(batches, None)
        if first is None:
            raise InputError("the loader gave no batch; a cut is chosen on at least one sample")
        ((self.batch, self._batch_targets),) = aligned_batches(structure, [first], shift)
        self._answers = structure.run(self.batch)
        self._hits = self._run(structure)
        self.samples = len(self._hits)
        if self.samples == 0:
            raise InputError("every target is −100; a cut is chosen on at least one token")
        self.accuracy = float(self._hits.mean())

    def cut(self, removed: Iterable[int]) -> nn.Module:
        """The model less these layers."""
        return self.structure.without(removed)

    def outcome(self, removed: Collection[int]) -> Outcome:
        """What a cut does to the accuracy on all batches."""
        key = frozenset(removed)
        if key not in self._outcomes:
            hits = self._run(anatomy(self.cut(key))) if key else self._hits
            change = hits - self._hits
            error = float(change.std(correction=0)) / math.sqrt(self.samples)
            self._outcomes[key] = Outcome(float(hits.mean()), float(change.mean()), error)
        return self._outcomes[key]

    def divergence(self, removed: Collection[int]) -> float:
        """Mean KL(softmax z ‖ softmax z′) of the first batch: z of the model, z′ of its cut."""
        answers = anatomy(self.cut(removed)).run(self.batch)
        total, count = 0.0, 0
        for z, w, y in self._parts(self._answers, answers, self._batch_targets):
            own, other = z.double().log_softmax(-1), w.double().log_softmax(-1)
            total += float(F.kl_div(other, own, reduction="sum", log_target=True))
            count += len(y)
        return total / max(count, 1)

    def order(self, ranked: Iterable[int]) -> Iterator[int]:
        """The layers one by one: next the one whose removal adds the least divergence.

        What a layer adds is measured for all at first, then again for the eight that added least
        when last measured, and for others while that would make one of them the next (lazy greedy,
        Minoux 1978): of at most eight layers the order is the greedy one, of more nearly so. A
        measurement is a forward pass of the first batch. Layers that the model cannot be without,
        as things stand, are left where they are.

        Args:
            ranked: the layers; those in front go first among equals.
        """
        gone: list[int] = []
        spent = 0.0
        # What it adds, its rank, the layer, and how many were gone when that was measured.
        queue = [(-math.inf, rank, n, -1) for rank, n in enumerate(ranked)]
        while queue:
            due = [heapq.heappop(queue) for _ in range(min(AGAIN, len(queue)))]
            while due or (queue and queue[0][3] < len(gone)):
                _, rank, n, _ = due.pop() if due else heapq.heappop(queue)
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

    def _run(self, structure: Anatomy) -> Tensor:
        """Whether each sample is right, 0 or 1, over the whole loader."""
        hits, targets = [torch.zeros(0, dtype=torch.float64)], []
        for x, y in aligned_batches(structure, self._loader, self._shift):
            z = structure.run(x)
            blame_inputs(x, z)
            y = fitted(z, y)
            for part, same in self._parts(z, y):
                hits.append((part.argmax(-1) == same).double().cpu())
            targets.append(y.flatten().cpu())
        if self._targets is None:
            self._targets = targets
        elif not torch.equal(torch.cat(self._targets), torch.cat(targets)):
            raise InputError(
                "the loader gives its samples in another order every time; give one that does not "
                "shuffle"
            )
        return torch.cat(hits)

    def _parts(self, *values: Tensor) -> Iterable[tuple[Tensor, ...]]:
        """Logits and targets as they are; of tokens, chunks of those that count."""
        *logits, y = values
        if not self.structure.tokens:
            return [labelled(y, *logits)]
        return CountedTokens(y, logits[0].shape[-1]).chunks(*logits)
