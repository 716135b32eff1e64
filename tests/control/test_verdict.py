"""Verdicts against the likelihood maximised by hand, exact coverage, and counting."""

import math

import numpy as np
import pytest
import torch
from model_families import CLASSES, sample
from scipy.optimize import brentq, minimize_scalar
from scipy.stats import multinomial
from torch import Tensor, nn

from deeplimit import crop, verify_crop
from deeplimit.control.verdict import (
    Verdict,
    Z,
    judge,
    judge_answers,
    loss_bounds,
    samples_to_exclude,
    unchanged,
)
from deeplimit.network import ResidualClassifier


def naive_upper(n: int, lost: int, gained: int) -> float:
    """The root of the score, q found by maximising the likelihood numerically."""

    def score(delta: float) -> float:
        def cost(q: float) -> float:
            cells = ((lost, q + delta), (gained, q), (n - lost - gained, 1 - 2 * q - delta))
            if any(p < 0 for _, p in cells):
                return math.inf
            return -sum(k * math.log(max(p, 1e-300)) for k, p in cells if k)

        least, most = max(0.0, -delta), (1 - delta) / 2
        found = minimize_scalar(
            cost, bounds=(least, most), method="bounded", options={"xatol": 1e-13}
        )
        q = min((least, most, found.x), key=cost)
        return (lost - gained - n * delta) / math.sqrt(n * (2 * q + delta * (1 - delta))) + Z

    return brentq(score, (lost - gained) / n + 1e-9, 1 - 1e-9, xtol=1e-13)


@pytest.mark.parametrize(
    ("n", "lost", "gained"),
    [(359, 0, 0), (359, 1, 0), (100, 4, 0), (100, 0, 4), (50, 7, 3), (40, 1, 1), (20, 9, 9)],
)
def test_the_bounds_are_the_roots_of_the_score(n: int, lost: int, gained: int) -> None:
    at_least, at_most = loss_bounds(n, lost, gained)
    assert at_most == pytest.approx(naive_upper(n, lost, gained), abs=1e-7)
    assert -at_least == pytest.approx(naive_upper(n, gained, lost), abs=1e-7)


def test_where_no_sample_differs_the_bound_is_not_zero() -> None:
    assert (
        loss_bounds(359, 0, 0)[1]
        == pytest.approx(Z**2 / (359 + Z**2))
        == pytest.approx(0.00748, abs=1e-5)
    )
    for tolerance in (0.005, 0.01, 0.3):
        least = samples_to_exclude(tolerance)
        assert loss_bounds(least, 0, 0)[1] <= tolerance < loss_bounds(least - 1, 0, 0)[1]
    assert samples_to_exclude(0.0) is None


@pytest.mark.slow
@pytest.mark.parametrize(("lost", "gained"), [(0.1, 0.02), (0.05, 0.03), (0.1, 0.1), (0.02, 0.06)])
def test_the_bounds_cover_the_truth_about_as_often_as_they_say(lost: float, gained: float) -> None:
    n, kept = 60, 0.0
    for b in range(n + 1):
        for c in range(min(n - b, 25) + 1):
            likely = multinomial.pmf((b, c, n - b - c), n, (lost, gained, 1 - lost - gained))
            if likely > 1e-9 and loss_bounds(n, b, c)[1] >= lost - gained:
                kept += likely
    assert 0.935 <= kept <= 0.99


def said(
    tolerance: float, samples: int, lost: int, gained: int, right: int | None = None
) -> Verdict:
    """Of a network that is right for 90 %, or so many; a tenth of them is the largest class."""
    right = samples * 9 // 10 if right is None else right
    largest = samples // 10
    return judge(
        tolerance=tolerance,
        samples=samples,
        lost=lost,
        gained=gained,
        right=right,
        largest=largest,
        right_in_largest=min(largest, right),
    )


def test_the_four_words() -> None:
    assert said(0.01, 359, 0, 0).word == "kept"
    assert said(0.005, 359, 0, 0).word == "unresolved"
    assert said(0.005, 10_000, 20, 5).word == "kept"
    assert said(0.0001, 100, 4, 0).word == "lost"
    assert said(0.005, 10_000, 300, 100).word == "lost"
    assert said(0.01, 359, 0, 0, right=36).word == "nothing learnt"  # the largest class, always
    assert said(0.01, 359, 0, 0, right=41).word == "kept"  # five more: √5 > 1.645
    assert said(0.01, 359, 0, 0, right=37).word == "nothing learnt"
    same = unchanged(said(0.005, 359, 0, 0))
    assert (same.word, same.at_most, same.needed) == ("kept", 0.0, None)
    assert unchanged(said(0.01, 359, 0, 0, right=36)).word == "nothing learnt"


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (1, 0), (2, 2), (4, 0), (1, 1)])
def test_so_many_samples_would_resolve_it(lost: int, gained: int) -> None:
    verdict = said(0.005, 359, lost, gained)
    assert verdict.word == "unresolved"
    for share, word in ((1.0, {"kept", "lost"}), (0.9, {"unresolved"})):
        more = share * verdict.needed
        at_least, at_most = loss_bounds(more, lost * more / 359, gained * more / 359)
        resolved = at_most <= 0.005 or at_least > 0.005
        assert resolved == (word != {"unresolved"})


def test_a_difference_equal_to_the_tolerance_is_never_resolved() -> None:
    verdict = said(0.01, 100, 1, 0)
    assert (verdict.word, verdict.needed) == ("unresolved", None)
    assert "no number of them" in str(verdict)


def test_tokens_that_repeat_one_another_count_as_their_texts_do() -> None:
    rng = torch.Generator().manual_seed(0)
    before, after = (torch.rand(80, generator=rng) < share for share in (0.9, 0.8))
    targets = torch.arange(80) % 10
    right = torch.stack([before, after])
    one = judge_answers(right, targets, 0.01, torch.arange(80))
    rows = [x.repeat_interleave(7, -1) for x in (right, targets)]
    seven = judge_answers(*rows, 0.01, torch.arange(80).repeat_interleave(7))
    assert (seven.samples, seven.lost) == (7 * one.samples, 7 * one.lost)
    # As uncertain as 80 texts, up to the factor 80/79 of their variance.
    bounds = judge_answers(right, targets, 0.01)
    assert seven.at_most == pytest.approx(bounds.at_most, rel=0.01)
    assert seven.at_least == pytest.approx(bounds.at_least, rel=0.03)
    assert seven.word == bounds.word


class Constant(nn.Module):
    """Logits that answer one class, whatever comes in."""

    def __init__(self, classes: int):
        super().__init__()
        self.answer = nn.Parameter(torch.eye(classes)[0])

    def forward(self, x: Tensor) -> Tensor:
        return self.answer * torch.ones_like(x[:, :1])


@pytest.mark.slow
def test_a_network_at_chance_has_learnt_nothing_and_its_cut_keeps_nothing() -> None:
    model = sample("vector").model
    assert isinstance(model, ResidualClassifier)
    model.head = Constant(CLASSES).double()
    loader = [(torch.randn(60, 6, dtype=torch.float64), torch.arange(60) % CLASSES)]
    report = verify_crop(model, crop(model, 0), loader)
    assert report.agreement == 1  # by which it looked like a perfect cut
    assert report.verdict.word == "nothing learnt"
    assert report.verdict.largest_class == report.accuracy_before == 1 / CLASSES
    assert "train it first" in str(report.verdict)


@torch.no_grad()
def test_the_verdict_of_a_cut_is_counted_from_its_answers() -> None:
    model = sample("vector").model.eval()
    smaller = crop(model, remove=[1, 2])
    x = torch.randn(60, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    y = model(x).argmax(1)
    y[:6] = (y[:6] + 1) % CLASSES
    before, after = (m(x).argmax(1) == y for m in (model, smaller))
    lost, gained = int((before & ~after).sum()), int((after & ~before).sum())
    largest = int(y.bincount().argmax())
    report = verify_crop(
        model, smaller, list(zip(x.split(25), y.split(25), strict=True)), tolerance=0.02
    )
    verdict = report.verdict
    assert (verdict.samples, verdict.lost, verdict.gained) == (60, lost, gained)
    assert (verdict.tolerance, verdict.accuracy) == (0.02, 54 / 60)
    assert verdict.largest_class == pytest.approx(float((y == largest).double().mean()))
    by_hand = judge(
        tolerance=0.02,
        samples=60,
        lost=lost,
        gained=gained,
        right=54,
        largest=int((y == largest).sum()),
        right_in_largest=int((before & (y == largest)).sum()),
    )
    assert verdict == by_hand
    assert np.isclose(report.accuracy_before - report.accuracy_after, (lost - gained) / 60)
