"""A model that is read by bypass and inject is left as it was, and wrappers are looked through."""

import copy

import pytest
import torch
from torch import Tensor, nn

from deeplimit import SoftCrossEntropy, StageCost, anatomy, crop

LOSS = SoftCrossEntropy(3)
X, Y = torch.linspace(-1, 1, 48, dtype=torch.float64).reshape(8, 6).sin(), torch.arange(8) % 3


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear, self.drop = nn.BatchNorm1d(5), nn.Linear(5, 5), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(torch.tanh(self.linear(self.norm(x))))


class Net(nn.Module):
    """Norms and dropout before, in and behind the blocks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.2))
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Sequential(nn.BatchNorm1d(5), nn.Dropout(0.2), nn.Linear(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_the_second_forward_leaves_no_trace() -> None:
    model = Net().double().train()
    structure = anatomy(model)
    states, _ = structure.states(X)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda *_: seen.append(1))
    structure.logits(states, x=X)
    assert seen == []
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(kept[name], value) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not any("_compiled_call_impl" in vars(module) for module in model.modules())


def test_a_step_draws_and_moves_what_the_model_alone_does() -> None:
    model = Net().double().train()
    stage_cost = StageCost(copy.deepcopy(model), LOSS, 0.3)
    torch.manual_seed(1)
    expected, then = model(X), torch.rand(3)
    torch.manual_seed(1)
    _, logits = stage_cost(X, Y)
    assert torch.equal(logits, expected)
    assert torch.equal(torch.rand(3), then)
    mine, theirs = stage_cost.model.state_dict(), model.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_a_model_in_evaluation_mode_is_not_told_again() -> None:
    """Some drop what they keep of their parameters then."""

    class Told(Net):
        told = 0

        def train(self, mode: bool = True) -> nn.Module:
            self.told += 1
            return super().train(mode)

    model = Told().double().eval()
    before = model.told
    anatomy(model)
    assert model.told == before


@pytest.mark.slow
def test_wrappers_are_looked_through() -> None:
    model = Net().double().eval()
    for wrapped in (torch.compile(model), nn.DataParallel(model)):
        assert anatomy(wrapped).model is model
        assert torch.equal(crop(wrapped, 2)(X), crop(model, 2)(X))
    compiled = copy.deepcopy(model)
    for block in compiled.blocks:
        block.compile(backend="eager")
    with torch.no_grad():
        states, _ = anatomy(compiled).states(X)
        z = anatomy(compiled).logits(states)
        expected = anatomy(model).logits(anatomy(model).states(X)[0])
    assert all(block._compiled_call_impl is not None for block in compiled.blocks)
    torch.testing.assert_close(z, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpoints_of_transformers(reentrant: bool) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = transformers.LlamaForCausalLM(config).double().train()
    x = torch.arange(14).reshape(2, 7) + 3
    gradients = []
    for checkpointed in (False, True):
        other = copy.deepcopy(model)
        if checkpointed:
            options = {"use_reentrant": reentrant}
            other.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        StageCost(other, SoftCrossEntropy(50), 0.3, shift=True)(x, x)[0].backward()
        gradients.append([p.grad for p in other.parameters()])
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-13)
