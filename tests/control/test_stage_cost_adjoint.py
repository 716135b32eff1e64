"""The stage cost with states rebuilt in the backward pass, against the stage cost with all kept."""

import copy
import json

import pytest
import torch
from bare_process import BareProcess
from model_families import FAMILIES, Sample, sample
from torch import Tensor, nn

from deeplimit import (
    ResidualChain,
    SoftCrossEntropy,
    StageCost,
    anatomy,
    drift,
    gradient_error,
    turnpike_profile,
    use_adjoint,
    use_backprop,
)
from deeplimit.gradient import layout

CLASSES, SOFTNESS = 4, 0.1
OURS = [name for name in FAMILIES if not name.startswith("CIFAR")]


def contracting(name: str, step: float = 0.02) -> Sample:
    """A model whose fixed points converge by about a digit per evaluation."""
    family = sample(name)
    for module in family.model.modules():
        if isinstance(module, ResidualChain):
            module.step = step
    return family


def stage_cost_of(
    model: nn.Module, gamma: float | tuple[float, ...] = 0.3, r: float = 0.2
) -> StageCost:
    if isinstance(gamma, tuple):
        gamma = tuple(gamma[n % 3] for n in range(anatomy(model).horizon))
    return StageCost(model, SoftCrossEntropy(CLASSES, SOFTNESS), gamma, control_cost=r)


def gradients(cost: Tensor, model: nn.Module) -> dict[str, Tensor]:
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    values = torch.autograd.grad(cost, list(named.values()), allow_unused=True)
    return {name: v for name, v in zip(named, values, strict=True) if v is not None}


def relative_error(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert mine.keys() == theirs.keys()
    gap = torch.stack([(mine[n] - theirs[n]).square().sum() for n in theirs]).sum()
    return float((gap / torch.stack([g.square().sum() for g in theirs.values()]).sum()).sqrt())


def worst_error(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Of a parameter by itself, against the largest gradient of all."""
    assert mine.keys() == theirs.keys()
    scale = max(float(g.abs().max()) for g in theirs.values())
    return max(float((mine[n] - theirs[n]).abs().max()) for n in theirs) / scale


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gamma", "r", "training"),
    [(0.3, 0.2, True), (0.3, 0.0, False), ((0.0, 0.3, 0.7), 0.2, True)],
)
@pytest.mark.parametrize("name", OURS)
def test_many_evaluations_give_the_plain_cost_and_its_gradients(
    name: str, gamma: float | tuple[float, ...], r: float, training: bool
) -> None:
    family = contracting(name)
    plain = stage_cost_of(copy.deepcopy(family.model).train(training), gamma, r)
    mine = stage_cost_of(use_adjoint(family.model.train(training), evaluations=12), gamma, r)
    expected, expected_logits = plain(family.x, family.y)
    cost, logits = mine(family.x, family.y)
    assert float(cost.detach()) == pytest.approx(float(expected.detach()), rel=1e-13)
    assert torch.equal(logits, expected_logits)
    theirs = gradients(expected, plain.model)
    assert worst_error(gradients(cost, mine.model), theirs) < 1e-10
    for (which, buffer), (_, other) in zip(
        mine.model.named_buffers(), plain.model.named_buffers(), strict=True
    ):
        assert torch.equal(buffer, other), which
    assert all(module.training == training for module in mine.model.modules())


@pytest.mark.slow
@pytest.mark.parametrize("name", OURS)
def test_two_evaluations_give_the_error_that_is_reported(name: str) -> None:
    family = contracting(name, 0.1)
    plain = stage_cost_of(copy.deepcopy(family.model))
    mine = stage_cost_of(use_adjoint(family.model, evaluations=2, on_drift="ignore"))
    batch = (family.x, family.y)
    reported = gradient_error(mine, lambda stage_cost, b: stage_cost(*b)[0], batch)
    expected, _ = plain(*batch)
    assert reported.loss == pytest.approx(float(expected.detach()), rel=1e-13)
    theirs = gradients(expected, plain.model)
    error = relative_error(gradients(mine(*batch)[0], mine.model), theirs)
    assert error == pytest.approx(reported.error, rel=1e-6, abs=1e-14)
    assert drift(mine) == pytest.approx(reported.drift, rel=1e-6)
    rebuilt = any(c.horizon > 2 for c in mine.modules() if isinstance(c, ResidualChain))
    if rebuilt and name != "convolutional, group":  # a mean of normed pixels is the bias, exactly
        assert 1e-12 < error < 4 * reported.drift
    else:
        assert error < 1e-12


def test_a_classifiers_steps_are_what_is_rebuilt_and_nothing_around_them() -> None:
    """Not a chain as a whole besides: its steps would be checkpoints in a checkpoint."""
    family = contracting("three stages, batch")
    stage_cost = stage_cost_of(use_adjoint(family.model))
    stage_cost(family.x, family.y)[0].backward()
    found = layout(stage_cost)
    assert found.rebuilt == ("stages.0.0", "stages.0.1", "stages.1.0", "stages.2.0", "stages.2.1")
    assert set(found.plain) == {"projections.0", "projections.1"}
    assert found.waiting == ()


@pytest.mark.parametrize("name", ["chain", "three stages, batch"])
def test_without_gradients_the_cost_is_the_same(name: str) -> None:
    family = contracting(name)
    stage_cost = stage_cost_of(use_adjoint(family.model.eval()))
    expected, _ = stage_cost(family.x, family.y)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            cost, _ = stage_cost(family.x, family.y)
        assert float(cost) == pytest.approx(float(expected.detach()), rel=1e-13)


@pytest.mark.parametrize("name", ["vector", "three stages, batch", "three stages, batch, Heun"])
@pytest.mark.parametrize("trained", ["head", "stages", "stem and head"])
def test_parts_of_the_network_frozen(name: str, trained: str) -> None:
    family = contracting(name)
    for parameter_name, parameter in family.model.named_parameters():
        parameter.requires_grad_(parameter_name.split(".")[0] in trained)
    plain = stage_cost_of(copy.deepcopy(family.model), r=0.0)
    mine = stage_cost_of(use_adjoint(family.model, evaluations=12), r=0.0)
    theirs = gradients(plain(family.x, family.y)[0], plain.model)
    assert {n.split(".")[0] for n in theirs} <= set(trained.split(" and "))
    assert worst_error(gradients(mine(family.x, family.y)[0], mine.model), theirs) < 1e-10


@pytest.mark.slow
def test_two_costs_before_one_backward() -> None:
    """The second forward moves the running statistics that the first one's replay must not see."""
    family = contracting("three stages, batch")
    plain = stage_cost_of(copy.deepcopy(family.model))
    mine = stage_cost_of(use_adjoint(family.model, evaluations=12))
    halves = [(family.x[:3], family.y[:3]), (family.x[3:], family.y[3:])]
    expected = sum(plain(*half)[0] for half in halves)
    total = sum(mine(*half)[0] for half in halves)
    assert float(total.detach()) == pytest.approx(float(expected.detach()), rel=1e-13)
    theirs = gradients(expected, plain.model)
    assert worst_error(gradients(total, mine.model), theirs) < 1e-10


@pytest.mark.slow
def test_steps_of_an_optimiser_keep_to_the_plain_ones() -> None:
    family = contracting("three stages, batch")
    plain = stage_cost_of(copy.deepcopy(family.model))
    mine = stage_cost_of(use_adjoint(family.model, evaluations=12))
    for stage_cost in (plain, mine):
        optimizer = torch.optim.SGD(stage_cost.parameters(), lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            stage_cost(family.x, family.y)[0].backward()
            optimizer.step()
    states = zip(mine.state_dict().items(), plain.state_dict().values(), strict=True)
    for (which, value), other in states:
        assert torch.allclose(value, other, rtol=1e-9, atol=1e-11), which


def test_a_copy_goes_on_by_itself_and_backprop_comes_back() -> None:
    family = contracting("three stages, group")
    mine = stage_cost_of(use_adjoint(family.model))
    other = copy.deepcopy(mine)
    with torch.no_grad():
        for parameter in mine.model.parameters():
            parameter.zero_()
    plain = use_backprop(copy.deepcopy(other))
    assert not plain.anatomy.replayed
    assert other.anatomy.replayed
    expected, _ = plain(family.x, family.y)
    cost, _ = other(family.x, family.y)
    assert float(cost.detach()) == pytest.approx(float(expected.detach()), rel=1e-13)
    error = relative_error(gradients(cost, other.model), gradients(expected, plain.model))
    assert 0 < error < 1e-3


@pytest.mark.parametrize("name", ["chain, Heun", "vector", "three stages, batch"])
def test_a_switched_model_has_the_same_profile(name: str) -> None:
    family = contracting(name)
    loader, loss = [(family.x, family.y)], SoftCrossEntropy(CLASSES, SOFTNESS)
    before = turnpike_profile(family.model, loader, loss)
    after = turnpike_profile(use_adjoint(family.model), loader, loss)
    assert repr(after) == repr(before)  # every digit; NaN for a class without samples


PEAK = """
import json, sys
import torch
from torch.profiler import profile, ProfilerActivity
from deeplimit import SoftCrossEntropy, StageCost, use_adjoint
from deeplimit.network import Architecture

def peak(depth, adjoint):
    torch.manual_seed(0)
    depths = (depth // 2, depth // 2)
    model = Architecture("convolutional", (3, 8, 8), 4, depths, 8, 8, reduction=1).build()
    stage_cost = StageCost(use_adjoint(model) if adjoint else model, SoftCrossEntropy(4, 0.1), 0.3)
    x, y = torch.rand(128, 3, 8, 8), torch.arange(128) % 4
    stage_cost(x, y)[0].backward()  # gradients exist from here on
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        stage_cost(x, y)[0].backward()
    at = most = 0
    for event in sorted(seen.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            at += event.nbytes()
            most = max(most, at)
    return most

torch.set_num_threads(1)
print(json.dumps([[peak(depth, adjoint) for depth in (8, 32)] for adjoint in (False, True)]))
"""


@pytest.mark.slow
@pytest.mark.processes
def test_memory_is_flat_in_depth(bare_process: BareProcess) -> None:
    """Peak of what is allocated in a step, 4 × the layers; parameters and gradients are not."""
    (plain_8, plain_32), (adjoint_8, adjoint_32) = json.loads(bare_process.run(PEAK).stdout)
    assert plain_32 > 2.5 * plain_8
    assert adjoint_32 < 1.1 * adjoint_8
    assert adjoint_8 < plain_8 / 2
