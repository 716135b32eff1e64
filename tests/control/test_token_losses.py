"""Stage cost, profile and crop of models with logits for every token, against all at once."""

import copy
import math
from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from text_families import (
    BERT,
    CLASSES,
    DEPTH,
    VOCABULARY,
    naive_text_logits,
    naive_text_walk,
    next_words,
    padded,
    text_model,
)
from torch import Tensor, nn

from deeplimit import (
    InputError,
    SoftCrossEntropy,
    StageCost,
    crop,
    drift,
    gradient_error,
    turnpike_profile,
    use_adjoint,
    verify_crop,
)
from deeplimit.control import dissipativity, picture_trajectories, soft_cross_entropy
from deeplimit.control.soft_cross_entropy import CountedTokens
from deeplimit.control.trajectories import class_k_bound
from deeplimit.gradient import layout
from deeplimit.network import anatomy

pytestmark = pytest.mark.slow

SOFTNESS, GAMMA, R = 0.1, 0.3, 0.02
OF_LAYERS = tuple((n % 3) / 4 for n in range(DEPTH))
LOSS = SoftCrossEntropy(VOCABULARY, SOFTNESS)
MODELS = ["GPT2LMHeadModel", "LlamaForCausalLM"]
EVERY = [*MODELS, BERT]
NONE = torch.full((3, 7), -100)

Batch = tuple[dict[str, Tensor], Tensor]


def batch(seed: int = 1) -> Batch:
    """Texts of different lengths, and the next tokens."""
    inputs = padded(seed=seed)
    return inputs, next_words(inputs)


def batch_for(name: str, seed: int = 1) -> Batch:
    """The same, or texts and their classes."""
    inputs, y = batch(seed)
    return (inputs, torch.tensor([seed % CLASSES, 0, 2])) if name == BERT else (inputs, y)


def loss_for(name: str) -> SoftCrossEntropy:
    return SoftCrossEntropy(CLASSES, SOFTNESS) if name == BERT else LOSS


def by_hand(z: Tensor, y: Tensor, softness: float = SOFTNESS) -> Tensor:
    """−Σ q log softmax z of the samples that count, [T]."""
    z, y = z.reshape(-1, z.shape[-1]), y.reshape(-1)
    z, y = z[y != -100], y[y != -100]
    q = torch.full_like(z, softness / (z.shape[-1] - 1))
    q[torch.arange(len(y)), y] = 1 - softness
    return -(q * z.log_softmax(-1)).sum(-1)


def naive_cost(
    model: nn.Module, x: dict[str, Tensor], y: Tensor, weights: Sequence[float] = (GAMMA,) * DEPTH
) -> Tensor:
    """Everything at once."""
    structure = anatomy(model)
    *below, last = (naive_text_logits(model, s) for s in naive_text_walk(model, x))
    running = sum(w * by_hand(z, y).mean() for w, z in zip(weights, below, strict=True))
    controls = sum(p.square().sum() for p in structure.controls)
    return by_hand(last, y).mean() + running + R / 2 * controls


def gradients(cost: Tensor, model: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(cost, list(model.parameters())))


@cache
def naive_step(name: str, weights: tuple[float, ...]) -> tuple[float, list[Tensor]]:
    """The cost of the first batch, and its gradients."""
    model = text_model(name)
    cost = naive_cost(model, *batch_for(name), weights)
    return float(cost.detach()), gradients(cost, model)


def worst(mine: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference, against the largest gradient of all."""
    gap = max(float((a - b).abs().max()) for a, b in zip(mine, theirs, strict=True))
    return gap / max(float(g.abs().max()) for g in theirs)


def relative_error(mine: list[Tensor], theirs: list[Tensor]) -> float:
    gap = sum(float((a - b).square().sum()) for a, b in zip(mine, theirs, strict=True))
    return math.sqrt(gap / sum(float(g.square().sum()) for g in theirs))


def contracting(name: str) -> nn.Module:
    """In training mode without dropout, residual branches small enough for fixed points."""
    model = text_model(name, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).train()
    with torch.no_grad():
        for which, p in model.named_parameters():
            if which.rpartition(".")[0].endswith(("c_proj", "o_proj", "down_proj")):
                p.mul_(0.005)
    return model


def test_tokens_that_do_not_count_are_left_out_of_the_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(3, 7, VOCABULARY, generator=generator, dtype=torch.float64)
    y = batch()[1]
    counts = y != -100
    assert 0 < int(counts.sum()) < y.numel()
    smoothing = SOFTNESS * VOCABULARY / (VOCABULARY - 1)
    theirs = F.cross_entropy(z.flatten(0, 1), y.flatten(), label_smoothing=smoothing)
    assert float(LOSS.mean(z, y)) == pytest.approx(float(theirs), rel=1e-13)
    for values in (LOSS(z, y), LOSS.excess(z, y), LOSS.distance(z, y)):
        assert torch.equal(values[~counts], torch.zeros(int((~counts).sum())).double())
        assert bool((values[counts] > 0).all())
    kept = z[counts], y[counts]
    assert torch.allclose(LOSS(z, y)[counts], by_hand(z, y), rtol=1e-12)
    assert torch.equal(LOSS.distance(z, y)[counts], LOSS.distance(*kept))
    assert torch.equal(LOSS.excess(z, y)[counts], LOSS.excess(*kept))
    assert float(LOSS.mean(z, NONE)) == 0


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("weights", [(GAMMA,) * DEPTH, OF_LAYERS])
@pytest.mark.parametrize("chunk", [1, 5 * VOCABULARY, 60 * VOCABULARY, soft_cross_entropy.CHUNK])
def test_the_stage_cost_and_its_gradients_are_the_naive_ones(
    name: str, chunk: int, weights: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One token at a time, five, all of several states, all of all."""
    monkeypatch.setattr(soft_cross_entropy, "CHUNK", chunk)
    model = text_model(name)
    x, y = batch_for(name)
    stage_cost = StageCost(model, loss_for(name), weights, control_cost=R)
    cost, logits = stage_cost(x, y)
    expected, theirs = naive_step(name, weights)
    assert torch.equal(logits, model(**x).logits)
    assert float(cost.detach()) == pytest.approx(expected, rel=1e-13)
    assert worst(gradients(cost, model), theirs) < 1e-12
    with torch.no_grad():
        assert float(stage_cost(x, y)[0]) == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("name", MODELS)
def test_costs_charged_inside_the_layers_are_the_same(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soft_cross_entropy, "CHUNK", 4 * VOCABULARY)
    model = text_model(name)
    x, y = batch()
    counted = CountedTokens(y, VOCABULARY)
    structure = anatomy(model)
    cost = lambda head, s, _: counted.mean_loss(LOSS, head, s)  # noqa: E731
    with structure.collect_stage_costs(dict.fromkeys(range(DEPTH), cost), x) as costs:
        structure.run(x)
    walk = naive_text_walk(model, x)[:-1]
    naive = torch.stack([by_hand(naive_text_logits(model, s), y).mean() for s in walk])
    assert torch.allclose(torch.cat(costs), naive, rtol=1e-13)
    parameters = list(model.parameters())
    mine, theirs = (
        torch.autograd.grad(total.sum(), parameters, allow_unused=True)
        for total in (torch.cat(costs), naive)
    )
    # The last layer has no part in what is charged before it.
    assert [g is None for g in mine] == [g is None for g in theirs]
    assert sum(g is None for g in mine) == len(list(structure.blocks[-1].parameters()))
    mine, theirs = ([g for g in some if g is not None] for some in (mine, theirs))
    assert worst(mine, theirs) < 1e-12


@pytest.mark.parametrize("weight", [GAMMA, OF_LAYERS])
@pytest.mark.parametrize("name", MODELS)
def test_under_the_adjoint_the_gradient_is_off_by_what_is_reported(
    name: str, weight: float | tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soft_cross_entropy, "CHUNK", 4 * VOCABULARY)
    model, (x, y) = contracting(name), batch()
    assert model.config.use_cache
    plain = StageCost(model, LOSS, weight, control_cost=R)
    expected, _ = plain(x, y)
    theirs = gradients(expected, model)
    errors = []
    for evaluations in (2, 12):
        copied = use_adjoint(copy.deepcopy(model), evaluations=evaluations, on_drift="ignore")
        mine = StageCost(copied, LOSS, weight, control_cost=R)
        assert mine.anatomy.replayed
        reported = gradient_error(mine, lambda stage_cost, b: stage_cost(*b)[0], (x, y))
        cost, _ = mine(x, y)
        assert float(cost.detach()) == pytest.approx(float(expected.detach()), rel=1e-13)
        errors.append(relative_error(gradients(cost, copied), theirs))
        assert errors[-1] == pytest.approx(reported.error, rel=1e-6, abs=1e-13)
        assert drift(mine) == pytest.approx(reported.drift, rel=1e-6, abs=1e-15)
        assert len(layout(mine).rebuilt) == DEPTH
    assert errors[0] > 1e-6
    # Llama's norms compute in single precision whatever the model's.
    assert errors[1] < (1e-11 if name == "GPT2LMHeadModel" else 1e-7)


def naive_figures(name: str, model: nn.Module, batches: list[Batch]) -> dict[str, list[Tensor]]:
    """Per layer the loss, hits and distance of every sample that counts; the relative updates."""
    figures: dict[str, list[list[Tensor]]] = {}
    for x, y in batches:
        walk = naive_text_walk(model, x)
        counts = (y != -100).flatten()
        rows = []
        for state in walk:
            z = naive_text_logits(model, state)
            z = z.flatten(0, -2)[counts]
            q = torch.full_like(z, SOFTNESS / (z.shape[-1] - 1))
            q[torch.arange(len(z)), y.flatten()[counts]] = 1 - SOFTNESS
            apart = z - q.log()
            hits = (z.argmax(-1) == y.flatten()[counts]).double()
            distance = (apart - apart.mean(-1, keepdim=True)).norm(dim=-1)
            excess = -(q * z.log_softmax(-1)).sum(-1) + (q * q.log()).sum(-1)
            rows.append((by_hand(z, y.flatten()[counts]), hits, distance, excess))
        flat = [s.flatten(0, 1) for s in walk]
        if name == BERT:  # a sample is a text, without its padding
            flat = [(s * x["attention_mask"][..., None]).flatten(1) for s in walk]
        update = [((b - a).norm(dim=1) / a.norm(dim=1))[counts] for a, b in pairwise(flat)]
        names = ("loss", "accuracy", "distance", "excess")
        for which, columns in zip(names, zip(*rows, strict=True), strict=True):
            figures.setdefault(which, []).append(torch.stack(columns))
        figures.setdefault("relative_update", []).append(torch.stack(update))
    return {which: torch.cat(parts, dim=1) for which, parts in figures.items()}


@pytest.mark.parametrize("name", EVERY)
def test_the_profile_is_the_naive_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soft_cross_entropy, "CHUNK", 16 * VOCABULARY)  # four tokens when measuring
    model, loss = text_model(name).train(), loss_for(name)
    batches = [batch_for(name, seed) for seed in (1, 2, 3)]
    if name != BERT:
        batches.insert(1, (batches[0][0], NONE))  # a batch in which nothing counts
    profile = turnpike_profile(model, batches, loss)
    assert model.training
    model.eval()
    with torch.no_grad():
        naive = naive_figures(name, model, batches)
    assert (
        profile.samples == naive["loss"].shape[1] == sum(int((y != -100).sum()) for _, y in batches)
    )
    assert (profile.horizon, profile.classes) == (DEPTH, loss.classes)
    for which in ("loss", "accuracy", "distance", "relative_update"):
        expected = naive[which].mean(1).tolist()
        assert getattr(profile, which) == pytest.approx(expected, rel=1e-11), which
    for which in ("loss", "accuracy"):
        gap = naive[which] - naive[which][-1]
        error = gap.std(1, correction=0) / math.sqrt(profile.samples)
        assert getattr(profile, f"{which}_error") == pytest.approx(error.tolist(), rel=1e-9)
    if name == BERT:
        assert len(profile.class_distance) == DEPTH + 1
    else:
        assert profile.class_distance == ()
    assert 0 <= profile.recommended_depth <= DEPTH


@pytest.mark.parametrize("name", EVERY)
def test_dissipativity_is_the_naive_one(name: str) -> None:
    model, loss = text_model(name), loss_for(name)
    batches = [batch_for(name, seed) for seed in (1, 2)]
    if name != BERT:
        batches.append((batches[0][0], NONE))
    stage_cost = StageCost(model, loss, GAMMA, control_cost=R)
    report = dissipativity(stage_cost, batches)
    with torch.no_grad():
        naive = naive_figures(name, model, batches)
    structure = stage_cost.anatomy
    square = [
        sum(float(p.detach().square().sum()) for p in structure.control(n)) for n in range(DEPTH)
    ]
    excess, distance = naive["excess"][:-1], naive["distance"][:-1]
    supply = GAMMA * excess.mean(1) + R / 2 * torch.tensor(square)
    assert report.samples == excess.shape[1]
    assert report.supply == pytest.approx(supply.tolist(), rel=1e-7)
    margin = (GAMMA * (excess - class_k_bound(loss, distance))).amin(1)
    assert report.sample_margin == pytest.approx(margin.tolist(), rel=1e-9)
    assert report.holds


@pytest.mark.parametrize("name", EVERY)
def test_the_report_of_a_crop_is_the_naive_one(name: str) -> None:
    model, batches = text_model(name), [batch_for(name, seed) for seed in (1, 2)]
    cropped = crop(model, remove=[2, 3])
    report = verify_crop(model, cropped, batches)
    rows = []
    with torch.no_grad():
        for x, y in batches:
            counts = y.flatten() != -100
            z, w = (m(**x).logits.flatten(0, -2)[counts] for m in (model, cropped))
            y = y.flatten()[counts]
            picked = (v.log_softmax(-1)[torch.arange(len(y)), y] for v in (z, w))
            z, w = z.argmax(-1), w.argmax(-1)
            rows.append(torch.stack([*(-p for p in picked), z == y, w == y, z == w]))
    table = torch.cat(rows, dim=1)
    change = table[3] - table[2]
    assert report.samples == table.shape[1]
    assert (report.horizon_before, report.horizon_after) == (DEPTH, DEPTH - 2)
    mine = (
        report.loss_before,
        report.loss_after,
        report.accuracy_before,
        report.accuracy_after,
        report.agreement,
    )
    assert mine == pytest.approx(tuple(table.mean(1).tolist()), rel=1e-11)
    error = float(change.std(correction=0)) / math.sqrt(report.samples)
    assert report.accuracy_error == pytest.approx(error, rel=1e-9, abs=1e-12)
    assert report.latency_batch == 3
    assert 0 < report.multiply_adds_after < report.multiply_adds_before


def test_a_crop_to_a_profile() -> None:
    model, inputs = text_model("LlamaForCausalLM"), padded()
    with torch.no_grad():
        for layer in model.model.layers[2:]:  # these do nothing
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    profile = turnpike_profile(model, [batch()], LOSS)
    assert profile.recommended_depth <= 2
    assert profile.relative_update[2:] == (0.0, 0.0, 0.0)
    assert profile.distance[2] == pytest.approx(profile.distance[5], rel=1e-12)
    report = verify_crop(model, crop(model, 2), [batch()], LOSS)
    assert report.agreement == 1
    assert report.loss_after == pytest.approx(profile.loss[2], rel=1e-12)
    assert torch.equal(crop(model, 2)(**inputs).logits, model(**inputs).logits)


def test_half_precision_sums_over_the_vocabulary_in_single() -> None:
    model, (x, y) = text_model("LlamaForCausalLM"), batch()
    with torch.no_grad():
        expected, _ = StageCost(model, LOSS, GAMMA)(x, y)
    half = StageCost(model.bfloat16(), LOSS, GAMMA)
    cost, logits = half(x, y)
    assert (cost.dtype, logits.dtype) == (torch.float32, torch.bfloat16)
    assert float(cost.detach()) == pytest.approx(float(expected.detach()), rel=5e-3)
    cost.backward()
    assert all(bool(p.grad.isfinite().all()) for p in half.parameters())
    with torch.no_grad():
        z = half.anatomy.logits(half.anatomy.states(x)[0]).double()
    profile = turnpike_profile(model, [(x, y)], LOSS)
    losses = [float(by_hand(layer, y).mean()) for layer in z]
    assert profile.loss == pytest.approx(losses, rel=1e-2)


def test_a_batch_in_which_nothing_counts_costs_nothing() -> None:
    model, x = text_model("LlamaForCausalLM"), padded()
    cost, _ = StageCost(model, LOSS, GAMMA)(x, NONE)
    assert float(cost.detach()) == 0
    cost.backward()
    assert all(not p.grad.any() for p in model.parameters())
    with pytest.raises(InputError, match="every target is −100; a profile needs"):
        turnpike_profile(model, [(x, NONE)], LOSS)
    with pytest.raises(InputError, match="every target is −100; a crop is verified"):
        verify_crop(model, model, [(x, NONE)])
    with pytest.raises(InputError, match="every target is −100; the check needs"):
        dissipativity(StageCost(model, LOSS), [(x, NONE)])


def test_wrong_targets_are_answered() -> None:
    model, (x, y) = text_model("LlamaForCausalLM"), batch()
    stage_cost = StageCost(model, LOSS, GAMMA)
    with pytest.raises(InputError, match=r"targets of shape \(3,\) .*expected \[B, L\], a class"):
        stage_cost(x, y[:, 0])
    with pytest.raises(InputError, match=r"\(3, 6\) given for tokens \(3, 7\); expected one for"):
        stage_cost(x, y[:, 1:])
    with pytest.raises(InputError, match=r"expected \[\.\.\., 7\]"):
        turnpike_profile(model, [(x, y)], SoftCrossEntropy(7))
    with pytest.raises(InputError, match="LlamaForCausalLM has logits for every token"):
        picture_trajectories(model, [(x, y)], LOSS)


def test_a_picture_of_texts() -> None:
    """Inputs by name."""
    model, (x, y) = text_model(BERT), batch_for(BERT)
    picture = picture_trajectories(model, [(x, y)], loss_for(BERT))
    assert (len(picture.points), picture.labels) == (DEPTH + 1, tuple(y.tolist()))


class NormedTokens(nn.Module):
    """Logits for every token, through a batch norm behind the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, 6)
        self.blocks = nn.ModuleList(Added() for _ in range(3))
        self.norm, self.out = nn.BatchNorm1d(6), nn.Linear(6, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        h = self.table(x)
        for block in self.blocks:
            h = block(h)
        return self.out(self.norm(h.transpose(1, 2)).transpose(1, 2))


class Added(nn.Linear):
    def __init__(self) -> None:
        super().__init__(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x).tanh()


def test_a_batch_norm_behind_the_tokens_keeps_to_the_statistics_from_before() -> None:
    """In the backward pass too, in which the forward pass has moved them."""
    torch.manual_seed(0)
    model, (x, y) = NormedTokens().double().train(), batch()
    x = x["input_ids"]
    with torch.no_grad():
        model(x.flip(0))  # statistics that are not those of the start
    other = copy.deepcopy(model)
    objective = StageCost(model, LOSS, GAMMA)
    assert objective.anatomy.tokens
    cost, _ = objective(x, y)
    still = copy.deepcopy(other.norm).eval()
    still.weight, still.bias = other.norm.weight, other.norm.bias
    below = [h := other.table(x)]
    for block in other.blocks:
        below.append(h := block(h))
    last = other.out(other.norm(h.transpose(1, 2)).transpose(1, 2))
    zs = (other.out(still(h.transpose(1, 2)).transpose(1, 2)) for h in below[:-1])
    naive = by_hand(last, y).mean() + GAMMA * sum(by_hand(z, y).mean() for z in zs)
    assert float(cost.detach()) == pytest.approx(float(naive.detach()), rel=1e-12)
    assert worst(gradients(cost, model), gradients(naive, other)) < 1e-12
