"""Kinetic energy and group norms as control costs, against sums written out layer by layer."""

import copy
from itertools import pairwise

import pytest
import torch
from model_families import CLASSES, FAMILIES, sample
from naive_networks import naive_chain
from text_families import BERT, next_words, padded, text_model
from torch import Tensor, nn

from deeplimit import ResidualChain, SoftCrossEntropy, StageCost, crop, use_adjoint
from deeplimit.network import CifarResNet

SOFTNESS, R = 0.1, 0.2
LOSS = SoftCrossEntropy(CLASSES, SOFTNESS)


def gradients(cost: Tensor, model: nn.Module) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    values = torch.autograd.grad(cost, list(named.values()), allow_unused=True)
    return {name: v for name, v in zip(named, values, strict=True) if v is not None}


def naive_moves(model: nn.Module, x: Tensor) -> list[Tensor]:
    """x_{n+1} − x_n of every layer, with x_{n+1} before what follows the layer."""
    if isinstance(model, CifarResNet):
        moves: list[Tensor] = []
        blocks = [b for stage in model.stages for b in stage if hasattr(b, "bn2")]

        def seen(_: nn.Module, args: tuple[Tensor], y: Tensor) -> None:
            moves.append(y - args[0] if y.shape == args[0].shape else torch.zeros(len(y), 1))

        handles = [block.register_forward_hook(seen) for block in blocks]
        model(x)
        for handle in handles:
            handle.remove()
        return moves
    if isinstance(model, ResidualChain):
        return [b - a for a, b in pairwise(naive_chain(model, x))]
    moves, x = [], model.stem(x)
    for m, chain in enumerate(model.stages):
        states = naive_chain(chain, x if m == 0 else model.projections[m - 1](x))
        moves, x = moves + [b - a for a, b in pairwise(states)], states[-1]
    return moves


def energy_of(moves: list[Tensor]) -> Tensor:
    """Σ_n of the mean over samples of the squares."""
    return torch.stack([sum((row**2).sum() for row in move) / len(move) for move in moves]).sum()


def kinetic(model: nn.Module, gamma: float = 0.3, **more: int) -> StageCost:
    return StageCost(model, LOSS, gamma, control_cost=R, control_cost_kind="kinetic", **more)


@pytest.mark.slow
@pytest.mark.parametrize("gamma", [0.0, 0.3])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_kinetic_energy_is_the_naive_one(name: str, gamma: float) -> None:
    family = sample(name)
    plain, naive = copy.deepcopy(family.model), copy.deepcopy(family.model)
    expected, _ = StageCost(plain, LOSS, gamma)(family.x, family.y)
    energy = R / 2 * energy_of(naive_moves(naive, family.x))
    cost, _ = kinetic(family.model, gamma)(family.x, family.y)
    assert float(energy.detach()) > 1e-3
    assert float(cost.detach()) == pytest.approx(float((expected + energy).detach()), rel=1e-12)
    with torch.no_grad():
        again, _ = kinetic(naive, gamma)(family.x, family.y)
    if not any(isinstance(m, nn.BatchNorm2d) for m in naive.modules()):  # else they have moved on
        assert float(again) == pytest.approx(float(cost.detach()), rel=1e-12)
    mine, theirs, moved = (
        gradients(cost, family.model),
        gradients(expected, plain),
        gradients(energy, naive),
    )
    for key in theirs | moved:
        whole = theirs.get(key, 0) + moved.get(key, 0)
        assert torch.allclose(mine[key], whole, rtol=1e-10, atol=1e-11), key


@pytest.mark.slow
@pytest.mark.parametrize("gamma", [0.0, 0.3])
@pytest.mark.parametrize("name", [name for name in FAMILIES if not name.startswith("CIFAR")])
def test_under_the_adjoint_it_is_charged_inside_the_replay(name: str, gamma: float) -> None:
    family = sample(name)
    for module in family.model.modules():
        if isinstance(module, ResidualChain):
            module.step = 0.02  # fixed points converge by about a digit per evaluation
    plain = kinetic(copy.deepcopy(family.model), gamma)
    mine = kinetic(use_adjoint(family.model, evaluations=12), gamma)
    mine.control_cost = plain.control_cost = 20.0  # of the size of the loss: steps are small here
    expected, _ = plain(family.x, family.y)
    cost, _ = mine(family.x, family.y)
    assert float(cost.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    theirs, others = gradients(expected, plain.model), gradients(cost, mine.model)
    assert others.keys() == theirs.keys()
    scale = max(float(g.abs().max()) for g in theirs.values())
    assert max(float((others[n] - theirs[n]).abs().max()) for n in theirs) < 1e-10 * scale


def test_the_energy_of_all_layers_counts_where_some_losses_are_drawn() -> None:
    family = sample("vector")
    drawn = StageCost(copy.deepcopy(family.model), LOSS, 0.3, layers=2)(family.x, family.y)[0]
    energy = R / 2 * energy_of(naive_moves(family.model, family.x))
    for model in (family.model, use_adjoint(copy.deepcopy(family.model))):
        cost, _ = kinetic(model, 0.3, layers=2)(family.x, family.y)
        assert float(cost.detach()) == pytest.approx(float((drawn + energy).detach()), rel=1e-12)


@pytest.mark.parametrize("kind", ["kinetic", "group"])
def test_a_network_without_layers_costs_what_it_loses(kind: str) -> None:
    family = sample("vector")
    empty = crop(family.model, 0)
    objective = StageCost(empty, LOSS, control_cost=R, control_cost_kind=kind)
    if kind == "group":
        objective.proximal(torch.optim.SGD(empty.parameters(), 0.1))
    cost, logits = objective(family.x, family.y)
    assert torch.equal(cost, LOSS.mean(logits, family.y))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "LlamaForCausalLM", BERT])
def test_of_tokens_those_count_that_are_no_padding(name: str) -> None:
    model, x = text_model(name), padded(seed=1)
    y = next_words(x) if name != BERT else torch.tensor([0, 1, 2])
    moves: list[Tensor] = []
    loss = SoftCrossEntropy(model(**x).logits.shape[-1], SOFTNESS)
    objective = StageCost(model, loss, 0.0, control_cost=R, control_cost_kind="kinetic")
    handles = [
        block.register_forward_hook(
            lambda _, args, y: moves.append((y if isinstance(y, Tensor) else y[0]) - args[0])
        )
        for block in objective.anatomy.blocks
    ]
    plain = loss.mean(model(**x).logits, y)
    for handle in handles:
        handle.remove()
    counts = y != -100 if y.dim() == 2 else x["attention_mask"] == 1
    assert 0 < int(counts.sum()) < counts.numel()
    energy = R / 2 * sum((move[counts] ** 2).sum() / counts.sum() for move in moves)
    cost, _ = objective(x, y)
    assert float(cost.detach()) == pytest.approx(float((plain + energy).detach()), rel=1e-12)
    mine, theirs = (
        torch.autograd.grad(c, list(model.parameters()), allow_unused=True)
        for c in (cost, plain + energy)
    )
    for a, b in zip(mine, theirs, strict=True):
        assert (a is None and b is None) or torch.allclose(a, b, rtol=1e-10, atol=1e-12)
