"""What held-out data say of a change of network: kept, unresolved, lost, or nothing learnt.

Two networks answer the same n samples: b of them are right before the change only, c after it only.
Of the accuracy lost, Δ = P(right before only) − P(right after only), the score test of Tango
(Statistics in Medicine 17, 891–908, 1998) gives bounds, also where no sample differs. Of a loss
that knows no classes it is the mean rise, with bounds by Student's t of the samples' own rises.
"""

import math
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Literal

from torch import Tensor

from deeplimit._anatomy.checks import check_number
from deeplimit.errors import InputError, several
from deeplimit.records import Record

CONFIDENCE = 0.95
Z = NormalDist().inv_cdf(CONFIDENCE)  # one-sided: 1.645
MANY = 10**9  # samples that nobody has
FEW = 11  # of fewer not even a loss of a fifth can be excluded: their standard errors mean nothing

LOSS_TOLERANCE = 0.01  # of the range of a loss: by how much it may rise where nobody says
TOO_MUCH = 0.5  # of all samples: nobody means that, half a point was meant

Word = Literal["kept", "unresolved", "lost", "nothing learnt"]


@dataclass(frozen=True)
class Verdict(Record):
    """The judgement of held-out data on a change of network, at 95 %, paired by sample.

        >>> verdict = verify_crop(model, crop(model, 2), loader).verdict
        >>> verdict.at_least <= verdict.at_most
        True

    Attributes:
        word: "kept": they exclude that more accuracy was lost than the tolerance; "lost": they show
            that more was; "unresolved": they do neither; "nothing learnt": they do not show that
            the network before was better than the best constant answer: of classes always the
            largest one. It is not said where no constant answer is known.
        tolerance: the accuracy that may be lost, a fraction. Where the loss knows no classes: by
            how much its mean may rise.
        samples: number of samples.
        lost, gained: how many of them are right before only, and after only; of how many the loss
            rose, and fell.
        at_least, at_most: 95 % bounds, one-sided each, of the accuracy lost, fractions, or of the
            rise; where they are negative accuracy was gained.
        accuracy: of the network before, a fraction; NaN where there is none.
        largest_class: the share of the largest class among the samples, a fraction, or NaN.
        needed: how many samples would resolve it, if they differ as these do; None where it is
            resolved, or where no number would.
        loss: the mean loss of the network before, where that is what is judged; else None.
        constant: that of the best constant answer; None where it is not known.
    """

    word: Word
    tolerance: float
    samples: int
    lost: int
    gained: int
    at_least: float
    at_most: float
    accuracy: float
    largest_class: float
    needed: int | None = None
    loss: float | None = None
    constant: float | None = None

    def __str__(self) -> str:
        """One sentence: the word, what it rests on, and what to do."""
        on = several(self.samples, "sample")
        limits = (self.tolerance, self.at_least, self.at_most)
        if self.loss is None:
            # Points, with two digits behind the point at most: 1 point, 0.75 points.
            asked, least, most = (several(round(100 * v, 2), "point") for v in limits)
            what, of = "a loss of more than", " of accuracy"
            own = f"is right for {100 * self.accuracy:.2f} %"
            other = f"always answering the largest class, {100 * self.largest_class:.2f} %"
        else:
            asked, least, most = (f"{v:.4g}" for v in limits)
            what, of = "a rise of the loss by more than", ""
            own = f"has a mean loss of {self.loss:.4g}"
            other = f"that of a constant answer, {self.constant or 0.0:.4g}"
        more = f"about {self.needed:,} samples would" if self.needed else "no number of them would"
        return {
            "nothing learnt": f"Nothing learnt: on {on} the network before {own}, which is not "
            f"shown to be better than {other}; train it first",
            "kept": f"Kept: {on} exclude {what} {asked}{of}; it is at most {most} (95 %)",
            "lost": f"Lost: {on} show {what} {asked}{of}, from {least} to {most} (95 %); heal it, "
            "for longer if it was, or cut less",
            "unresolved": f"Unresolved: {on} exclude {what} {most}{of} (95 %), not one of more "
            f"than {asked}; {more} resolve it",
        }[self.word]


def unchanged(verdict: Verdict) -> Verdict:
    """The verdict where both networks are one: that nothing is lost is certain then."""
    if verdict.word == "nothing learnt":
        return verdict
    return replace(verdict, word="kept", at_least=0.0, at_most=0.0, needed=None)


def judge(
    *,
    tolerance: float,
    samples: int,
    lost: int,
    gained: int,
    right: int,
    largest: int,
    right_in_largest: int,
    effect: float = 1.0,
) -> Verdict:
    """The verdict on counts of two networks' answers, of which b are `lost` and c `gained`.

    The network before is `right` so often, and so often for the samples of the `largest` class. As
    much as n samples, n / `effect` independent ones tell.
    """
    counts = (samples / effect, lost / effect, gained / effect)
    at_least, at_most = loss_bounds(*counts)
    word, needed = word_of(at_least, at_most, tolerance), None
    # McNemar's score test of the network against the constant answer.
    ahead, behind = right - right_in_largest, largest - right_in_largest
    if ahead - behind <= Z * math.sqrt(ahead + behind):
        word = "nothing learnt"
    elif word == "unresolved":
        needed = _needed(tolerance, *counts, effect)
    return Verdict(
        word=word,
        tolerance=tolerance,
        samples=samples,
        lost=lost,
        gained=gained,
        at_least=at_least,
        at_most=at_most,
        accuracy=right / samples,
        largest_class=largest / samples,
        needed=needed,
    )


def judge_answers(
    right: Tensor, targets: Tensor, tolerance: float, groups: Tensor | None = None
) -> Verdict:
    """The verdict on answers of two networks, [2, n], right or not, to samples of these classes.

    Tokens of one text are no independent samples. Where samples come in groups, [n], the verdict
    rests on as many independent ones as would leave the accuracy lost as uncertain as those do.
    """
    before, after = right
    largest = targets == targets.bincount().argmax()
    lost, gained = before & ~after, after & ~before
    return judge(
        tolerance=tolerance,
        samples=len(targets),
        lost=int(lost.sum()),
        gained=int(gained.sum()),
        right=int(before.sum()),
        largest=int(largest.sum()),
        right_in_largest=int((before & largest).sum()),
        effect=1.0 if groups is None else _effect(lost.double() - gained.double(), groups),
    )


def _effect(lost: Tensor, groups: Tensor) -> float:
    """The variance of the mean of `lost` by groups over that by samples, at least 1."""
    if not bool(lost.any()):
        return 1.0
    mean, sizes = lost.mean(), groups.bincount()
    count = int(sizes.count_nonzero())
    alone = float((lost - mean).square().sum())
    if count == 1 or alone <= 0:
        return len(lost) / count
    together = float((groups.bincount(lost) - mean * sizes).square().sum())
    return max(together / alone * count / (count - 1), 1.0)


def judge_losses(
    before: Tensor, after: Tensor, constant: Tensor | None = None, tolerance: float | None = None
) -> Verdict:
    """The verdict on two networks' losses [n] of the same samples, beside a constant answer's.

    By default the mean may rise by 1 % of `range_of` it.
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
    ahead, its_error = (1.0, 0.0) if constant is None else mean_and_error(constant - before)
    if not ahead > quantile(samples) * its_error:  # NaN is not ahead either
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


def quantile(samples: int, z: float = Z) -> float:
    """By how many standard errors, of so many samples, a mean may be off: one-sided, at 95 %.

    Student's t in powers of 1/(n − 1), right to three digits from 11 samples on, and the factor
    of the standard deviation without correction; for another quantile z of the normal likewise.
    """
    free = max(samples - 1, 1)
    t = z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
    return t * math.sqrt(samples / free)


def range_of(own: float, constant: float | None) -> float:
    """The range of a loss: from a network's mean to a constant answer's, 0 if that is no worse.

    Where no constant answer is known it is the size of the mean.
    """
    return abs(own) if constant is None else max(constant - own, 0.0)


def word_of(at_least: float, at_most: float, tolerance: float) -> Word:
    """The word for bounds beside a tolerance."""
    if at_most <= tolerance:
        return "kept"
    return "lost" if at_least > tolerance else "unresolved"


def loss_bounds(
    samples: float | int, lost: float | int, gained: float | int
) -> tuple[float, float]:
    """The lower and the upper 95 % bound of Δ, one-sided each, by Tango's score test.

    They are the Δ at which (b − c − nΔ)² = z²·n(2q + Δ(1 − Δ)), with q the largest-likelihood
    estimate of P(right after only) given Δ. Where no sample differs the upper one is z²/(n + z²):
    0.75 points at 359 samples. The counts need not be whole.
    """
    return -_upper(samples, gained, lost), _upper(samples, lost, gained)


def _gained(n: float | int, b: float | int, c: float | int, delta: float) -> float:
    """The largest-likelihood estimate q of P(right after only) where Δ is `delta`."""
    first = (2 * n - b + c) * delta - b - c
    return (math.sqrt(first**2 + 8 * n * c * delta * (1 - delta)) - first) / (4 * n)


def _upper(n: float | int, b: float | int, c: float | int) -> float:
    """The largest Δ that the test does not exclude."""

    def excluded(delta: float) -> bool:
        variance = n * (2 * _gained(n, b, c, delta) + delta * (1 - delta))
        return n * delta - (b - c) >= Z * math.sqrt(max(variance, 0.0))

    inside, outside = max((b - c) / n, -1.0), 1.0
    while outside - inside > 1e-12:
        middle = (inside + outside) / 2
        inside, outside = (inside, middle) if excluded(middle) else (middle, outside)
    return outside


def excludes(
    samples: int, lost: int, gained: int, tolerance: float, confidence: float = CONFIDENCE
) -> bool:
    """Tests at level α = 1 − confidence if no more than the tolerance δ of accuracy is lost.

    Tango's score with its corrections for continuity and skewness (one term of Edgeworth's series):

        nδ − (b − c) − κ ≥ z_α √(nσ²),    κ = max(0, ½ − (z_α² − 1)/6 · μ₃/σ²),

    with σ² = 2q + δ(1 − δ) and μ₃ = δ(1 − 6q − 3δ + 2δ²) the variance and third moment of a
    sample's loss. Without κ the level of 5 % is exceeded, by up to 6.7 % where 540 samples are to
    tell half a point; with it, at no q of a fine grid was the exact one, 11 to 5,000 samples.
    """
    z, q = NormalDist().inv_cdf(confidence), max(_gained(samples, lost, gained, tolerance), 0.0)
    variance = 2 * q + tolerance * (1 - tolerance)
    if variance <= 0:  # nothing may be lost, and nothing differs: no number of samples tells that
        return False
    below = samples * tolerance - (lost - gained) - _correction(z, tolerance, q)
    return below >= z * math.sqrt(samples * variance)


def _correction(z: float, delta: float, q: float) -> float:
    skewness = delta * (1 - 6 * q - 3 * delta + 2 * delta**2) / (2 * q + delta * (1 - delta))
    return max(0.5 - (z**2 - 1) / 6 * skewness, 0.0)


def most_risen(
    mean: float, error: float, skewness: float, samples: int, confidence: float = CONFIDENCE
) -> float:
    """The upper bound of a mean whose samples' skewness γ, mean and standard error are given.

    Hall's transformation (J. R. Stat. Soc. B 54, 221–228, 1992) takes the skewness out of Student's
    t, whose one-sided bound is off by O(γ/√n) otherwise: what few samples lose much lies above it
    too often. The error that is left is O(1/n). No bound holds for every law of an unbounded loss.

        x̄ − s·(3/γ)·( ∛(1 − γ(t_α/√n + γ/(6n))) − 1 )
    """
    t = quantile(samples, NormalDist().inv_cdf(confidence))
    if abs(skewness) < 1e-6:  # the limit
        return mean + t * error
    root = math.cbrt(1 - skewness * (t / math.sqrt(samples) + skewness / (6 * samples)))
    return mean + math.sqrt(samples) * error * 3 / skewness * (1 - root)


def samples_to_exclude(tolerance: float | int, confidence: float | None = None) -> int | None:
    """The least number of samples that exclude a loss above the tolerance: none of them differs.

    By Tango's bound, or with a confidence by `excludes`. None for a tolerance of 0, which no number
    can exclude.
    """
    if tolerance <= 0:
        return None
    z = Z if confidence is None else NormalDist().inv_cdf(confidence)
    more = 0.0 if confidence is None else _correction(z, tolerance, 0.0)
    spread = z * math.sqrt(1 - tolerance)
    return math.ceil(((spread + math.sqrt(spread**2 + 4 * more)) / 2) ** 2 / tolerance)


def samples_needed(
    tolerance: float | int, samples: int, confidence: float | None = None
) -> int | None:
    """The samples that could tell a loss above the tolerance; None where there are so many.

    With fewer than `FEW` no cut is chosen, whatever the tolerance.
    """
    least = max(samples_to_exclude(tolerance, confidence) or 0, FEW)
    return least if least > samples else None


def _needed(tolerance: float, n: float, b: float, c: float, effect: float) -> int | None:
    """Samples that would resolve it, to two digits, if as large a part of them differs."""

    def resolved(samples: float) -> bool:
        more = samples / effect
        return word_of(*loss_bounds(more, b * more / n, c * more / n), tolerance) != "unresolved"

    least, most = n * effect, float(MANY)
    if not resolved(most):
        return None
    while most - least > 0.01 * least:
        middle = math.sqrt(least * most)
        least, most = (least, middle) if resolved(middle) else (middle, most)
    return rounded_up(most)


def rounded_up(number: float | int) -> int:
    """Up, to two digits."""
    digits = int(10 ** max(math.floor(math.log10(number)) - 1, 0))
    return math.ceil(number / digits) * digits


def check_tolerance(accuracy: float) -> float:
    """The fraction of accuracy that may be lost, if it is one, and not percentage points."""
    accuracy = check_number("accuracy", accuracy, "a fraction, such as 0.005", lambda _: True)
    if not 0 <= accuracy < TOO_MUCH:
        raise InputError(
            f"{several(100 * accuracy, 'point')} of accuracy may be lost; expected from 0 to less "
            f"than {100 * TOO_MUCH:g} points: in Python a fraction, 0.005 for half a point"
        )
    return accuracy


def check_rise(rise: float) -> float:
    """By how much a mean loss may rise, if it is a number ≥ 0."""
    expected = "a number ≥ 0, in units of the loss"
    return check_number("the rise of the loss that is allowed", rise, expected, lambda r: r >= 0)
