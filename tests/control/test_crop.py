"""Crops: the intermediate output to the last bit, independent, and honestly reported."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from model_families import CLASSES, FAMILIES, Sample, sample
from profiles import profile
from torch import Tensor, nn

from deeplimit import (
    Heun,
    InputError,
    ResidualChain,
    SoftCrossEntropy,
    StageCost,
    crop,
    turnpike_profile,
    verify_crop,
)
from deeplimit.control import layers_to_remove
from deeplimit.control.verifying import multiply_adds
from deeplimit.network import Architecture, CifarArchitecture, anatomy, load, save


def test_a_tail_crop_is_the_intermediate_output_to_the_last_bit(family: Sample) -> None:
    model = family.model.eval()
    structure = anatomy(model)
    states, logits = structure.states(family.x)
    for depth, stage in enumerate(structure.state_stages):
        x = states[depth]
        for m in range(stage, structure.stages - 1):
            x = structure.carry(m, x)
        cropped = crop(model, depth)
        assert type(cropped) is type(model)
        assert anatomy(cropped).horizon == depth
        assert torch.equal(cropped(family.x), structure.head(x))
    assert depth == family.depth
    assert torch.equal(cropped(family.x), logits)


def test_a_crop_is_independent_of_the_original(family: Sample) -> None:
    model = family.model.eval()
    cropped = crop(model, family.depth - 1)
    expected, kept = cropped(family.x), model(family.x)
    with torch.no_grad():
        for tensor in cropped.parameters():
            tensor.add_(1)
    assert torch.equal(model(family.x), kept)
    fresh = crop(model, family.depth - 1)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
    assert torch.equal(fresh(family.x), expected)
    mine = {p.data_ptr() for p in model.parameters()}
    assert not mine & {p.data_ptr() for p in fresh.parameters()}


@pytest.mark.parametrize("name", [name for name in FAMILIES if not name.startswith("chain")])
def test_a_crop_saves_and_loads(name: str, tmp_path: Path) -> None:
    family = sample(name)
    family.model.standardise(torch.zeros(family.x.shape[1]), torch.ones(family.x.shape[1]))
    cropped = crop(family.model.eval(), 1)
    loaded = load(save(cropped, tmp_path / "cropped"))
    assert torch.equal(loaded(family.x), cropped(family.x))


def leaving() -> list[float]:
    """Distances that enter the tube of radius 1.2 at layer 1 and leave it behind layer 3."""
    return [9.0, 0.5, 0.4, 0.3, 8.0]


def arc_profile():
    return profile(leaving(), accuracy=[0.1, 0.8, 0.8, 0.8, 0.99], classes=CLASSES)


@pytest.mark.parametrize("name", ["chain, Heun", "vector", "three stages, batch"])
def test_the_middle_is_taken_out_of_a_leaving_arc(name: str) -> None:
    family = sample(name)
    if family.depth == 5:
        family.model.eval()
        made = profile([*leaving(), 8.0], accuracy=[0.1, 0.8, 0.8, 0.8, 0.8, 0.99], classes=CLASSES)
    else:
        made = arc_profile()
    assert (made.entry(), made.exit()) == (1, 3)
    assert layers_to_remove(made) == range(1, 3)
    model = family.model.eval()
    cropped = crop(model, made)
    # By hand: which blocks are left (a Heun step takes its second control with it).
    if isinstance(model, ResidualChain):
        assert model.scheme == Heun()
        kept = [0, 1, 4]
        pairs = list(zip(cropped, [model[i] for i in kept], strict=True))
    else:
        blocks = [b for stage in model.stages for b in stage]
        kept = [i for i in range(len(blocks)) if i not in (1, 2)]
        mine = [b for stage in cropped.stages for b in stage]
        pairs = list(zip(mine, [blocks[i] for i in kept], strict=True))
    for left, right in pairs:
        assert all(
            torch.equal(p, q) for p, q in zip(left.parameters(), right.parameters(), strict=True)
        )
    assert anatomy(cropped).horizon == family.depth - 2
    assert torch.equal(cropped(family.x), crop(model, remove=[1, 2])(family.x))
    if not name.startswith("three"):  # there x_1 is in another stage now
        states, _ = anatomy(cropped).states(family.x)
        assert torch.equal(states[1], anatomy(model).states(family.x)[0][1])


def test_what_a_profile_says_can_go() -> None:
    tail = profile([9.0, 0.5, 0.4, 0.3, 0.2], accuracy=[0.1, 0.5, 0.98, 0.98, 0.98])
    assert layers_to_remove(tail) == range(2, 4)  # the depth is chosen by what the output achieves
    none = profile([9.0, 9.0, 9.0], accuracy=[0.1, 0.5, 0.98])
    assert list(layers_to_remove(none)) == []
    never = profile([9.0, 0.5, 9.0], accuracy=[0.1, 0.5, 0.98])
    assert list(layers_to_remove(never)) == []  # entry = exit: nothing lies between
    # A depth that does as well as the full one makes the leaving arc harmless: cut the tail.
    harmless = profile([9.0, 0.5, 0.5, 9.0], accuracy=[0.1, 0.98, 0.98, 0.98])
    assert layers_to_remove(harmless) == range(1, 3)


def test_crop_to_a_profile() -> None:
    family = sample("vector")
    made = profile(accuracy=[0.1, 0.5, 0.98, 0.98, 0.98], classes=CLASSES)
    cropped = crop(family.model.eval(), made)
    assert torch.equal(cropped(family.x), crop(family.model, 2)(family.x))


def test_wrong_requests_are_refused() -> None:
    model = sample("vector").model
    for depth in (-1, 5):
        with pytest.raises(InputError, match=rf"depth {depth} given; .* 4 layers: 0 … 4"):
            crop(model, depth)
    with pytest.raises(InputError, match=r"with 2 layers, the model has 4; profile this model"):
        crop(model, profile([1.0, 1.0, 1.0]))
    with pytest.raises(InputError, match="exactly one"):
        crop(model)
    with pytest.raises(InputError, match="exactly one"):
        crop(model, 2, remove=[3])
    with pytest.raises(InputError, match="layer 9 to be removed"):
        crop(model, remove=[9])
    with pytest.raises(InputError, match="no stack of blocks in Linear"):
        crop(nn.Linear(2, 2), 1)
    assert anatomy(crop(model, remove=[])).horizon == 4


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor, lambda n: list(np.array(n))])
def test_layers_come_as_any_whole_numbers(kind) -> None:
    family = sample("vector")
    model = family.model.eval()
    for gone in ([0], [1, 3]):
        expected = crop(model, remove=set(gone))(family.x)
        assert torch.equal(crop(model, remove=kind(gone))(family.x), expected)
        assert not torch.allclose(expected, model(family.x), rtol=1e-3)
    assert torch.equal(crop(model, kind([3])[0])(family.x), crop(model, 3)(family.x))


def held_out(family: Sample, count: int = 30) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(count, *family.x.shape[1:], generator=generator, dtype=torch.float64)
    y = torch.randint(CLASSES, (count,), generator=generator)
    return list(zip(x.split(8), y.split(8), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["chain", "vector, Heun", "three stages, batch", "CIFAR ResNet"])
@pytest.mark.parametrize("loss", [None, SoftCrossEntropy(CLASSES, 0.1)])
def test_the_report_is_the_naive_one(name: str, loss: SoftCrossEntropy | None) -> None:
    family = sample(name)
    model, cropped = family.model, crop(family.model, 1)  # both in training mode
    before = copy.deepcopy((model.state_dict(), cropped.state_dict()))
    report = verify_crop(model, cropped, held_out(family), loss)
    rows = []
    with torch.no_grad():
        old, new = copy.deepcopy(model).eval(), copy.deepcopy(cropped).eval()
        for x, y in held_out(family):
            for sample_x, target in zip(x, y.tolist(), strict=True):
                row = []
                for network in (old, new):
                    z = network(sample_x[None])[0]
                    q = np.full(CLASSES, 0.0 if loss is None else 0.1 / (CLASSES - 1))
                    q[target] = 1 if loss is None else 0.9
                    value = -float(torch.from_numpy(q) @ (z - z.logsumexp(0)))
                    row += [value, int(z.argmax()), float(z.argmax() == target)]
                rows.append(row)
    table = np.array(rows)
    change = table[:, 5] - table[:, 2]
    assert report.samples == 30
    assert (report.horizon_before, report.horizon_after) == (family.depth, 1)
    assert report.loss_before == pytest.approx(table[:, 0].mean(), rel=1e-11)
    assert report.loss_after == pytest.approx(table[:, 3].mean(), rel=1e-11)
    assert report.accuracy_before == pytest.approx(table[:, 2].mean(), rel=1e-12)
    assert report.accuracy_after == pytest.approx(table[:, 5].mean(), rel=1e-12)
    assert report.agreement == pytest.approx((table[:, 1] == table[:, 4]).mean(), rel=1e-12)
    assert report.accuracy_error == pytest.approx(change.std() / math.sqrt(30), rel=1e-9)
    assert report.parameters_before == sum(p.numel() for p in model.parameters())
    assert report.parameters_after == sum(p.numel() for p in cropped.parameters())
    assert report.parameters_after < report.parameters_before
    assert report.latency_before > 0
    assert report.latency_after > 0
    assert (report.latency_batch, report.device) == (8, "cpu")
    assert all(m.training for m in (*model.modules(), *cropped.modules()))
    after = (model.state_dict(), cropped.state_dict())
    assert all(torch.equal(b[k], a[k]) for b, a in zip(before, after, strict=True) for k in b)


@pytest.mark.slow
def test_a_crop_that_changes_nothing_agrees_with_itself() -> None:
    family = sample("logit")
    report = verify_crop(family.model, crop(family.model, 4), held_out(family))
    assert report.agreement == 1
    assert report.accuracy_error == 0
    assert report.loss_before == report.loss_after
    assert report.multiply_adds_before == report.multiply_adds_after


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_networks_are_verified_where_they_stand(training: bool, monkeypatch) -> None:
    family = sample("three stages, batch")
    cropped = crop(family.model, 2).train(not training)
    family.model.train(training)
    monkeypatch.setattr(copy, "deepcopy", lambda *_: pytest.fail("a network was copied"))
    before = [b.clone() for m in (family.model, cropped) for b in m.buffers()]
    verify_crop(family.model, cropped, held_out(family))
    assert all(map(torch.equal, before, [*family.model.buffers(), *cropped.buffers()]))
    assert {m.training for m in family.model.modules()} == {training}
    assert {m.training for m in cropped.modules()} == {not training}


def test_an_empty_loader_is_refused() -> None:
    model = sample("logit").model
    with pytest.raises(InputError, match="at least one sample"):
        verify_crop(model, model, [])


def test_multiply_adds_of_vectors_by_hand() -> None:
    model = Architecture("vector", (6,), 4, (3,), width=5, hidden=7).build()
    by_hand = 6 * 5 + 3 * (5 * 7 + 7 * 5) + 5 * 4
    assert multiply_adds(model, torch.zeros(1, 6)) == by_hand
    heun = Architecture("vector", (6,), 4, (3,), width=5, hidden=7, scheme="heun").build()
    # Each Heun step evaluates two residual functions.
    assert multiply_adds(heun, torch.zeros(1, 6)) == by_hand + 3 * 70
    assert multiply_adds(crop(heun, 1), torch.zeros(1, 6)) == 30 + 2 * 70 + 20


def test_multiply_adds_of_images_by_hand() -> None:
    a = Architecture("convolutional", (3, 16, 16), 4, (1, 2), width=4, hidden=6, reduction=2)
    stem = 9 * 3 * 4 * 8 * 8
    first = 9 * (4 * 6 + 6 * 4) * 8 * 8
    projection = 4 * 8 * 4 * 4
    second = 2 * 9 * (8 * 12 + 12 * 8) * 4 * 4
    head = 8 * 4
    expected = stem + first + projection + second + head
    assert multiply_adds(a.build().eval(), torch.zeros(1, 3, 16, 16)) == expected
    cifar = CifarArchitecture((1, 1, 1)).build().eval()
    blocks = 9 * (
        16 * 16 * 32 * 32 * 2 + (16 * 32 + 32 * 32) * 16 * 16 + (32 * 64 + 64 * 64) * 8 * 8
    )
    expected = 9 * 3 * 16 * 32 * 32 + blocks + 64 * 10
    assert multiply_adds(cifar, torch.zeros(1, 3, 32, 32)) == expected


@pytest.mark.slow
@pytest.mark.usefixtures("long_latencies")
def test_latency_falls_with_the_depth() -> None:
    torch.manual_seed(0)
    model = Architecture("vector", (32,), 4, (120,), width=32, hidden=32).build()
    x, y = torch.randn(16, 32), torch.zeros(16, dtype=torch.long)
    report = verify_crop(model, crop(model, 3), [(x, y)])
    # 40 times as many layers; the rest is head, overhead, and what else the machine does.
    assert 8 < report.latency_before / report.latency_after < 200
    ratio = report.parameters_before / report.parameters_after
    assert ratio == pytest.approx((120 * 2080 + 132) / (3 * 2080 + 132))


def test_attention_is_counted_among_the_multiply_adds() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
        image_size=16, patch_size=4, num_labels=4,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config).eval()
    tokens, width, hidden, patches = 17, 16, 32, 16
    layer = 4 * tokens * width**2 + 2 * tokens * width * hidden + 2 * tokens**2 * width
    by_hand = patches * 3 * 16 * width + 3 * layer + 4 * width
    assert multiply_adds(model, torch.zeros(1, 3, 16, 16)) == by_hand


def test_networks_of_other_classes_are_no_crop_of_each_other() -> None:
    few, many = (Architecture("vector", (4,), c, (2,), 4, 4).build() for c in (3, 5))
    with pytest.raises(InputError, match=r"shape \[6, 3\] before the cut and \[6, 5\] after"):
        verify_crop(few, many, [(torch.randn(6, 4), torch.zeros(6, dtype=torch.long))])


@pytest.mark.slow
def test_samples_without_a_label_count_nowhere(family: Sample) -> None:
    model = family.model.eval()
    cropped, y = crop(model, family.depth - 1), family.y.clone()
    y[::2] = -100
    labelled = [(family.x[1::2], family.y[1::2])]
    report = verify_crop(model, cropped, [(family.x, y)])
    expected = verify_crop(model, cropped, labelled)
    assert report.samples == expected.samples == len(family.y) // 2
    for name in ("accuracy_before", "accuracy_after", "agreement"):
        assert getattr(report, name) == getattr(expected, name)
    assert report.loss_after == pytest.approx(expected.loss_after, rel=1e-9)
    loss = SoftCrossEntropy(CLASSES, 0.1)
    measured = turnpike_profile(model, [(family.x, y)], loss)
    plain = turnpike_profile(model, labelled, loss)
    assert measured.samples == plain.samples
    assert measured.loss == pytest.approx(plain.loss, rel=1e-9)
    assert measured.relative_update == pytest.approx(plain.relative_update, rel=1e-9)
    costs = [StageCost(model, loss, 0.3)(*batch)[0] for batch in ((family.x, y), *labelled)]
    assert costs[0].item() == pytest.approx(costs[1].item(), rel=1e-9)
