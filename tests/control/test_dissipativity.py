"""The dissipation inequality on real trajectories: it holds, and a false claim is found out."""

import copy
import math
from collections.abc import Sequence

import pytest
import torch
from model_families import CLASSES, Sample, sample
from naive_networks import naive_logits, naive_walk
from sklearn.datasets import load_digits
from torch import Tensor, nn

from deeplimit import InputError, ResidualChain, SoftCrossEntropy, StageCost, dissipativity
from deeplimit.network import Architecture, LinearResidual

Batches = list[tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def digits() -> Batches:
    """600 digits in batches of unequal size."""
    x, y = load_digits(return_X_y=True)
    x, y = torch.from_numpy(x[:600]) / 16, torch.from_numpy(y[:600]).long()
    return list(zip(x.split(250), y.split(250), strict=True))


@pytest.fixture(scope="module", params=["untrained", "trained"])
def objective(request: pytest.FixtureRequest, digits: Batches) -> StageCost:
    torch.manual_seed(0)
    model = Architecture("vector", (64,), 10, (6,), width=32, hidden=32).build().double()
    stage_cost = StageCost(model, SoftCrossEntropy(10, 0.05), weight=0.1, control_cost=1e-4)
    if request.param == "trained":
        optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
        for _ in range(60):
            for x, y in digits:
                optimiser.zero_grad()
                stage_cost(x, y)[0].backward()
                optimiser.step()
        x, y = digits[0]
        assert (model(x).argmax(1) == y).double().mean() > 0.95
    return stage_cost


@pytest.mark.slow
def test_it_holds_on_digits(objective: StageCost, digits: Batches) -> None:
    report = dissipativity(objective, digits)
    assert report.holds
    assert report.margin > 0
    assert report.samples == 600
    assert len(report.supply) == len(report.lower_bound) == len(report.sample_margin) == 6
    assert all(bound >= 0 for bound in report.lower_bound)
    assert report.margins == tuple(
        s - b for s, b in zip(report.supply, report.lower_bound, strict=True)
    )


def alpha(distance: float, classes: int, softness: float) -> float:
    curvature = 2 * softness * (1 - softness) if classes == 2 else softness / (classes - 1)
    return curvature / 2 * (math.exp(-math.sqrt(2) * distance) - 1 + math.sqrt(2) * distance)


def naive_margins(
    model: nn.Module, x: Tensor, y: Tensor, loss: SoftCrossEntropy, gammas: Sequence[float]
) -> tuple[list[float], list[float]]:
    """γ_n(mean KL − α(mean dist)) and the least γ_n(KL − α(dist)) of a sample, per layer."""
    walk, _ = naive_walk(model, x)
    means, least = [], []
    for gamma, (stage, state) in zip(gammas, walk[:-1], strict=True):
        z = naive_logits(model, stage, state).detach()
        excess, distance = [], []
        for row, target in zip(z, y.tolist(), strict=True):
            q = torch.full_like(row, loss.softness / (loss.classes - 1))
            q[target] = 1 - loss.softness
            excess.append(float((q * (q.log() - row + row.logsumexp(0))).sum()))
            apart = row - q.log()
            distance.append(float((apart - apart.mean()).norm()))
        bounds = [alpha(d, loss.classes, loss.softness) for d in distance]
        least.append(gamma * min(k - a for k, a in zip(excess, bounds, strict=True)))
        mean_bound = alpha(sum(distance) / len(y), loss.classes, loss.softness)
        means.append(gamma * (sum(excess) / len(y) - mean_bound))
    return means, least


@pytest.mark.slow
def test_the_smallest_margin_is_the_naive_one(objective: StageCost, digits: Batches) -> None:
    report = dissipativity(objective, digits)
    x = torch.cat([x for x, _ in digits])
    y = torch.cat([y for _, y in digits])
    means, least = naive_margins(objective.model, x, y, objective.loss, [0.1] * 6)
    assert report.margins == pytest.approx(means, rel=1e-9, abs=1e-12)
    assert report.sample_margin == pytest.approx(least, rel=1e-9, abs=1e-12)
    assert report.margin == pytest.approx(min(means + least), rel=1e-9)
    assert report.layer == min(range(6), key=lambda n: min(means[n], least[n]))


def test_all_families(family: Sample) -> None:
    loss = SoftCrossEntropy(CLASSES, 0.1)
    gammas = [0.1 * n for n in range(family.depth)]
    stage_cost = StageCost(family.model, loss, gammas, control_cost=0.2)
    report = dissipativity(stage_cost, [(family.x[:4], family.y[:4]), (family.x[4:], family.y[4:])])
    assert report.holds
    means, least = naive_margins(family.model.eval(), family.x, family.y, loss, gammas)
    assert report.margins == pytest.approx(means, rel=1e-9, abs=1e-11)
    assert report.sample_margin == pytest.approx(least, rel=1e-9, abs=1e-11)


def test_the_supplies_sum_to_the_stage_cost(family: Sample) -> None:
    """Σ s_n + terminal cost + N γ H is (4): each control in it once, a shared one too."""
    loss = SoftCrossEntropy(CLASSES, 0.1)
    stage_cost = StageCost(family.model.eval(), loss, 0.3, control_cost=0.2)
    report = dissipativity(stage_cost, [(family.x, family.y)])
    with torch.no_grad():
        cost, logits = stage_cost(family.x, family.y)
        terminal = loss(logits, family.y).mean()
    total = sum(report.supply) + float(terminal) + family.depth * 0.3 * loss.minimum
    assert total == pytest.approx(float(cost), rel=1e-12)


def test_a_negative_control_cost_is_found_out(objective: StageCost, digits: Batches) -> None:
    with torch.no_grad():
        assert any(theta.abs().max() > 0 for theta in objective.anatomy.controls)
    report = dissipativity(objective, digits, control_cost=-10.0)
    assert not report.holds
    assert report.margin < 0
    plain = dissipativity(objective, digits)
    # The report is about the same trajectories: only the controls' part differs.
    assert report.sample_margin == plain.sample_margin
    squares = [
        sum(float(p.detach().square().sum()) for p in objective.anatomy.control(n))
        for n in range(6)
    ]
    expected = [m - 10 * s for m, s in zip(plain.margins, squares, strict=True)]
    assert report.margins == pytest.approx(expected, rel=1e-9)


def test_a_minimum_claimed_too_large_is_found_out(objective: StageCost, digits: Batches) -> None:
    loss = objective.loss
    close = min(
        float(loss.excess(z, y).min())
        for x, y in digits
        for z in objective.anatomy.logits(objective.anatomy.states(x)[0])[:-1].detach()
        for loss in [objective.loss]
    )
    claimed = loss.minimum + close + 1e-3
    report = dissipativity(objective, digits, minimum=claimed)
    assert not report.holds
    assert report.margin < 0
    plain = dissipativity(objective, digits)
    shift = 0.1 * (close + 1e-3)
    assert report.supply == pytest.approx([s - shift for s in plain.supply], abs=1e-12)
    assert dissipativity(objective, digits, minimum=loss.minimum).holds
    assert dissipativity(objective, digits, minimum=loss.minimum - 0.1).holds


def test_it_holds_on_the_minimisers_themselves() -> None:
    """At z ∈ Z*_y and θ = 0 both sides are 0; what is left is rounding, and no violation."""
    for classes in (2, 3, 10):
        loss = SoftCrossEntropy(classes, 0.05)
        blocks = [LinearResidual(classes).double() for _ in range(3)]
        with torch.no_grad():
            for block in blocks:
                block.weight.zero_()
        stage_cost = StageCost(ResidualChain(blocks), loss, 0.1, control_cost=0.1)
        generator = torch.Generator().manual_seed(0)
        y = torch.randint(classes, (2000,), generator=generator)
        shift = 10 * torch.randn(2000, 1, generator=generator, dtype=torch.float64)
        tiny = 1e-9 * torch.randn(2000, classes, generator=generator, dtype=torch.float64)
        for away in (0, tiny):
            report = dissipativity(
                stage_cost, [(loss.minimiser(y, torch.float64) + shift + away, y)]
            )
            assert report.holds
            assert abs(report.margin) < 1e-15
            assert max(report.supply) < 1e-15


def test_modes_and_parameters_are_left_alone() -> None:
    family = sample("three stages, batch")
    stage_cost = StageCost(family.model, SoftCrossEntropy(CLASSES), 0.1)
    before = copy.deepcopy(stage_cost.state_dict())
    dissipativity(stage_cost, [(family.x, family.y)])
    assert all(module.training for module in stage_cost.modules())
    assert all(torch.equal(before[k], v) for k, v in stage_cost.state_dict().items())


def test_an_empty_loader_is_refused() -> None:
    stage_cost = StageCost(sample("chain").model, SoftCrossEntropy(CLASSES), 0.1)
    with pytest.raises(InputError, match="loader gave no batch"):
        dissipativity(stage_cost, [])


def test_samples_without_a_class_count_nowhere() -> None:
    family = sample("vector")
    stage_cost = StageCost(family.model, SoftCrossEntropy(CLASSES, 0.1), 0.3)
    y = family.y.clone()
    y[::2] = -100
    report = dissipativity(stage_cost, [(family.x, y)])
    expected = dissipativity(stage_cost, [(family.x[1::2], y[1::2])])
    assert report.samples == expected.samples == len(y) // 2
    assert report.supply == pytest.approx(expected.supply, rel=1e-9)
    assert str(report).splitlines()[0] == f"{report.samples} samples; holds"
