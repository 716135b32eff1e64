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

from deeplimit._anatomy.checks import check_number
from deeplimit.errors import InputError, several
from deeplimit.tables import Shown

CONFIDENCE = 0.95
Z = NormalDist().inv_cdf(CONFIDENCE)  # one-sided: 1.645
MANY = 10**9  # samples that nobody has
FEW = 11  # of fewer not even a loss of a fifth can be excluded: their standard errors mean nothing

LOSS_TOLERANCE = 0.01  # of the range of a loss: by how much it may rise where nobody says
TOO_MUCH = 0.5  # of all samples: nobody means that, half a point was meant

Word = Literal["kept", "unresolved", "lost", "nothing learnt"]


@dataclass(frozen=True)
class Verdict(Shown):
    """What held-out data say of a change of network, at 95 %, paired by sample.

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
        asked, least, most = map(self._amount, (self.tolerance, self.at_least, self.at_most))
        on = several(self.samples, "sample")
        what = "a loss of more than" if self.loss is None else "a rise of the loss by more than"
        of = " of accuracy" if self.loss is None else ""
        if self.word == "nothing learnt" and self.loss is not None:
            return (
                f"Nothing learnt: on {on} the network before has a mean loss of {self.loss:.4g}, "
                f"which is not shown to be better than that of a constant answer, "
                f"{self.constant:.4g}; train it first"
            )
        if self.word == "nothing learnt":
            return (
                f"Nothing learnt: on {on} the network before is right for "
                f"{100 * self.accuracy:.2f} %, which is not shown to be better than always "
                f"answering the largest class, {100 * self.largest_class:.2f} %; train it first"
            )
        if self.word == "kept":
            return f"Kept: {on} exclude {what} {asked}{of}; it is at most {most} (95 %)"
        if self.word == "lost":
            return (
                f"Lost: {on} show {what} {asked}{of}, from {least} to {most} (95 %); heal it, for "
                "longer if it was, or cut less"
            )
        more = f"about {self.needed:,} samples would" if self.needed else "no number of them would"
        return (
            f"Unresolved: {on} exclude {what} {most}{of} (95 %), not one of more than {asked}; "
            f"{more} resolve it"
        )

    def _amount(self, value: float) -> str:
        return _points(value) if self.loss is None else f"{value:.4g}"


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
    """The verdict on two networks' answers to the same samples.

    Args:
        tolerance: the accuracy that may be lost, a fraction.
        samples: n.
        lost: b.
        gained: c.
        right: samples for which the network before is right.
        largest: samples of the largest class.
        right_in_largest: those of them for which the network before is right.
        effect: n over the number of independent samples that tell as much; above 1 for tokens.
    """
    counts = (samples / effect, lost / effect, gained / effect)
    at_least, at_most = loss_bounds(*counts)
    needed = None
    # McNemar's score test of the network against the constant answer.
    ahead, behind = right - right_in_largest, largest - right_in_largest
    if ahead - behind <= Z * math.sqrt(ahead + behind):
        word: Word = "nothing learnt"
    elif (word := word_of(at_least, at_most, tolerance)) == "unresolved":
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


def range_of(own: float, constant: float | None) -> float:
    """The range of a loss: from a network's mean to a constant answer's, 0 if that is no worse.

    Where no constant answer is known it is the size of the mean.
    """
    return abs(own) if constant is None else max(constant - own, 0.0)


def word_of(at_least: float, at_most: float, tolerance: float) -> Word:
    """What bounds say of a tolerance."""
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


def samples_to_exclude(tolerance: float | int) -> int | None:
    """The least number of samples that exclude a loss above the tolerance: none of them differs.

    None for a tolerance of 0, which no number can exclude.
    """
    return math.ceil(Z**2 * (1 - tolerance) / tolerance) if tolerance > 0 else None


def samples_needed(tolerance: float | int, samples: int) -> int | None:
    """How many samples could tell a loss above the tolerance; None where there are so many.

    With fewer than `FEW` no cut is chosen, whatever the tolerance.
    """
    least = max(samples_to_exclude(tolerance) or 0, FEW)
    return least if least > samples else None


def _upper(n: float | int, b: float | int, c: float | int) -> float:
    """The largest Δ that the test does not exclude."""

    def excluded(delta: float) -> bool:
        first = (2 * n - b + c) * delta - b - c
        q = (math.sqrt(first**2 + 8 * n * c * delta * (1 - delta)) - first) / (4 * n)
        variance = n * (2 * q + delta * (1 - delta))
        return n * delta - (b - c) >= Z * math.sqrt(max(variance, 0.0))

    inside, outside = max((b - c) / n, -1.0), 1.0
    while outside - inside > 1e-12:
        middle = (inside + outside) / 2
        inside, outside = (inside, middle) if excluded(middle) else (middle, outside)
    return outside


def _needed(tolerance: float, n: float, b: float, c: float, effect: float) -> int | None:
    """Samples that would resolve it, to two digits, if as large a part of them differs."""

    def resolved(samples: float) -> bool:
        more = samples / effect
        at_least, at_most = loss_bounds(more, b * more / n, c * more / n)
        return at_most <= tolerance or at_least > tolerance

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


def _points(fraction: float) -> str:
    """A fraction in points, with two digits behind the point at most: 1 point, 0.75 points."""
    return several(round(100 * fraction, 2), "point")


def check_tolerance(accuracy: float) -> float:
    """The fraction of accuracy that may be lost.

    Raises:
        InputError: it is none, or given in percentage points.
    """
    accuracy = check_number("accuracy", accuracy, "a fraction, such as 0.005", lambda _: True)
    if not 0 <= accuracy < TOO_MUCH:
        raise InputError(
            f"{several(100 * accuracy, 'point')} of accuracy may be lost; expected from 0 to less "
            "than "
            f"{100 * TOO_MUCH:g} points: in Python a fraction, 0.005 for half a point"
        )
    return accuracy


def check_rise(rise: float) -> float:
    """By how much a mean loss may rise; raises InputError for what is no number ≥ 0."""
    expected = "a number ≥ 0, in units of the loss"
    return check_number("the rise of the loss that is allowed", rise, expected, lambda r: r >= 0)
