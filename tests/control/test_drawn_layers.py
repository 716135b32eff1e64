"""A stage cost of k layers drawn at random: its mean over all draws is that of all layers."""

import copy
import pickle
from collections import Counter
from collections.abc import Iterable
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from model_families import Sample, sample
from naive_networks import naive_logits, naive_walk
from text_families import VOCABULARY, naive_text_logits, naive_text_walk, next_words, padded
from text_families import text_model as text
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deeplimit import (
    InputError,
    ResidualChain,
    SoftCrossEntropy,
    StageCost,
    gradient_error,
    use_adjoint,
)

CLASSES, SOFTNESS, GAMMA, K = 4, 0.1, 0.3, 2
TEXTS = ["GPT2LMHeadModel"]  # whose norms keep to 64 bits


def stage_cost_of(model: nn.Module, layers: int | None = K) -> StageCost:
    classes = VOCABULARY if hasattr(model, "config") else CLASSES
    return StageCost(model, SoftCrossEntropy(classes, SOFTNESS), GAMMA, layers=layers)


def drawing(objective: StageCost, layers: Iterable[int]) -> StageCost:
    """An objective whose next draws are these."""
    objective._drawn = lambda: list(layers)  # type: ignore[method-assign]
    return objective


def ell(z: Tensor, y: Tensor) -> Tensor:
    """The mean soft cross-entropy, by PyTorch's own smoothing."""
    z, y = z.reshape(-1, z.shape[-1]), y.reshape(-1)
    classes = z.shape[-1]
    return F.cross_entropy(z, y, label_smoothing=SOFTNESS * classes / (classes - 1))


def flat(cost: Tensor, model: nn.Module) -> Tensor:
    """The gradient of all parameters, in a row."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(cost, parameters, allow_unused=True, retain_graph=True)
    zeros = [torch.zeros_like(p) for p in parameters]
    return torch.cat([(o if g is None else g).flatten() for g, o in zip(found, zeros, strict=True)])


def classified(name: str) -> tuple[nn.Module, Tensor, Tensor, list[Tensor], Tensor]:
    """A network in evaluation mode; ℓ of its states below the last one, and its terminal cost."""
    family = sample(name)
    model = family.model.eval()
    walk, logits = naive_walk(model, family.x)
    below = [ell(naive_logits(model, m, s), family.y) for m, s in walk[:-1]]
    return model, family.x, family.y, below, ell(logits, family.y)


def read(name: str):
    """A model of tokens, likewise."""
    model, x = text(name).eval(), padded()
    y = next_words(x)
    *below, last = (ell(naive_text_logits(model, s), y) for s in naive_text_walk(model, x))
    return model, x, y, below, last


@pytest.mark.slow
@pytest.mark.parametrize("name", ["chain", "three stages, batch", "CIFAR ResNet", *TEXTS])
def test_over_all_draws_cost_and_gradient_have_the_means_of_all_layers(name: str) -> None:
    model, x, y, below, last = read(name) if name in TEXTS else classified(name)
    n = len(below)
    full = last + GAMMA * torch.stack(below).sum()
    sets = list(combinations(range(n), K))
    costs, found = [], []
    for layers in sets:
        cost, _ = drawing(stage_cost_of(model), layers)(x, y)
        naive = last + GAMMA * n / K * torch.stack([below[i] for i in layers]).sum()
        assert float(cost.detach()) == pytest.approx(float(naive.detach()), rel=1e-12)
        costs.append(float(cost.detach()))
        found.append(flat(cost, model))
    assert sum(costs) / len(sets) == pytest.approx(float(full.detach()), rel=1e-12)
    mean, exact = torch.stack(found).mean(0), flat(full, model)
    scale = float(exact.abs().max())
    assert float((mean - exact).abs().max()) <= 1e-12 * scale
    assert float((found[0] - exact).abs().max()) > 1e-3 * scale  # of one draw it is not


def test_the_variance_is_what_is_said() -> None:
    model, x, y, below, _ = classified("chain")
    n = len(below)
    objectives = (drawing(stage_cost_of(model), s) for s in combinations(range(n), K))
    drawn = torch.stack([flat(objective(x, y)[0], model) for objective in objectives])
    total = torch.stack(below)
    own = torch.stack([flat(total[i], model) for i in range(n)])
    spread = (own - own.mean(0)).square().sum() / (n - 1)
    said = GAMMA**2 * n**2 / K * (1 - K / n) * spread
    found = (drawn - drawn.mean(0)).square().sum(1).mean()
    assert float(found) == pytest.approx(float(said), rel=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["chain", "three stages, batch", *TEXTS])
def test_under_the_adjoint_the_drawn_layers_alone_are_charged(name: str) -> None:
    if name in TEXTS:
        model, x = text(name, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0), padded()
        y = next_words(x)
        with torch.no_grad():
            for which, p in model.named_parameters():
                if which.rpartition(".")[0].endswith(("c_proj", "o_proj", "down_proj")):
                    p.mul_(0.005)
    else:
        family = sample(name)
        model, x, y = family.model, family.x, family.y
        for module in model.modules():
            if isinstance(module, ResidualChain):
                module.step = 0.02
    plain, mine = stage_cost_of(copy.deepcopy(model.train())), stage_cost_of(model)
    use_adjoint(model, evaluations=12)
    losses = Counter[bool]()
    for layers in ((0, 2), (1, 3)):
        if layers[-1] >= plain.anatomy.horizon:
            layers = (0, 1)
        expected, _ = drawing(plain, layers)(x, y)
        head = mine._mean_loss
        drawing(mine, layers)._mean_loss = counting(head, losses)  # type: ignore[method-assign]
        cost, _ = mine(x, y)
        mine._mean_loss = head  # type: ignore[method-assign]
        assert losses.pop(True) == K
        assert float(cost.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
        gap = flat(cost, mine.model) - (theirs := flat(expected, plain.model))
        assert float(gap.abs().max()) < 1e-9 * float(theirs.abs().max())
        losses.clear()


def counting(mean_loss, losses: Counter[bool]):
    """The same losses of states, counted where they are taken."""

    def of(y: Tensor):
        own = mean_loss(y)

        def counted(head, x: Tensor) -> Tensor:
            losses[True] += 1
            return own(head, x)

        return counted

    return of


@pytest.mark.slow
def test_every_set_is_as_likely_and_drawn_by_a_generator_of_its_own() -> None:
    objective = stage_cost_of(sample("chain").model)
    before = torch.get_rng_state()
    found = Counter(tuple(objective._drawn()) for _ in range(2000))
    assert torch.equal(torch.get_rng_state(), before)
    assert sorted(found) == list(combinations(range(5), K))
    assert all(150 < count < 250 for count in found.values())  # 200 in the mean, sd 13


def test_only_layers_with_a_weight_are_drawn_and_the_mean_is_theirs() -> None:
    model, x, y, below, last = classified("chain")
    gammas = (0.0, 0.2, 0.5, 0.0, 0.9)
    objective = StageCost(model, SoftCrossEntropy(CLASSES, SOFTNESS), gammas, layers=K)
    sets = {tuple(objective._drawn()) for _ in range(60)}
    assert sets == {(1, 2), (1, 4), (2, 4)}
    full = last + sum(w * one for w, one in zip(gammas, below, strict=True))
    costs = [drawing(objective, layers)(x, y)[0] for layers in sets]
    assert float(sum(costs).detach()) / 3 == pytest.approx(float(full.detach()), rel=1e-12)
    mean = torch.stack([flat(cost, model) for cost in costs]).mean(0)
    assert torch.allclose(mean, flat(full, model), rtol=1e-10, atol=1e-13)


def test_draws_go_on_where_they_were() -> None:
    family = sample("chain")
    objective = stage_cost_of(family.model)
    costs = [float(objective(family.x, family.y)[0].detach()) for _ in range(3)]
    assert len(set(costs)) > 1
    state = objective.draws.get_state()
    copies = [copy.deepcopy(objective), pickle.loads(pickle.dumps(objective))]
    resumed = stage_cost_of(copy.deepcopy(family.model))
    resumed.draws.set_state(state)
    after = [objective._drawn() for _ in range(5)]
    for other in (*copies, resumed):
        assert [other._drawn() for _ in range(5)] == after
    again = stage_cost_of(family.model)
    assert [float(again(family.x, family.y)[0].detach()) for _ in range(3)] == costs


@pytest.mark.slow
@pytest.mark.parametrize("name", ["three stages, batch", "GPT2LMHeadModel"])
def test_without_gradients_all_layers_count_and_nothing_is_drawn(name: str) -> None:
    model, x, y, _, _ = read(name) if name in TEXTS else classified(name)
    objective, full = stage_cost_of(model, 1), stage_cost_of(model, None)
    state = objective.draws.get_state()
    with torch.no_grad():
        assert torch.equal(objective(x, y)[0], full(x, y)[0])
    assert torch.equal(objective.draws.get_state(), state)
    for k in (full.anatomy.horizon, 50):  # and with as many as there are
        assert torch.equal(stage_cost_of(model, k)(x, y)[0], full(x, y)[0])


def test_the_error_of_the_adjoint_is_that_of_one_draw() -> None:
    family: Sample = sample("chain")
    family.model.step = 0.05
    objective = stage_cost_of(use_adjoint(family.model, evaluations=12), 1)
    for _ in range(3):
        report = gradient_error(objective, lambda cost, b: cost(*b)[0], (family.x, family.y))
        assert report.error < 1e-9
        objective._drawn()


def test_in_a_checkpoint_it_would_draw_others_and_is_refused() -> None:
    family = sample("vector")
    objective = stage_cost_of(family.model)
    cost = checkpoint(lambda x: objective(x, family.y)[0], family.x, use_reentrant=False)
    with pytest.raises(InputError, match="runs again in a backward pass"):
        cost.backward()


@pytest.mark.parametrize("layers", [0, -1, True])
def test_layers_that_are_no_number_of_them_are_refused(layers: object) -> None:
    with pytest.raises(InputError, match=r"layers is .*; expected a whole number ≥ 1"):
        stage_cost_of(sample("vector").model, layers)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:no state will be rebuilt")
def test_of_one_module_called_again_and_again_the_drawn_calls_are_charged() -> None:
    transformers = pytest.importorskip("transformers", reason="the extra `hub` is not installed")
    torch.manual_seed(0)
    config = transformers.AlbertConfig(
        vocab_size=20,
        embedding_size=6,
        hidden_size=8,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=8,
        num_labels=CLASSES,
    )
    model = transformers.AlbertForSequenceClassification(config).double().eval()
    x, y = torch.randint(20, (3, 5)), torch.tensor([0, 3, 1])
    gammas = (0.1, 0.3, 0.2, 0.5)
    plain = StageCost(copy.deepcopy(model), SoftCrossEntropy(CLASSES), gammas, layers=K)
    mine = StageCost(use_adjoint(model), SoftCrossEntropy(CLASSES), gammas, layers=K)
    seen = []
    for layers in combinations(range(4), K):
        expected, cost = (drawing(objective, layers)(x, y)[0] for objective in (plain, mine))
        assert float(cost.detach()) == pytest.approx(float(expected.detach()), rel=1e-13)
        gap = flat(cost, mine.model) - (theirs := flat(expected, plain.model))
        assert float(gap.abs().max()) < 1e-12 * float(theirs.abs().max())
        seen.append(float(cost.detach()))
    assert len(set(seen)) == 6
