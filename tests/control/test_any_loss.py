"""Stage costs of losses that are not the soft cross-entropy, and of models that do not classify."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deeplimit import InputError, StageCost, anatomy, dissipativity, use_adjoint

X = torch.linspace(-1, 1, 48, dtype=torch.float64).reshape(8, 6).sin()
Y = torch.arange(8) % 3


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.4 * torch.tanh(self.linear(x))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    blocks = [Block() for _ in range(4)]
    return nn.Sequential(nn.Linear(6, 5), *blocks, nn.Linear(5, 3)).double()


def outputs(model: nn.Sequential) -> list[Tensor]:
    stem, *blocks, head = model
    states = [stem(X)]
    for block in blocks:
        states.append(block(states[-1]))
    return [head(x) for x in states]


def pairwise_loss(z: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Of embeddings: near for equal labels, and weighted by something of the batch."""
    near = F.normalize(z, dim=1) @ F.normalize(z, dim=1).T
    same = (batch["y"][:, None] == batch["y"]).double()
    return ((near - same).square() * batch["weight"]).mean()


LOSSES = {
    "regression": (nn.MSELoss(), X[:, :3] ** 2),
    "classes with weights": (nn.CrossEntropyLoss(torch.tensor([1.0, 2, 3]).double()), Y),
    "embeddings": (pairwise_loss, {"y": Y, "weight": torch.linspace(0, 1, 8).double()}),
}


@pytest.mark.parametrize("weight", [0.3, (0.0, 0.3, 0.1, 0.8)])
@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_the_cost_is_the_sum_over_layers(
    name: str, adjoint: bool, weight: float | tuple[float, ...]
) -> None:
    loss, y = LOSSES[name]
    model = network()
    *below, last = outputs(model)
    every = weight if isinstance(weight, tuple) else [weight] * 4
    naive = loss(last, y) + sum(w * loss(z, y) for w, z in zip(every, below, strict=True))
    expected = torch.autograd.grad(naive, list(model.parameters()))
    if adjoint:
        use_adjoint(model, evaluations=40, on_drift="ignore")
    cost, z = StageCost(model, loss, weight)(X, y)
    cost.backward()
    assert torch.equal(z, last)
    assert float(cost) == pytest.approx(float(naive), rel=1e-13)
    for p, theirs in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("head", ["QuestionAnswering", "MaskedLM", "Model"])
def test_every_head_of_transformers(head: str) -> None:
    """Two logits a token, logits of a vocabulary, none at all."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=24,
    )
    cls = getattr(transformers, "BertModel" if head == "Model" else f"BertFor{head}")
    model = cls(config).double().eval()
    ids = torch.arange(14).reshape(2, 7) + 5
    x = {"input_ids": ids, "attention_mask": (ids != 18).long()}

    def loss(z: Tensor, y: Tensor) -> Tensor:
        if head == "QuestionAnswering":
            return F.cross_entropy(z[..., 0], y[:, 0]) + F.cross_entropy(z[..., 1], y[:, 1])
        return (F.cosine_similarity(z[:, 0], z[:, 1]) * y[:, 0]).mean() + z.square().mean()

    def answer(one: nn.Module) -> Tensor:
        out = one(**x)
        if head == "QuestionAnswering":
            return torch.stack([out.start_logits, out.end_logits], -1)
        return out[0]

    y = torch.tensor([[1, 4], [0, 6]])
    cut = [anatomy(model).without(range(k, 3)) for k in (1, 2)]
    weights = (0.3, 0.0, 0.5)
    cost, z = StageCost(model, loss, weights)(x, y)
    states, _ = anatomy(model).states(x)
    bottom = anatomy(model).logits(states[:1], x=x)[0]
    below = (loss(bottom, y), *(loss(answer(one), y) for one in cut))
    naive = loss(z, y) + sum(w * one for w, one in zip(weights, below, strict=True))
    assert torch.equal(z, answer(model))
    assert float(cost.detach()) == pytest.approx(float(naive.detach()), rel=1e-12)
    cost.backward()
    mine = next(model.parameters()).grad
    assert float(mine.abs().max()) > 0


@pytest.mark.parametrize("tokens", [4, 3], ids=["", "as many tokens as classes"])
@pytest.mark.parametrize("ignored", [-100, 1])
def test_the_cross_entropy_of_tokens_is_pytorchs(tokens: int, ignored: int) -> None:
    """Classes come last in the logits; as inputs, targets are shifted like those of any loss."""
    torch.manual_seed(0)
    body = [nn.Embedding(3, 5), *(Block() for _ in range(4)), nn.Linear(5, 3)]
    model, x = nn.Sequential(*body).double(), torch.arange(6 * tokens).reshape(6, -1) ** 2 % 5 % 3
    y = torch.cat([x[:, 1:], torch.full_like(x[:, :1], ignored)], 1)
    stem, *blocks, head = model
    states = [stem(x)]
    for block in blocks:
        states.append(block(states[-1]))
    loss = nn.CrossEntropyLoss(torch.tensor([1.0, 2, 3]).double(), ignore_index=ignored)
    *below, last = (loss(head(s).flatten(0, 1), y.flatten()) for s in states)
    for shift, targets in ((False, y), (True, x)):
        cost, _ = StageCost(model, loss, 0.3, shift=shift)(x, targets)
        assert float(cost) == pytest.approx(float(last + 0.3 * sum(below)), rel=1e-12)


def test_losses_that_are_none_are_refused() -> None:
    model = network()
    with pytest.raises(InputError, match=r"the loss returned shape \[8, 3\] for outputs of shape"):
        StageCost(model, nn.MSELoss(reduction="none"))(X, X[:, :3])
    with pytest.raises(InputError, match="given as the loss; expected SoftCrossEntropy"):
        StageCost(model, nn.MSELoss)
    with pytest.raises(InputError, match="shift=True given with a loss that knows no classes"):
        StageCost(model, nn.MSELoss(), shift=True)(X, X[:, :3])
    with pytest.raises(InputError, match="expected a SoftCrossEntropy, which has minimisers"):
        dissipativity(StageCost(model, nn.CrossEntropyLoss(), 0.3), [(X, Y)])
