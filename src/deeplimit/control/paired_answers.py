"""The answers of two networks to the same samples, counted batch by batch."""

import torch
from torch import Tensor

from deeplimit.control.verdict import Verdict, judge


class PairedAnswers:
    """Counts for which samples two networks are right, and says what that means.

    Tokens of one text are no independent samples. Where samples come in groups the verdict rests
    on as many independent ones as would leave the accuracy lost as uncertain as the groups do.
    """

    def __init__(self) -> None:
        self.samples = 0
        self.right, self.lost, self.gained = 0, 0, 0  # before; before only; after only
        self._classes = torch.zeros(2, 0, dtype=torch.long)  # samples; those right before
        self._groups = torch.zeros(4, dtype=torch.double)  # Σ1, Σm², Σms, Σs²: m samples lose s

    def add(
        self, before: Tensor, after: Tensor, targets: Tensor, groups: Tensor | None = None
    ) -> None:
        """Counts a batch.

        Args:
            before: whether each sample is right before the change, [S].
            after: the same after it.
            targets: the classes, [S].
            groups: the number of each sample's group within this batch, [S].
        """
        only_before, only_after = before & ~after, after & ~before
        self.samples += len(targets)
        right = torch.stack([x.sum() for x in (before, only_before, only_after)]).tolist()
        self.right, self.lost, self.gained = (
            a + b for a, b in zip((self.right, self.lost, self.gained), right, strict=True)
        )
        counts = torch.stack(_counted(len(self._classes[0]), targets, targets[before])).cpu()
        counts[:, : len(self._classes[0])] += self._classes
        self._classes = counts
        if groups is not None:
            size, lost, gained = _counted(0, groups, groups[only_before], groups[only_after])
            change = lost - gained
            moments = (size.sign(), size**2, size * change, change**2)
            self._groups += torch.stack([x.sum() for x in moments]).double().cpu()

    def accuracies(self) -> tuple[float, float, float]:
        """Before and after, and the standard error of the change, paired by sample."""
        count, change = self.samples, (self.gained - self.lost) / self.samples
        spread = max((self.gained + self.lost) / count - change**2, 0)
        after = (self.right - self.lost + self.gained) / count
        return self.right / count, after, (spread / count) ** 0.5

    def verdict(self, tolerance: float) -> Verdict:
        """What all batches say; `tolerance` is the accuracy that may be lost, a fraction."""
        largest = int(self._classes[0].argmax())
        of_largest, right_in_largest = self._classes[:, largest].tolist()
        return judge(
            tolerance=tolerance,
            samples=self.samples,
            lost=self.lost,
            gained=self.gained,
            right=self.right,
            largest=of_largest,
            right_in_largest=right_in_largest,
            effect=self._effect(),
        )

    def _effect(self) -> float:
        """The variance of the accuracy lost by groups over that by samples, at least 1."""
        count, sizes, products, squares = self._groups.tolist()
        if count == 0 or self.lost + self.gained == 0:
            return 1.0
        mean = (self.lost - self.gained) / self.samples
        alone = self.lost + self.gained - self.samples * mean**2
        if count == 1 or alone <= 0:
            return self.samples / max(count, 1)
        together = squares - 2 * mean * products + mean**2 * sizes
        return max(together / alone * count / (count - 1), 1.0)


def _counted(least: int, *classes: Tensor) -> list[Tensor]:
    """How many of each number there are in each of the tensors, in vectors of one length."""
    size = max([least, *(int(x.max()) + 1 for x in classes if len(x))])
    return [x.bincount(minlength=size) for x in classes]
