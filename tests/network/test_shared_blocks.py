"""One module called again and again: read as its unrolled layers, cut by a smaller count."""

import pytest
import torch
from torch import Tensor, nn

from deeplimit import InputError, SoftCrossEntropy, StageCost, anatomy, crop, use_adjoint

LOSS = SoftCrossEntropy(3)
X, Y = torch.linspace(-1, 1, 48, dtype=torch.float64).reshape(8, 6).sin(), torch.arange(8) % 3


class Step(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.5 * torch.tanh(self.linear(x))


class Loop(nn.Module):
    """A weight-shared recurrence; says of itself how long it is, or does not."""

    def __init__(self, counted: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.step, self.head = nn.Linear(6, 5), Step(), nn.Linear(5, 3)
        if counted:
            self.num_layers = 4

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(getattr(self, "num_layers", 4)):
            x = self.step(x)
        return self.head(x)


def unrolled(model: Loop) -> list[Tensor]:
    """The logits of x_0 … x_4."""
    x = model.stem(X)
    z = [model.head(x)]
    for _ in range(4):
        x = model.step(x)
        z.append(model.head(x))
    return z


@pytest.mark.parametrize("counted", [True, False])
def test_each_call_is_a_layer(counted: bool) -> None:
    model = Loop(counted).double()
    structure = anatomy(model)
    assert (structure.horizon, structure.stages, structure.name) == (4, 1, "step")
    states, own = structure.states(X)
    z = unrolled(model)
    assert torch.equal(own, z[4])
    torch.testing.assert_close(structure.logits(states), torch.stack(z), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("adjoint", [False, True])
def test_a_stage_cost_is_that_of_the_unrolled_layers(adjoint: bool) -> None:
    model = Loop(True).double()
    z = unrolled(model)
    naive = LOSS(z[4], Y).mean() + 0.3 * sum(LOSS(one, Y).mean() for one in z[:4])
    expected = torch.autograd.grad(naive, list(model.parameters()))
    if adjoint:
        use_adjoint(model, blocks=["step"], evaluations=40, on_drift="ignore")
    cost, logits = StageCost(model, LOSS, 0.3)(X, Y)
    cost.backward()
    assert torch.equal(logits, z[4])
    assert float(cost) == pytest.approx(float(naive), rel=1e-13)
    for p, theirs in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_a_cut_is_a_smaller_count() -> None:
    model = Loop(True).double()
    z = unrolled(model)
    for depth in (1, 2, 3):
        cut = crop(model, depth)
        assert (cut.num_layers, model.num_layers) == (depth, 4)
        assert torch.equal(cut(X), z[depth])
        assert anatomy(crop(model, 2)).horizon == 2
    with pytest.raises(InputError, match=r"calls of one Step, .* none can be removed"):
        crop(Loop(False).double(), 2)


@pytest.mark.slow
def test_albert(tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.AlbertConfig(
        vocab_size=50,
        hidden_size=16,
        embedding_size=8,
        num_hidden_layers=5,
        num_attention_heads=2,
        intermediate_size=24,
    )
    model = transformers.AlbertForSequenceClassification(config).double().eval()
    x = {"input_ids": torch.arange(14).reshape(2, 7) + 5}
    structure = anatomy(model)
    with torch.no_grad():
        states, own = structure.states(x)
        z = structure.logits(states, x=x)
        assert torch.equal(own, model(**x).logits)
        for depth in (1, 3):
            crop(model, depth).save_pretrained(tmp_path / str(depth))
            again = type(model).from_pretrained(tmp_path / str(depth), dtype=torch.float64).eval()
            assert again.config.num_hidden_layers == depth
            torch.testing.assert_close(again(**x).logits, z[depth], rtol=1e-12, atol=1e-13)
