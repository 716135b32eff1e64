"""The certificate: closed forms where there are some, and trainings that keep it or break it."""

import copy
import json
import math
from dataclasses import asdict, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from flow_networks import STATE, TARGET, X, backward, chain, drawn, risk_of
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.optim import SGD

from deeplimit import InputError
from deeplimit.meanfield.convergence import ConvergenceCertificate, certify_convergence
from deeplimit.meanfield.flow import particle_flow
from deeplimit.meanfield.kernel import feature_kernel
from deeplimit.network import Architecture, LinearResidual, ResidualChain


def certified(
    model: nn.Module, lr: float, steps: int, x: Tensor = X, y: Tensor = TARGET, **settings: Any
) -> ConvergenceCertificate:
    """The plain flow, recorded at every step."""
    flow, recorder = particle_flow(model, lr), certify_convergence(model, **settings)
    for k in range(steps):
        flow.zero_grad()
        risk = risk_of(model, x, y)
        risk.backward()
        recorder.record(k * lr, risk)
        flow.step()
    return recorder.certificate()


def quadratic() -> tuple[ResidualChain, Tensor, float]:
    """One layer with trained output weights and an error along an eigenvector of the kernel.

    L(u) = 1/(2D) ‖(1/M) F u − r‖² and r is an eigenvector: of it (1 − lr·λ/D)^k is left after k
    steps, and m̂ = λ/D throughout.
    """
    model = chain(1, 9, size=0.0)
    model[0].inner.requires_grad_(False)
    with torch.no_grad():
        features = model[0].activation(model[0].inner(X))
        values, vectors = torch.linalg.eigh(features @ features.T / 9)
    target = X + vectors[:, -1:] @ drawn(1, STATE)
    return model, target, float(values[-1]) / len(X)


@pytest.mark.slow
def test_a_quadratic_keeps_every_closed_form() -> None:
    """With m = m̂ budget and inequality are tight: the whole budget is what it travels."""
    model, target, m = quadratic()
    initial = float(risk_of(model, X, target).detach())
    lr = 0.08 / m
    found = certified(model, lr, 60, X, target, m=m * (1 - 1e-9))
    budget = math.sqrt(2 * initial / m)
    assert found.holds
    assert found.broken_by == ()
    assert found.budget == pytest.approx(budget, rel=1e-8)
    for k in (0, 1, 7, 30, 55):
        left = (1 - lr * m) ** k
        assert found.risks[k] == pytest.approx(left**2 * initial, rel=1e-5)
        assert found.rates[k] == pytest.approx(m, rel=1e-5)
        assert found.slopes[k] == pytest.approx(math.sqrt(2 * m * initial) * left, rel=1e-5)
        assert found.guaranteed[k] == pytest.approx(math.exp(-2 * m * k * lr) * initial, rel=1e-8)
        assert found.path_lengths[k] == pytest.approx((1 - left) * budget, rel=1e-5, abs=1e-12)
        assert found.distances[k] <= found.path_lengths[k] * (1 + 1e-9)
    assert found.path_lengths[-1] > 0.99 * budget
    tight = certified(quadratic()[0], lr, 3, X, target, m=m * (1 + 1e-6))
    assert (tight.broken_at, tight.broken_by) == (0, ("rate",))


APART = 2 * torch.eye(STATE, dtype=torch.float64)  # samples that the features tell apart


def near() -> tuple[ResidualChain, Tensor]:
    """Many features, and a target near the start."""
    model = chain(3, 60, size=0.3, gain=2.0)
    return model, model(APART).detach() + 0.2 * TARGET[:STATE]


def good(steps: int, **settings: Any) -> ConvergenceCertificate:
    model, target = near()
    return certified(model, 0.5, steps, APART, target, **settings)


@pytest.mark.slow
def test_in_the_good_corner_it_holds_and_the_risk_stays_below_the_curve() -> None:
    found = good(40)
    assert found.holds
    assert all(r <= g * (1 + 1e-12) for r, g in zip(found.risks, found.guaranteed, strict=True))
    assert found.guaranteed[-1] < 0.01 * found.risks[0]
    assert found.m == found.rates[0] / 2
    assert all(a < b for a, b in pairwise(found.path_lengths))
    assert all(d <= p + 1e-12 for d, p in zip(found.distances, found.path_lengths, strict=True))
    assert 0.5 * found.budget < found.distances[-1] < found.budget
    assert found.verdict.startswith("holds for 40 records up to t = 19.5: m̂ stayed above m = 0.13")
    assert found.verdict.count("\n") == 0


@pytest.mark.slow
def test_the_kernels_rate_certifies_too() -> None:
    model, _ = near()
    m = feature_kernel(model, APART).m
    found = good(40, m=m)
    assert found.holds
    assert (found.m, found.budget) == (m, math.sqrt(2 * found.risks[0] / m))
    assert found.risks[-1] <= found.guaranteed[-1] < 1e-3 * found.risks[0]


@pytest.mark.slow
def test_in_the_bad_corner_it_is_broken_by_the_rate() -> None:
    """Fewer features than samples and a target far away: part of the error is out of reach."""
    model = chain(2, 2, size=0.1)
    assert feature_kernel(model, X).m == 0
    found = certified(model, 0.3, 80, X, 10 * TARGET)
    k = found.broken_at
    assert k is not None
    assert not found.holds
    assert found.broken_by == ("rate",)
    assert found.rates[k] < found.m <= min(found.rates[:k])
    assert found.verdict.startswith(f"broken since record {k} (t = {0.3 * k:.3g}): m̂ = ")
    assert "is below m = " in found.verdict
    assert "distance" not in found.verdict
    # With the least rate of the whole run it would hold, and say nothing.
    idle = certified(chain(2, 2, size=0.1), 0.3, 80, X, 10 * TARGET, m=min(found.rates))
    assert not {"rate", "distance"} & set(idle.broken_by)


@pytest.mark.slow
def test_steps_that_are_no_gradient_flow_break_the_budget() -> None:
    """Momentum carries it past the target: the distance is what tells."""
    model, target, m = quadratic()
    flow = particle_flow(model, 0.05 / m, momentum=0.98)
    recorder = certify_convergence(model, m=m * 0.99)
    for k in range(60):
        flow.zero_grad()
        risk = risk_of(model, X, target)
        risk.backward()
        recorder.record(k * 0.05 / m, risk)
        flow.step()
    found = recorder.certificate()
    assert found.broken_by == ("distance",)
    k = found.broken_at
    assert k is not None
    assert max(found.distances[:k]) <= found.budget < found.distances[k]
    assert "the distance travelled, " in found.verdict
    assert "is below" not in found.verdict


def test_both_conditions_can_break_at_once() -> None:
    model, target, m = quadratic()
    recorder = certify_convergence(model, m=m / 2)
    risk_of(model, X, target).backward()
    recorder.record(0.0, 1.0)
    model[0].outer.weight.data.add_(100.0)
    model[0].outer.weight.grad.zero_()
    recorder.record(1.0, 1.0)
    found = recorder.certificate()
    assert (found.broken_at, found.broken_by) == (1, ("rate", "distance"))
    assert "m̂ = 0 is below m = " in found.verdict
    assert " and the distance travelled, " in found.verdict


def test_a_risk_above_the_curve_breaks_it() -> None:
    """Conditions kept, but the time given runs faster than the training."""
    model, target = near()
    flow, recorder = particle_flow(model, 0.5), certify_convergence(model)
    for k in range(5):
        flow.zero_grad()
        risk = risk_of(model, APART, target)
        risk.backward()
        recorder.record(1000.0 * k, risk)
        flow.step()
    found = recorder.certificate()
    assert not found.holds
    assert (found.broken_at, found.broken_by) == (1, ("risk",))
    assert found.risks[1] > found.guaranteed[1]
    assert found.verdict.startswith("broken since record 1 (t = 1e+03): the risk, ")
    assert "the steps are too large for a gradient flow" in found.verdict


def test_a_step_past_the_flow_breaks_it() -> None:
    """The risk falls, m̂ ≥ m and d ≤ R, but the risk falls more slowly than the flow's."""
    model, target, m = quadratic()
    found = certified(model, 1.8 / m, 3, X, target, m=0.28 * m)
    assert found.risks[1] < found.risks[0]
    assert found.risks[1] > 1.5 * found.guaranteed[1]
    assert (found.broken_at, found.broken_by) == (1, ("risk",))
    assert not found.holds


def reordered(model: ResidualChain) -> ResidualChain:
    """The particles of each layer in another order."""
    other = copy.deepcopy(model)
    for block in other:
        order = torch.randperm(block.inner.out_features, generator=torch.Generator().manual_seed(3))
        block.inner.weight.data = block.inner.weight.data[order]
        block.inner.bias.data = block.inner.bias.data[order]
        block.outer.weight.data = block.outer.weight.data[:, order]
    return other


def particles(model: ResidualChain) -> list[Tensor]:
    """[M, p] of each layer."""
    n = len(model)
    return [
        torch.cat(
            [
                b.outer.weight.detach().T * (n * b.inner.out_features * model.step),
                b.inner.weight.detach(),
                b.inner.bias.detach()[:, None],
            ],
            dim=1,
        )
        for b in model
    ]


def naive_distance(a: ResidualChain, b: ResidualChain) -> float:
    """By the assignment of each layer."""
    total = 0.0
    for p, q in zip(particles(a), particles(b), strict=True):
        costs = torch.cdist(p, q).square().numpy()
        total += costs[linear_sum_assignment(costs)].mean() / len(a)
    return math.sqrt(total)


def test_distance_and_path_are_those_of_the_measures() -> None:
    """Particles that change places: a long path, no distance."""
    model = chain(3, 6)
    recorder = certify_convergence(model)
    recorder.record(0.0, backward(model))
    places = [model, reordered(model), chain(3, 6, seed=5)]
    path, last = 0.0, model
    for k, place in enumerate(places[1:], 1):
        moved = [p - q for p, q in zip(particles(place), particles(last), strict=True)]
        path += math.sqrt(sum(float(m.square().sum()) / 18 for m in moved))
        last = copy.deepcopy(place)
        recorder.model.load_state_dict(place.state_dict())
        recorder.record(float(k), backward(model))
        found = recorder.certificate()
        assert found.path_lengths[-1] == pytest.approx(path, rel=1e-12)
        expected = naive_distance(places[0] if k == 1 else chain(3, 6), place)
        assert found.distances[-1] == pytest.approx(expected, rel=1e-9, abs=1e-7)
        if k == 1:
            model_start = chain(3, 6)
            assert naive_distance(model_start, place) < 1e-7
            places[0] = model_start
    assert found.distances[1] < 1e-7 < found.path_lengths[1]


def test_what_is_trained_besides_belongs_to_slope_and_distance() -> None:
    torch.manual_seed(0)
    a = Architecture("vector", (5,), 2, (3,), STATE, hidden=6, activation="tanh", step=1 / 3)
    model = a.build().double()
    recorder = certify_convergence(model, others=0.25)
    alone = certify_convergence(model, others=0.0)
    x, y = drawn(7, 5), drawn(7, 2, seed=4)
    flow = particle_flow(model, 0.5, others=0.25)
    before = copy.deepcopy(model)
    for k in range(2):
        flow.zero_grad()
        risk = risk_of(model, x, y)
        risk.backward()
        for each in (recorder, alone):
            each.record(0.5 * k, risk)
        flow.step() if k == 0 else None
    whole, part = recorder.certificate(), alone.certificate()
    moved = [
        (p - q).square().sum() / 0.25
        for (name, p), q in zip(model.named_parameters(), before.parameters(), strict=True)
        if "stages" not in name
    ]
    square = float(torch.stack(moved).sum().detach())
    assert whole.distances[1] ** 2 == pytest.approx(part.distances[1] ** 2 + square, rel=1e-9)
    assert whole.path_lengths[1] ** 2 == pytest.approx(part.path_lengths[1] ** 2 + square, rel=1e-9)
    assert whole.path_lengths[1] == pytest.approx(0.5 * whole.slopes[0], rel=1e-9)
    assert whole.slopes[0] > part.slopes[0] > 0


def test_a_recorded_training_is_the_same_one() -> None:
    """Recording changes nothing."""
    model, other = chain(3, 6), chain(3, 6)
    certified(model, 0.3, 5)
    flow = particle_flow(other, 0.3)
    for _ in range(5):
        backward(other)
        flow.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_it_is_written_as_json() -> None:
    found = good(4)
    again = json.loads(json.dumps(asdict(found), allow_nan=False))
    back = ConvergenceCertificate(
        **{k: tuple(v) if isinstance(v, list) else v for k, v in again.items()}
    )
    assert back == found
    assert replace(found, broken_at=2).holds is False


def test_a_risk_within_rounding_of_its_infimum_counts_as_it() -> None:
    """A minimum reached is no violation, though nothing is left of m̂."""
    model = chain(2, 5)
    recorder = certify_convergence(model, infimum=0.7)
    backward(model)
    recorder.record(0.0, 0.9)
    recorder.record(1.0, 0.7 + 1e-16)
    recorder.record(2.0, 0.7 - 1e-15)
    found = recorder.certificate()
    assert found.holds
    assert found.risks[1:] == (0, 0)
    assert found.rates[1:] == (None, None)
    assert json.dumps(asdict(found), allow_nan=False)
    with pytest.raises(InputError, match=r"the risk is 0\.6999, below the infimum given, 0\.7"):
        recorder.record(3.0, 0.6999)


@pytest.mark.slow
def test_the_flow_travels_the_same_at_every_width_and_sgd_does_not() -> None:
    """One measure of 4 atoms, at 8 and 32 particles; (N·M)-fold gradients against plain ones."""
    ways = {"flow": lambda m: particle_flow(m, 0.3), "SGD": lambda m: SGD(m.parameters(), 0.3)}
    travelled: dict[str, list[float]] = {}
    for name, make in ways.items():
        for copies in (2, 8):
            model = repeated(chain(3, 4), copies)
            optimizer, recorder = make(model), certify_convergence(model)
            for k in range(8):
                recorder.record(float(k), backward(model))
                optimizer.step()
            travelled.setdefault(name, []).append(recorder.certificate().distances[-1])
    assert travelled["flow"][1] == pytest.approx(travelled["flow"][0], rel=1e-9)
    assert travelled["flow"][0] > 0.1
    assert abs(travelled["SGD"][1] / travelled["SGD"][0] - 1) > 0.5


def repeated(model: ResidualChain, copies: int) -> ResidualChain:
    """Every particle this often."""
    wide = chain(len(model), 4 * copies)
    with torch.no_grad():
        for new, old in zip(wide, model, strict=True):
            new.inner.weight.copy_(old.inner.weight.repeat(copies, 1))
            new.inner.bias.copy_(old.inner.bias.repeat(copies))
            new.outer.weight.copy_(old.outer.weight.repeat(1, copies) / copies)
    return wide


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "infimum": ({"infimum": math.inf}, "the infimum of the risk is inf"),
    "m 0": ({"m": 0.0}, "m is 0.0; expected a number above 0: a kernel that is singular"),
    "m nan": ({"m": math.nan}, "m is nan"),
    "others": ({"others": -1.0}, "others is -1.0"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_out_of_range(case: str) -> None:
    settings, message = SETTINGS[case]
    with pytest.raises(InputError, match=message):
        certify_convergence(chain(2, 3), **settings)


def test_a_network_that_is_no_mean_of_particles() -> None:
    with pytest.raises(InputError, match="LinearResidual is not a mean of particles"):
        certify_convergence(ResidualChain([LinearResidual(3)]))


WRONG: dict[str, tuple[float, float, str]] = {
    "time": (0.0, 1.0, "time 0 given after 1; expected finite times that grow"),
    "time nan": (math.nan, 1.0, "time nan given"),
    "risk": (2.0, math.nan, "the risk is nan; the training diverged"),
    "below": (2.0, -0.1, "the risk is -0.1, below the infimum given, 0; give the lowest value"),
}


@pytest.mark.parametrize("case", WRONG)
def test_records_that_are_refused_leave_no_trace(case: str) -> None:
    time, risk, message = WRONG[case]
    model = chain(2, 3)
    recorder = certify_convergence(model)
    recorder.record(1.0, backward(model))
    with pytest.raises(InputError, match=message):
        recorder.record(time, risk)
    assert len(recorder.certificate().times) == 1


def test_starts_where_there_is_nothing_to_certify() -> None:
    model = chain(2, 3)
    recorder = certify_convergence(model)
    with pytest.raises(InputError, match="nothing was recorded"):
        recorder.certificate()
    with pytest.raises(InputError, match="the parameters have no gradients"):
        recorder.record(0.0, 1.0)
    backward(model)
    with pytest.raises(InputError, match="at the start the risk is 0 above its infimum"):
        recorder.record(0.0, 0.0)
    for p in model.parameters():
        p.grad.zero_()
    with pytest.raises(InputError, match="the slope 0: with one of them 0"):
        recorder.record(0.0, 1.0)
    model[1].inner.bias.data[0] = math.nan
    with pytest.raises(InputError, match=r"1\.inner\.bias has numbers that are not finite"):
        recorder.record(0.0, 1.0)
