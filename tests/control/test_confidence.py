"""The rule with a guarantee: exact levels, networks whose true loss is known, real cuts."""

import math
from functools import cache

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import binom, norm, skew, t
from simulated_depths import Draw, networks, removed
from torch import Tensor, nn

from deeplimit import InputError, SoftCrossEntropy, choose_cut, crop, turnpike_profile
from deeplimit.control.verdict import (
    excludes,
    loss_bounds,
    most_risen,
    quantile,
    samples_to_exclude,
)
from deeplimit.control.verifying import Change
from deeplimit.network import Architecture

SURE = 0.95


@cache
def most_lost(n: int, c: int, tolerance: float, confidence: float) -> int:
    """With how many answers lost the tolerance is still excluded, where c were gained; −1: none."""
    least, most = -1, n - c  # fewer answers lost are never worse
    while most > least:
        middle = (least + most + 1) // 2
        if excludes(n, middle, c, tolerance, confidence):
            least = middle
        else:
            most = middle - 1
    return least


def exact_level(n: int, tolerance: float, confidence: float, gained: float) -> float:
    """P(the tolerance is excluded) where just that is lost, summed over all counts that matter."""
    likely = binom.pmf(np.arange(n + 1), n, gained)
    counts = np.flatnonzero(likely >= 1e-12)
    lost = [most_lost(n, int(c), tolerance, confidence) for c in counts]
    return float(likely[counts] @ binom.cdf(lost, n - counts, (gained + tolerance) / (1 - gained)))


@pytest.mark.parametrize("confidence", [0.8, 0.9, 0.95, 0.999])
@pytest.mark.parametrize(
    ("n", "tolerance"), [(11, 0.2), (40, 0.1), (160, 0.02), (359, 0.02), (540, 0.005)]
)
def test_the_exact_level_is_kept_whatever_is_gained(
    n: int, tolerance: float, confidence: float
) -> None:
    rates = np.linspace(0, math.sqrt(0.2), 8) ** 2
    assert max(exact_level(n, tolerance, confidence, q) for q in rates) <= 1 - confidence


def test_without_the_correction_the_level_is_exceeded() -> None:
    n = samples_to_exclude(0.005)
    assert loss_bounds(n, 0, 0)[1] <= 0.005  # Tango's bound excludes where no answer differs,
    assert binom.pmf(0, n, 0.005) > 0.065  # which happens in 6.7 % where half a point is lost
    assert not excludes(n, 0, 0, 0.005)


@pytest.mark.parametrize("tolerance", [0.005, 0.01, 0.02, 0.1, 0.3])
def test_so_many_samples_exclude_it_where_none_differs(tolerance: float) -> None:
    n = samples_to_exclude(tolerance, SURE)
    assert excludes(n, 0, 0, tolerance)
    assert not excludes(n - 1, 0, 0, tolerance)
    # Nearly as few as any test of this level needs: (1 − δ)^n ≤ α.
    assert 1 <= n / math.ceil(math.log(0.05) / math.log1p(-tolerance)) < 1.15
    assert samples_to_exclude(0.0, SURE) is None
    assert not excludes(10**6, 0, 0, 0.0)


def test_the_bound_of_a_rise_is_halls() -> None:
    n, mean, spread = 60, 0.3, 2.0
    for skewness in (-1.5, -0.3, 0.0, 0.4, 2.0):

        def transformed(bound: float, g: float = skewness) -> float:
            u = (mean - bound) / spread
            return u + g * u**2 / 3 + g**2 * u**3 / 27 + g / (6 * n) + quantile(n) / math.sqrt(n)

        found = most_risen(mean, spread / math.sqrt(n), skewness, n, SURE)
        assert found == pytest.approx(brentq(transformed, mean - 5, mean + 5), abs=1e-9)
    assert most_risen(0.1, 0.0, 0.0, 40) == 0.1
    for confidence in (0.9, 0.99):
        few = quantile(11, norm.ppf(confidence)) * math.sqrt(10 / 11)
        assert few == pytest.approx(t.ppf(confidence, 10), rel=6e-3)


@pytest.mark.slow
def test_its_error_falls_as_one_over_n_and_students_as_one_over_the_root() -> None:
    draws = torch.Generator().manual_seed(0)
    missed = {}
    for n in (25, 100):
        x = -(torch.rand(100_000, n, generator=draws, dtype=torch.float64)).log()  # skewness 2
        mean, spread = x.mean(1), x.std(1, correction=0)
        skewness = ((x - mean[:, None]) / spread[:, None]).pow(3).mean(1)
        rows = zip(mean.tolist(), (spread / math.sqrt(n)).tolist(), skewness.tolist(), strict=True)
        bounds = [(most_risen(m, e, g, n), m + quantile(n) * e) for m, e, g in rows]
        missed[n] = (torch.tensor(bounds) < 1).double().mean(0) - 0.05
    hall, student = (missed[100] / missed[25]).tolist()
    assert 0 < missed[25][0] < missed[25][1] / 2
    assert hall < 0.4 < student


@pytest.mark.slow
@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize(("samples", "tolerance"), [(40, 0.1), (359, 0.02), (5000, 0.005)])
def test_a_depth_that_is_worse_is_chosen_in_five_of_a_hundred_draws_at_most(
    samples: int, tolerance: float, stages: int
) -> None:
    draws = 300 if samples < 1000 else 100
    most = 0.05 + 3 * math.sqrt(0.05 * 0.95 / draws)
    gone = []
    for network in networks(tolerance, stages).values():
        cuts = [
            removed(Draw(network, samples, seed), tolerance, SURE, loss=False)
            for seed in range(draws)
        ]
        assert sum(network.lost(cut) > tolerance for cut in cuts) / draws <= most
        gone += [len(cut) for cut in cuts]
        if samples == 359:  # the condition on the loss takes layers back, and never adds any
            for seed, cut in enumerate(cuts[:40]):
                both = removed(Draw(network, samples, seed), tolerance, SURE, loss=True)
                assert both <= cut
    # Of several stages so few judge at 40 that none goes; everywhere else the rule has power.
    assert (max(gone) > 4) == (samples > 40 or stages == 1)


@pytest.mark.slow
def test_the_rule_without_a_guarantee_does_choose_worse_ones() -> None:
    network = networks(0.005, 3)["each a little"]
    cuts = [removed(Draw(network, 40, seed), 0.005, None, loss=False) for seed in range(40)]
    assert sum(network.lost(cut) > 0.005 for cut in cuts) > 30
    assert not any(removed(Draw(network, 40, seed), 0.005, SURE, loss=False) for seed in range(40))


def test_the_truth_of_a_simulated_network_is_what_many_samples_say() -> None:
    for network in networks(0.02, 1).values():
        draw = Draw(network, 400_000, 0)
        for cut in ([15, 14], [3, 7, 8, 9], list(range(16))):
            change = draw.change(cut)
            within = 4 * change.accuracy_error + 1e-12
            assert change.lost == pytest.approx(network.lost(cut), abs=within)


def test_a_change_counts_pairs_and_measures_the_skewness() -> None:
    own = {"loss": torch.tensor([1.0, 2.0, 0.5, 0.0]), "right": torch.tensor([1.0, 0, 1, 1])}
    cut = {"loss": torch.tensor([2.0, 2.0, 0.5, 3.0]), "right": torch.tensor([0.0, 1, 0, 1])}
    change = Change.of(own, cut)
    assert change.swapped == (2, 1)
    assert (change.lost, change.risen, change.loss_after) == (0.25, 1.0, 1.875)
    rise = np.array([1.0, 0, 0, 3])
    assert change.skewness == pytest.approx(((rise - 1) ** 3).mean() / rise.std() ** 3)
    assert Change.of(own, own).skewness == 0


def tail_silent(alive: int) -> nn.Module:
    """A network of one stage of which only the first layers do anything."""
    torch.manual_seed(0)
    model = Architecture("vector", (16,), 5, (8,), width=16, hidden=16).build().eval()
    with torch.no_grad():
        for block in model.stages[0][:alive]:
            for p in block.parameters():
                p.normal_()
    return model


def self_labelled(model: nn.Module, count: int) -> list[tuple[Tensor, Tensor]]:
    """Batches whose targets are the model's own answers: any change of an answer is an error."""
    x = torch.randn(count, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return list(zip(x.split(40), model(x).argmax(1).split(40), strict=True))


def test_of_one_stage_the_last_layers_go_first_and_all_samples_judge() -> None:
    model = tail_silent(3)
    loader = self_labelled(model, 160)
    profile = turnpike_profile(model, loader, SoftCrossEntropy(5))
    choice = choose_cut(model, profile, loader, accuracy=0.02, confidence=SURE)
    assert (choice.removed, choice.score, choice.samples) == ((3, 4, 5, 6, 7), "tail", 160)
    assert (choice.confidence, choice.needed) == (SURE, None)
    assert "kept with confidence 95 %" in str(choice)
    kept = choose_cut(model, profile, loader, accuracy=0.02, confidence=SURE, protect=[6])
    assert kept.removed == (3, 4, 5, 7)
    # One sample fewer than can tell, at this confidence or a higher one: no layer goes.
    for asked, sure in ((0.019, SURE), (0.02, 0.99)):
        few = choose_cut(model, profile, loader, accuracy=asked, confidence=sure)
        assert few.removed == ()
        assert few.needed == samples_to_exclude(asked, sure) > 160
        assert f"{few.needed} could" in str(few)
        assert f"at {100 * sure:g} %" in str(few)


@torch.no_grad()
def test_the_loss_alone_is_bounded_as_by_hand() -> None:
    model = tail_silent(3)
    for block in model.stages[0][3:]:
        for p in block.parameters():
            p.normal_(std=0.1)
    loader = self_labelled(model, 60)
    profile = turnpike_profile(model, loader, SoftCrossEntropy(5))
    loss, bounds = nn.CrossEntropyLoss(reduction="none"), []
    for k in range(8):
        smaller = crop(model, k).eval()
        rises = [loss(smaller(x), y) - loss(model(x), y) for x, y in loader]
        rise = torch.cat(rises).double().numpy()
        error, n = rise.std() / math.sqrt(60), len(rise)
        bounds.append(most_risen(rise.mean(), error, skew(rise), n, 0.9))
    for limit in (0.5 * bounds[6], 0.5 * (bounds[5] + bounds[4]), max(bounds) + 0.1):
        choice = choose_cut(model, profile, loader, loss=loss, rise=limit, confidence=0.9)
        kept = next((k + 1 for k in reversed(range(8)) if bounds[k] > limit), 0)
        assert choice.removed == tuple(range(kept, 8))


def test_confidences_that_cannot_be_had() -> None:
    model = tail_silent(3)
    loader = self_labelled(model, 40)
    profile = turnpike_profile(model, loader, SoftCrossEntropy(5))
    for wrong in (0.5, 1.0, 95.0, math.nan):
        with pytest.raises(InputError, match=r"confidence is .*; expected a fraction above 0.5"):
            choose_cut(model, profile, loader, accuracy=0.02, confidence=wrong)
    with pytest.raises(InputError, match="blocks is given, which no sample judges"):
        choose_cut(model, profile, loader, blocks=2, confidence=SURE)


class Gate(nn.Module):
    """Rights the answers of the samples with a ≤ u < a + w, and moves no other."""

    def __init__(self, start: float, width: float):
        super().__init__()
        self.start, self.end = start, start + width
        self.weight = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        inside = ((x[:, 0] >= self.start) & (x[:, 0] < self.end)).to(x.dtype)
        return x + self.weight * inside[:, None] * torch.tensor([0.0, 1.0, -1.0])


@pytest.mark.slow
def test_the_profile_of_the_judging_samples_orders_nothing() -> None:
    width, tolerance, draws = 0.012, 0.01, 20
    stem, head = nn.Linear(1, 3), nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        stem.weight.copy_(torch.tensor([[1.0], [0.0], [0.0]]))
        stem.bias.copy_(torch.tensor([0.0, 0.0, 1.0]))
        head.weight.copy_(torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]))
    gates = [Gate(n * width, width) for n in range(40)]
    model = nn.Sequential(stem, *gates, head).eval()
    worse = 0
    for seed in range(draws):
        u = torch.rand(320, 1, generator=torch.Generator().manual_seed(seed))
        loader = [(u, (u[:, 0] >= 40 * width).long())]
        profile = turnpike_profile(model, loader, SoftCrossEntropy(2))
        choice = choose_cut(model, profile, loader, accuracy=tolerance, confidence=SURE)
        worse += width * len(choice.removed) > tolerance  # what each righted is lost
    assert worse <= 3  # more have a probability of 1.6 % at a level of 5 %
