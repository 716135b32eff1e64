"""How a model is to be read is said once: the example and the list of blocks that is meant."""

import copy

import pytest
import torch
from torch import Tensor, nn

from deeplimit import InputError, SoftCrossEntropy, StageCost, anatomy, crop, turnpike_profile


class Step(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(torch.relu(x))


class Towers(nn.Module):
    """Two lists of blocks; an input that nobody could guess."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.ModuleList(Step() for _ in range(2))
        self.second = nn.ModuleList(Step() for _ in range(3))
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(len(x), 3, 5).mean(1)
        for block in (*self.first, *self.second):
            x = block(x)
        return self.head(x)


X, Y = torch.linspace(-1, 1, 120).reshape(8, 15).sin(), torch.arange(8) % 3
LOSS = SoftCrossEntropy(3)


@pytest.mark.slow
def test_an_example_and_blocks_are_said_once() -> None:
    model = Towers().eval()
    with pytest.raises(InputError, match=r"does not run on an example made for it .*example=…"):
        StageCost(model, LOSS)
    assert anatomy(model, example=X).name == "second"
    assert "also there, for blocks=…: first" in str(anatomy(model))
    assert anatomy(model, blocks="first").horizon == 2
    for other in (model, copy.deepcopy(model), crop(model, 1)):
        assert anatomy(other).name == "first"
    cut = crop(model, 1)
    assert (len(cut.first), len(cut.second)) == (1, 3)
    with torch.no_grad():
        state = X.reshape(8, 3, 5).mean(1)
        states = [state, model.first[0](state)]
        states.append(model.first[1](states[1]))
        z = [model.head(nn.Sequential(*model.second)(x)) for x in states]
        assert torch.equal(cut(X), z[1])
        profile = turnpike_profile(model, [(X, Y)], LOSS)
        for n in range(3):
            assert profile.loss[n] == pytest.approx(float(LOSS(z[n], Y).mean()), rel=1e-6)
    cost, _ = StageCost(model, LOSS, 0.5)(X, Y)
    expected = LOSS(z[2], Y).mean() + 0.5 * sum(LOSS(one, Y).mean() for one in z[:2])
    assert float(cost.detach()) == pytest.approx(float(expected), rel=1e-6)


def test_a_list_that_is_not_there() -> None:
    with pytest.raises(InputError, match=r"blocks='third' given; .* found: first, second"):
        anatomy(Towers(), example=X, blocks="third")
