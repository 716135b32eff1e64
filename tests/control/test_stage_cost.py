"""The objective of a stage cost, computed at once, against the sum written out layer by layer."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from model_families import FAMILIES, Sample, sample
from naive_networks import naive_logits, naive_walk
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DataParallel, DistributedDataParallel

from deeplimit import InputError, ResidualChain, SoftCrossEntropy, StageCost, anatomy, crop
from deeplimit.network import CifarResNet
from deeplimit.network.blocks import ConvolutionalResidual

CLASSES, SOFTNESS = 4, 0.1
OF_LAYERS = (0.3, 0.0, 0.7)  # in turn
WEIGHTS = [(0.0, 0.0), (0.3, 0.0), (0.0, 0.2), (0.3, 0.2), (OF_LAYERS, 0.2)]

Weight = float | tuple[float, ...]


def naive_loss(z: Tensor, y: Tensor) -> Tensor:
    """mean_i −Σ_c q_c log softmax(z^i)_c."""
    total = torch.zeros((), dtype=z.dtype)
    for row, target in zip(z, y.tolist(), strict=True):
        log_softmax = row - torch.logsumexp(row, 0)
        for c in range(CLASSES):
            q = 1 - SOFTNESS if c == target else SOFTNESS / (CLASSES - 1)
            total = total - q * log_softmax[c]
    return total / len(y)


def test_a_large_batch_in_half_precision_has_a_finite_cost() -> None:
    family = sample("vector")  # 4 layers of 4096 samples: sums beyond 65504 in float16
    x, y = family.x.repeat(700, 1)[:4096], family.y.repeat(700)[:4096]
    objective = StageCost(family.model, SoftCrossEntropy(CLASSES, SOFTNESS), 5.0, control_cost=0.0)
    with torch.no_grad():
        family.model.head.bias.add_(torch.tensor([0.0, 30.0, 0.0, 0.0]))
        cost = objective(x, y)[0]
        half = objective.to(torch.float16)(x.half(), y)[0]
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(cost.item(), rel=1e-2)


def naive_controls(model: nn.Module) -> list[nn.Parameter]:
    """What a control cost acts on, by hand: each block's last norm, or all of it."""
    if isinstance(model, CifarResNet):
        return [
            p
            for stage in model.stages
            for b in stage
            if hasattr(b, "bn2")
            for p in b.bn2.parameters()
        ]
    found: list[nn.Parameter] = []
    for chain in [model] if isinstance(model, ResidualChain) else model.stages:
        if len(chain) < chain.scheme.nodes:
            continue
        for block in chain:
            normed = isinstance(block, ConvolutionalResidual) and len(
                list(block.norm2.parameters())
            )
            found += list((block.norm2 if normed else block).parameters())
    return found


def naive_cost(
    model: nn.Module, x: Tensor, y: Tensor, gamma: Weight, r: float
) -> tuple[Tensor, Tensor]:
    """(4): the terminal cost on the model's own forward, then one layer after the other."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and m.training]
    before = [(m.running_mean.clone(), m.running_var.clone()) for m in norms]
    walk, logits = naive_walk(model, x)
    cost = naive_loss(logits, y)
    after = [(m.running_mean, m.running_var) for m in norms]  # the forward has moved them
    for norm, (mean, var) in zip(norms, before, strict=True):
        norm.eval()
        norm.running_mean, norm.running_var = mean, var
    for n, (stage, state) in enumerate(walk[:-1]):
        weight = gamma[n % 3] if isinstance(gamma, tuple) else gamma
        cost = cost + weight * naive_loss(naive_logits(model, stage, state), y)
    for norm, (mean, var) in zip(norms, after, strict=True):
        norm.train()
        norm.running_mean, norm.running_var = mean, var
    for theta in naive_controls(model):
        cost = cost + r / 2 * (theta**2).sum()
    return cost, logits


def gradients(cost: Tensor, model: nn.Module) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    values = torch.autograd.grad(cost, list(named.values()), allow_unused=True)
    return {name: v for name, v in zip(named, values, strict=True) if v is not None}


def stage_cost_of(model: nn.Module, gamma: Weight = 0.3, r: float = 0.2) -> StageCost:
    if isinstance(gamma, tuple):
        gamma = tuple(gamma[n % 3] for n in range(anatomy(model).horizon))
    return StageCost(model, SoftCrossEntropy(CLASSES, SOFTNESS), gamma, control_cost=r)


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("gamma", "r"), WEIGHTS)
def test_cost_and_gradients_are_the_naive_ones(
    family: Sample, gamma: Weight, r: float, training: bool
) -> None:
    model = family.model.train(training)
    naive = copy.deepcopy(model)
    expected, naive_output = naive_cost(naive, family.x, family.y, gamma, r)
    cost, logits = stage_cost_of(model, gamma, r)(family.x, family.y)
    assert cost.shape == ()
    assert float(cost.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    assert torch.allclose(logits, naive_output, rtol=1e-11, atol=1e-12)
    mine, theirs = gradients(cost, model), gradients(expected, naive)
    assert mine.keys() == theirs.keys()
    scale = max(float(g.abs().max()) for g in theirs.values())
    for name, gradient in theirs.items():
        assert float((mine[name] - gradient).abs().max()) <= 1e-12 * max(scale, 1), name


def test_running_statistics_move_once_and_as_in_a_plain_forward(family: Sample) -> None:
    model = family.model.train()
    plain = copy.deepcopy(model)
    logits = plain(family.x)
    cost, mine = stage_cost_of(model)(family.x, family.y)
    assert torch.equal(mine, logits)
    for (name, buffer), (_, other) in zip(
        model.named_buffers(), plain.named_buffers(), strict=True
    ):
        assert torch.equal(buffer, other), name
        if name.endswith("num_batches_tracked"):
            # A Heun step evaluates both of its controls: an inner one is met twice per forward.
            assert buffer == 8 or "Heun" in family.name
    assert all(module.training for module in model.modules())
    cost.backward()


def test_two_costs_before_one_backward() -> None:
    """Gradient of a sum, although the second forward moves the running statistics of the first."""
    family = sample("three stages, batch")
    naive = copy.deepcopy(family.model)
    stage_cost = stage_cost_of(family.model)
    halves = [(family.x[:3], family.y[:3]), (family.x[3:], family.y[3:])]
    total = sum(stage_cost(x, y)[0] for x, y in halves)
    expected = sum(naive_cost(naive, x, y, 0.3, 0.2)[0] for x, y in halves)
    assert float(total.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    mine, theirs = gradients(total, family.model), gradients(expected, naive)
    assert all(torch.allclose(mine[n], theirs[n], rtol=1e-10, atol=1e-11) for n in theirs)


def test_a_network_without_layers_has_its_terminal_cost() -> None:
    family = sample("vector")
    empty = crop(family.model, 0)
    cost, logits = stage_cost_of(empty)(family.x, family.y)
    assert float(cost.detach()) == pytest.approx(
        float(naive_loss(logits.detach(), family.y)), rel=1e-12
    )


def test_neighbouring_heun_steps_share_a_control_and_it_counts_once() -> None:
    family = sample("chain, Heun")
    chain = family.model
    plain, _ = stage_cost_of(chain, 0.3, 0.0)(family.x, family.y)
    with_control, _ = stage_cost_of(chain, 0.3, 0.2)(family.x, family.y)
    every = sum(float(p.detach().square().sum()) for block in chain for p in block.parameters())
    assert float((with_control - plain).detach()) == pytest.approx(0.1 * every, rel=1e-12)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_inner_models_keys_are_the_models(name: str) -> None:
    family = sample(name)
    keys = list(family.model.state_dict())
    stage_cost = stage_cost_of(family.model)
    stage_cost(family.x, family.y)[0].backward()
    assert list(stage_cost.model.state_dict()) == keys
    assert list(stage_cost.state_dict()) == [f"model.{key}" for key in keys]
    assert stage_cost.model is family.model


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies_look_into_their_own_model(copier) -> None:
    family = sample("three stages, group")
    stage_cost = stage_cost_of(family.model)
    cost, _ = stage_cost(family.x, family.y)
    other = copier(stage_cost)
    assert other.anatomy.model is other.model
    with torch.no_grad():
        for parameter in family.model.parameters():
            parameter.zero_()
    again, _ = other(family.x, family.y)
    assert torch.equal(again, cost)


def test_repr_says_the_weights() -> None:
    model = sample("chain").model
    assert "weight=0.3, control_cost=0.2" in repr(stage_cost_of(model))
    assert "weight=(0.3, 0, 0.7, 0.3, 0), control_cost=0.2" in repr(stage_cost_of(model, OF_LAYERS))


def test_weights_are_set_between_steps() -> None:
    family = sample("three stages, batch")
    family.model.eval()
    objective = stage_cost_of(family.model)
    for weight in (0.0, 0.7, [0.1, 0.0, 0.0, 2.0, 0.3], torch.linspace(0, 1, 5), torch.tensor(0.2)):
        objective.weight = weight
        fresh = StageCost(family.model, objective.loss, weight, control_cost=0.2)
        assert torch.equal(objective(family.x, family.y)[0], fresh(family.x, family.y)[0])
    with pytest.raises(InputError, match=r"weight γ is -1.0; expected a number ≥ 0"):
        objective.weight = -1.0
    assert objective.weight == pytest.approx(0.2)


def test_states_whose_weight_is_zero_do_not_meet_the_head() -> None:
    family = sample("vector")
    met = []
    family.model.head.register_forward_hook(lambda _, args, __: met.append(len(args[0])))
    for gamma, states in ((0.3, [4]), (OF_LAYERS, [3]), (0.0, [])):
        met.clear()
        stage_cost_of(family.model, gamma)(family.x, family.y)
        assert met == [len(family.y), *(n * len(family.y) for n in states)]


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_weights_that_are_no_numbers_at_least_zero_are_refused(value: float) -> None:
    model = sample("chain").model
    with pytest.raises(InputError, match=r"weight γ is .* ≥ 0"):
        stage_cost_of(model, value, 0.0)
    with pytest.raises(InputError, match=r"control cost r is .* ≥ 0"):
        stage_cost_of(model, 0.1, value)
    with pytest.raises(InputError, match=r"weight γ_1 is .* ≥ 0"):
        stage_cost_of(model, (0.1, value, 0.2), 0.0)


def test_as_many_weights_as_there_are_no_layers_are_refused() -> None:
    with pytest.raises(InputError, match=r"^2 weights γ given; .*, or one for each of the 5 layer"):
        StageCost(sample("chain").model, SoftCrossEntropy(CLASSES), [0.1, 0.2])


def test_models_without_anatomy_are_refused() -> None:
    with pytest.raises(InputError, match="no stack of blocks in Linear"):
        stage_cost_of(nn.Linear(4, 4))


def test_a_loss_of_other_classes_is_refused() -> None:
    family = sample("chain")
    with pytest.raises(InputError, match=r"expected \[\.\.\., 5\]"):
        StageCost(family.model, SoftCrossEntropy(5), 0.1)(family.x, family.y)


@pytest.fixture
def one_process():
    """A gloo group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def _fsdp(model: nn.Module) -> nn.Module:
    return fully_shard(model, mesh=init_device_mesh("cpu", (1,)))


@pytest.mark.parametrize("wrap", [_ddp, _fsdp, DataParallel])
def test_a_wrapped_model_is_refused(wrap, one_process: None) -> None:
    with pytest.raises(InputError, match=r"is wrapped in \w+ already; .* then wrap the StageCost"):
        stage_cost_of(wrap(sample("vector").model))
    inside = sample("vector").model
    inside.head = wrap(inside.head)
    with pytest.raises(InputError, match="is wrapped in"):
        stage_cost_of(inside)


@pytest.mark.parametrize("gamma", [0.3, OF_LAYERS])
@pytest.mark.parametrize("name", ["vector, Heun", "three stages, group"])
@pytest.mark.parametrize("wrap", [_ddp, _fsdp])
def test_it_is_what_is_wrapped(name: str, wrap, gamma: Weight, one_process: None) -> None:
    family = sample(name)
    plain = stage_cost_of(copy.deepcopy(family.model), gamma)
    cost, _ = plain(family.x, family.y)
    cost.backward()
    inner = stage_cost_of(family.model, gamma)
    wrapped = wrap(inner)
    other, logits = wrapped(family.x, family.y)
    other.backward()
    assert float(other.detach()) == pytest.approx(float(cost.detach()), rel=1e-13)
    assert logits.shape == (len(family.y), CLASSES)
    for mine, theirs in zip(inner.model.parameters(), plain.model.parameters(), strict=True):
        gradient = mine.grad.full_tensor() if hasattr(mine.grad, "full_tensor") else mine.grad
        assert torch.allclose(gradient, theirs.grad, rtol=1e-11, atol=1e-12)
