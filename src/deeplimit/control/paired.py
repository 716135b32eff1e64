"""Two networks on the same samples: answers counted batch by batch, losses compared."""

import math

import torch
from torch import Tensor

from deeplimit.control.verdict import (
    FEW,
    LOSS_TOLERANCE,
    MANY,
    Verdict,
    Z,
    judge,
    range_of,
    rounded_up,
    word_of,
)


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
        count, sizes, products, squares = map(float, self._groups.tolist())
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


def judge_losses(
    before: Tensor, after: Tensor, constant: Tensor | None = None, tolerance: float | None = None
) -> Verdict:
    """The verdict on two networks' losses of the same samples.

    Args:
        before: the losses of the network before the change, [n].
        after: those of the one after it.
        constant: those of the best constant answer, where one is known.
        tolerance: by how much the mean may rise; by default 1 % of its range, which reaches from
            the mean before to that of the constant answer (`range_of`).
    """
    rise, samples = after - before, len(before)
    best = None if constant is None else float(constant.mean())
    own = float(before.mean())
    if tolerance is None:
        tolerance = LOSS_TOLERANCE * range_of(own, best)
    mean, error = mean_and_error(rise)
    spread, alike = quantile(samples) * error, not bool(rise.any())
    if alike:  # certainty would be too much to say: as where no answer differs
        spread = Z**2 / (samples + Z**2) * range_of(own, best)
    word, needed = word_of(mean - spread, mean + spread, tolerance), None
    learnt = True
    if constant is not None:
        ahead, its_error = mean_and_error(constant - before)
        learnt = ahead > quantile(samples) * its_error
    if not learnt:
        word = "nothing learnt"
    elif samples < FEW:
        word = "unresolved"
    if word == "unresolved":
        gap = abs(tolerance - mean)
        apart = spread / gap if gap > 0 else math.inf
        more = samples * (apart if alike else apart**2)
        needed = rounded_up(max(more, FEW)) if more <= MANY else None
    return Verdict(
        word=word,
        tolerance=tolerance,
        samples=samples,
        lost=int((rise > 0).sum()),
        gained=int((rise < 0).sum()),
        at_least=mean - spread,
        at_most=mean + spread,
        accuracy=math.nan,
        largest_class=math.nan,
        needed=needed,
        loss=own,
        constant=best,
    )


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """The mean of samples and its standard error; NaN of none."""
    return float(values.mean()), float(values.std(correction=0)) / math.sqrt(max(len(values), 1))


def quantile(samples: int) -> float:
    """By how many standard errors, of so many samples, a mean may be off: one-sided, at 95 %.

    Student's t in powers of 1/(n − 1), right to three digits from 11 samples on, and the factor
    of the standard deviation without correction.
    """
    free = max(samples - 1, 1)
    t = Z + (Z**3 + Z) / (4 * free) + (5 * Z**5 + 16 * Z**3 + 3 * Z) / (96 * free**2)
    return t * math.sqrt(samples / free)
