"""The measured profile against one that keeps every state of every sample in memory."""

import gc
import itertools
import math
import weakref
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from model_families import CLASSES, Sample, sample
from naive_networks import naive_carry, naive_logits, naive_walk
from text_families import BERT, padded, text_model
from torch import Tensor, nn

from deeplimit import InputError, ResidualChain, SoftCrossEntropy, turnpike_profile
from deeplimit.control import TurnpikeProfile

LOSS = SoftCrossEntropy(CLASSES, 0.08)
FIELDS = (
    "loss",
    "accuracy",
    "distance",
    "class_distance",
    "relative_update",
    "loss_error",
    "accuracy_error",
    "influence",
)


def batches(x: Tensor, y: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(size), y.split(size), strict=True))


def samples_of(family: Sample, count: int = 17) -> tuple[Tensor, Tensor]:
    """Inputs and targets; no sample of the last class."""
    generator = torch.Generator().manual_seed(11)
    x = torch.rand(count, *family.x.shape[1:], generator=generator, dtype=torch.float64)
    return x, torch.randint(CLASSES - 1, (count,), generator=generator)


def naive_profile(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, np.ndarray]:
    """Sample by sample, in evaluation mode."""
    names = ("loss", "hit", "distance", "update", "influence")
    values: dict[str, list[list[float]]] = {k: [] for k in names}
    ell = LOSS.softness
    for sample_x, target in zip(x, y.tolist(), strict=True):
        walk, output = naive_walk(model, sample_x[None])
        z = [naive_logits(model, m, s)[0].numpy() for m, s in walk[:-1]] + [output[0].numpy()]
        q = np.full(CLASSES, ell / (CLASSES - 1))
        q[target] = 1 - ell
        row: dict[str, list[float]] = {k: [] for k in values}
        for layer in z:
            row["loss"].append(float(-q @ (layer - np.log(np.exp(layer).sum()))))
            row["hit"].append(float(np.argmax(layer) == target))
            apart = layer - np.log(q)
            row["distance"].append(float(np.linalg.norm(apart - apart.mean())))
        for (m, before), (after_m, after) in itertools.pairwise(walk):
            for stage in range(m, after_m):
                before = naive_carry(model, stage, before)
            row["update"].append(float((after - before).norm() / before.norm()))
            cosine = (after * before).sum() / after.norm() / before.norm()
            row["influence"].append(float(1 - cosine))
        for name, value in row.items():
            values[name].append(value)
    table = {name: np.array(value) for name, value in values.items()}
    labels = y.numpy()
    gap = table["loss"] - table["loss"][:, -1:]
    hit_gap = table["hit"] - table["hit"][:, -1:]
    with np.errstate(invalid="ignore"):
        members = [table["distance"][labels == c] for c in range(CLASSES)]
        per_class = [m.mean(0) if len(m) else np.full(m.shape[1], np.nan) for m in members]
    return {
        "loss": table["loss"].mean(0),
        "accuracy": table["hit"].mean(0),
        "distance": table["distance"].mean(0),
        "class_distance": np.stack(per_class, 1),
        "relative_update": table["update"].mean(0),
        "influence": table["influence"].mean(0),
        "loss_error": gap.std(0) / math.sqrt(len(y)),
        "accuracy_error": hit_gap.std(0) / math.sqrt(len(y)),
    }


@pytest.mark.slow
def test_every_figure_is_the_naive_one(family: Sample) -> None:
    x, y = samples_of(family)
    profile = turnpike_profile(family.model, batches(x, y, 5), LOSS)
    with torch.no_grad():
        naive = naive_profile(family.model.eval(), x, y)
    for name in FIELDS:
        mine = np.array(getattr(profile, name))
        assert mine.shape == naive[name].shape, name
        assert np.allclose(mine, naive[name], rtol=1e-10, atol=1e-10, equal_nan=True), name
    assert (profile.samples, profile.classes, profile.horizon) == (17, CLASSES, family.depth)
    assert (profile.softness, profile.minimum) == (LOSS.softness, LOSS.minimum)
    assert all(math.isnan(row[CLASSES - 1]) for row in profile.class_distance)
    assert profile.loss_error[-1] == profile.accuracy_error[-1] == 0


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 3, 6])
def test_padding_does_not_matter(size: int) -> None:
    """Texts alone, without any padding, against the same texts filled up in batches."""
    pytest.importorskip("transformers")
    model, given = text_model(BERT), padded(6, 9)
    y = torch.arange(6) % 3
    loss = SoftCrossEntropy(model.config.num_labels, 0.1)

    def batch(rows: slice, length: int, more: int = 0) -> tuple[dict[str, Tensor], Tensor]:
        cut = {name: F.pad(v[rows, :length], (0, more)) for name, v in given.items()}
        return cut, y[rows]

    alone = [batch(slice(i, i + 1), 9 - i) for i in range(6)]
    together = [batch(slice(i, i + size), 9, more=5) for i in range(0, 6, size)]
    mine, others = (turnpike_profile(model, loader, loss) for loader in (together, alone))
    for field in ("loss", "relative_update", "influence"):
        assert getattr(mine, field) == pytest.approx(getattr(others, field), rel=1e-12)


@pytest.mark.slow
def test_a_target_of_none_counts_nowhere_beside_padding() -> None:
    pytest.importorskip("transformers")
    model, given = text_model(BERT), padded(6, 9)
    y, loss = torch.arange(6) % 3, SoftCrossEntropy(model.config.num_labels, 0.1)
    whole = turnpike_profile(model, [({n: v[:4] for n, v in given.items()}, y[:4])], loss)
    y[4:] = -100
    some = turnpike_profile(model, [(given, y)], loss)
    assert some.samples == 4
    assert some.influence == pytest.approx(whole.influence, rel=1e-12)


@pytest.mark.slow
def test_samples_whose_state_is_zero_have_no_relative_update() -> None:
    """They are in every other figure; a layer that sees no other has no mean at all."""
    family = sample("chain")
    x, y = samples_of(family)
    x[[0, 6, 16]] = 0.0
    profile = turnpike_profile(family.model, batches(x, y, 5), LOSS)
    others = x.abs().sum(1) != 0
    rest = turnpike_profile(family.model, batches(x[others], y[others], 5), LOSS)
    assert profile.relative_update[0] == pytest.approx(rest.relative_update[0], rel=1e-12)
    assert profile.influence[0] == pytest.approx(rest.influence[0], rel=1e-12)
    # Behind the first layer no state is zero any more: 17 samples again.
    with torch.no_grad():
        naive = naive_profile(family.model.eval(), x, y)
    assert np.allclose(profile.relative_update[1:], naive["relative_update"][1:], rtol=1e-12)
    assert np.allclose(profile.loss, naive["loss"], rtol=1e-12)
    none = turnpike_profile(family.model, batches(torch.zeros_like(x), y, 5), LOSS)
    assert math.isnan(none.relative_update[0])
    assert math.isnan(none.influence[0])
    assert all(math.isfinite(u) for u in none.relative_update[1:])


def test_influence_is_exact_where_little_is_done() -> None:
    """A layer that does nothing has 0; one that turns by a small angle φ, 1 − cos φ; zero has 1."""
    x = torch.tensor([[3.0, 4.0, 0.0, 0.0]]).double()
    for angle in (0.0, 1e-9, 1e-5, 0.3):
        turn = nn.Linear(4, 4, bias=False).double()
        update = torch.tensor([-4.0, 3.0, 0.0, 0.0]).double() * math.tan(angle)
        turn.weight.data = torch.outer(update, x[0]) / 25  # x ↦ x + update
        profile = turnpike_profile(ResidualChain([turn]), [(x, torch.tensor([0]))], LOSS)
        assert profile.influence == (pytest.approx(2 * math.sin(angle / 2) ** 2, rel=1e-6),)
    turn.weight.data = -torch.eye(4).double()
    profile = turnpike_profile(ResidualChain([turn]), [(x, torch.tensor([0]))], LOSS)
    assert profile.influence == (1.0,)


@pytest.mark.slow
def test_the_batch_size_does_not_matter(family: Sample) -> None:
    x, y = samples_of(family, 16)
    profiles = [turnpike_profile(family.model, batches(x, y, n), LOSS) for n in (1, 3, 16)]
    for name in FIELDS:
        first, *others = (np.array(getattr(p, name)) for p in profiles)
        for other in others:
            assert np.allclose(first, other, rtol=1e-10, atol=1e-10, equal_nan=True), name


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(family: Sample, training: bool) -> None:
    model = family.model.train(training)
    modules = list(model.modules())
    modules[-1].training = not training  # one that somebody froze
    modes = [m.training for m in modules]
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    turnpike_profile(model, batches(*samples_of(family), 5), LOSS)
    assert [m.training for m in modules] == modes
    assert all(torch.equal(buffers[name], b) for name, b in model.named_buffers())
    assert all(p.grad is None for p in model.parameters())
    for module in modules:
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not (isinstance(module, ResidualChain) and module._state_hooks)


def test_an_exception_gives_the_modes_back() -> None:
    family = sample("vector")
    with pytest.raises(RuntimeError):
        turnpike_profile(family.model, [(torch.zeros(2, 99).double(), family.y[:2])], LOSS)
    assert all(m.training for m in family.model.modules())


@pytest.mark.slow
def test_states_of_one_batch_are_alive_at_a_time() -> None:
    """Peak number of states alive, by weak reference, with the garbage collector off.

    The chain's forward holds N + 1 states of the batch at hand: never more, however many batches.
    """
    family = sample("vector")
    alive: list[weakref.ref[Tensor]] = []
    peaks: list[int] = []

    def count() -> int:
        return sum(ref() is not None for ref in alive)

    def watch(_: int, state: Tensor) -> None:
        alive.append(weakref.ref(state))
        peaks.append(count())

    def loader(number: int) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(number):
            assert count() == 0
            yield samples_of(family)

    gc.collect()
    gc.disable()
    try:
        with family.model.stages[0].register_state_hook(watch):
            for number in (1, 8):
                turnpike_profile(family.model, loader(number), LOSS)
                assert count() == 0
    finally:
        gc.enable()
    assert len(peaks) == 9 * (family.depth + 1)
    assert max(peaks) == family.depth + 1


def test_a_network_without_layers_has_the_profile_of_its_output() -> None:
    chain = ResidualChain([])
    x = torch.tensor([[2.0, 0, 0, 0]]).double()
    profile = turnpike_profile(chain, [(x, torch.tensor([0]))], LOSS)
    assert profile.horizon == 0
    assert profile.accuracy == (1.0,)
    assert profile.relative_update == ()
    assert profile.recommended_depth == 0


def test_without_updates_the_other_figures_are_the_same(family: Sample) -> None:
    x, y = samples_of(family)
    whole = turnpike_profile(family.model, batches(x, y, 5), LOSS)
    quick = turnpike_profile(family.model, batches(x, y, 5), LOSS, updates=False)
    assert repr(quick) == repr(replace(whole, relative_update=(), influence=None))  # NaN and all


def test_float32_models_are_profiled_in_double_precision() -> None:
    family = sample("logit")
    model = family.model.float()
    profile = turnpike_profile(model, [(family.x.float(), family.y)], LOSS)
    z = model(family.x.float()).detach().double()
    assert profile.loss[-1] == pytest.approx(float(LOSS(z, family.y).mean()), rel=1e-14)


def test_an_empty_loader_and_a_foreign_loss_are_refused() -> None:
    family = sample("vector")
    with pytest.raises(InputError, match="loader gave no batch"):
        turnpike_profile(family.model, [], LOSS)
    with pytest.raises(InputError, match=r"expected \[\.\.\., 7\]"):
        turnpike_profile(family.model, [(family.x, family.y)], SoftCrossEntropy(7))
    with pytest.raises(InputError, match="no stack of blocks in Linear"):
        turnpike_profile(nn.Linear(2, 2), [], LOSS)


def test_the_profile_is_plain_numbers() -> None:
    family = sample("chain")
    profile = turnpike_profile(family.model, [(family.x, family.y)], LOSS)
    assert isinstance(profile, TurnpikeProfile)
    assert all(type(v) is float for name in FIELDS[:3] for v in getattr(profile, name))
    assert all(type(v) is float for row in profile.class_distance for v in row)
