"""Chains among other layers of somebody's own model: their steps are the layers."""

import copy

import pytest
import torch
from torch import Tensor, nn

from deeplimit import (
    Heun,
    InputError,
    ResidualChain,
    SoftCrossEntropy,
    StageCost,
    anatomy,
    crop,
    refine,
    use_adjoint,
)
from deeplimit.control import Fading
from deeplimit.network import TwoLayerResidual

LOSS = SoftCrossEntropy(3)
X, Y = torch.linspace(-1, 1, 48, dtype=torch.float64).reshape(8, 6).sin(), torch.arange(8) % 3


class Held(nn.Module):
    """Two chains, with a layer before, between and behind them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.between, self.head = nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 3)
        self.first = ResidualChain([TwoLayerResidual(5, 7) for _ in range(3)], step=0.5)
        blocks = [TwoLayerResidual(4, 7, "tanh") for _ in range(4)]
        self.second = ResidualChain(blocks, step=0.3, scheme=Heun())
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(torch.tanh(self.stem(x)))
        return self.head(torch.relu(self.second(torch.tanh(self.between(x)))))


def walk(model: Held) -> tuple[list[Tensor], Tensor]:
    """The states x_0 … x_6 and their logits, one after the other."""
    first = model.first.trajectory(torch.tanh(model.stem(X)))
    second = model.second.trajectory(torch.tanh(model.between(first[-1])))
    carried = [torch.tanh(model.between(x)) for x in first[:-1]]
    z = torch.stack([model.head(torch.relu(x)) for x in (*carried, *second)])
    return [*first[:-1], *second], z


def test_states_and_logits_are_those_by_hand() -> None:
    model = Held()
    structure = anatomy(model)
    assert (structure.horizon, structure.stages) == (6, 2)
    assert structure.state_stages == (0, 0, 0, 1, 1, 1, 1)
    states, own = structure.states(X)
    expected, z = walk(model)
    assert all(map(torch.equal, states, expected))
    assert torch.equal(own, model(X))
    torch.testing.assert_close(structure.logits(states), z, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(structure.logits(states[2:4], 2), z[2:4], rtol=1e-13, atol=1e-14)


def test_a_cut_is_a_shorter_chain() -> None:
    model = Held()
    weights = copy.deepcopy(model.state_dict())
    cut = crop(model, 4)
    assert (cut.first.horizon, cut.second.horizon, type(cut)) == (3, 1, Held)
    torch.testing.assert_close(cut(X), walk(model)[1][4], rtol=1e-13, atol=1e-14)
    assert anatomy(crop(model, remove=[0, 3])).horizon == 4
    with torch.no_grad():
        for p in cut.parameters():
            p.zero_()
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("adjoint", [False, True])
def test_a_stage_cost_is_the_naive_sum(adjoint: bool) -> None:
    model = Held()
    losses = [LOSS(one, Y).mean() for one in walk(model)[1]]
    naive = losses[-1] + 0.3 * sum(losses[:-1])
    expected = torch.autograd.grad(naive, list(model.parameters()))
    if adjoint:
        use_adjoint(model, evaluations=60, on_drift="ignore")
    cost, logits = StageCost(model, LOSS, 0.3)(X, Y)
    cost.backward()
    assert torch.equal(logits, model(X))
    assert float(cost.detach()) == pytest.approx(float(naive), rel=1e-13)
    for p, theirs in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, theirs, rtol=1e-9, atol=1e-11)


def test_their_depth_changes() -> None:
    model = nn.Sequential(nn.Linear(6, 5), ResidualChain([TwoLayerResidual(5, 7) for _ in "ab"]))
    model.append(nn.Linear(5, 3)).double()
    deeper = refine(model, 4)
    assert (deeper[1].horizon, deeper[1].step) == (8, 0.25)
    assert (anatomy(deeper).horizon, anatomy(model).horizon) == (8, 2)
    torch.testing.assert_close(deeper(X), model(X), rtol=0.2, atol=0.2)


def test_a_list_may_be_named_all_the_same() -> None:
    with pytest.raises(InputError, match=r"blocks='nope' given"):
        anatomy(Held(), example=X, blocks="nope")


def test_another_model_is_run_as_this_one_is() -> None:
    model, other = Held(), Held()
    torch.nn.init.zeros_(other.head.bias)
    assert torch.equal(anatomy(model).runner(other)(X), other(X))
    assert not torch.equal(model(X), other(X))


class Block(nn.Module):
    """Holds a chain of its own, beside its input."""

    def __init__(self) -> None:
        super().__init__()
        self.chain = ResidualChain([TwoLayerResidual(5, 7) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.chain(x))


def test_chains_inside_blocks_are_parts_of_these() -> None:
    torch.manual_seed(0)
    blocks = [Block() for _ in range(3)]
    model = nn.Sequential(nn.Linear(6, 5), *blocks, nn.Linear(5, 3)).double()
    structure = anatomy(model)
    assert structure.blocks == tuple(blocks)
    states, _ = structure.states(X)
    torch.testing.assert_close(structure.logits(states)[1], model[4](states[1]))


def test_blocks_that_hold_chains_add_their_input_and_fade_to_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), *(Block() for _ in range(3)), nn.Linear(5, 3)).double()
    assert [(stack.horizon, stack.adds) for stack in anatomy(model).stacks] == [(3, True)]
    with Fading(model, [1]) as fade:
        fade.set_step(0.0)
        faded = model(X)
    assert torch.equal(faded, crop(model, remove=[1])(X))
