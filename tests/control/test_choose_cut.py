"""Cuts chosen under a budget, against counting and trying by hand."""

import copy
import math
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from model_families import CLASSES, IMAGE, sample, shaken
from profiles import profile
from torch import Tensor, nn

from deeplimit import InputError, SoftCrossEntropy, choose_cut, crop, turnpike_profile
from deeplimit.control import CutChoice, TurnpikeProfile
from deeplimit.control.trials import Trials
from deeplimit.control.verifying import multiply_adds
from deeplimit.network import Architecture, CifarArchitecture, anatomy

pytestmark = pytest.mark.slow

LOSS = SoftCrossEntropy(CLASSES, 0.05)
STAGES = {
    "group": lambda: Architecture(
        "convolutional", IMAGE, CLASSES, (2, 3, 2), width=4, hidden=5, norm="group", reduction=1
    ).build(),
    "batch": lambda: Architecture(
        "convolutional", IMAGE, CLASSES, (3, 1, 2), width=4, hidden=5, reduction=1
    ).build(),
    "CIFAR ResNet": lambda: CifarArchitecture((2, 2, 2), classes=CLASSES).build(),
}
Batches = list[tuple[Tensor, Tensor]]


def inputs(shape: tuple[int, ...], count: int = 40) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(count, *shape, generator=generator, dtype=torch.float64)


def self_labelled(model: nn.Module, x: Tensor) -> Batches:
    """Batches whose targets are the model's own answers: any change of an answer is an error."""
    with torch.no_grad():
        y = model.eval()(x).argmax(1)
    return list(zip(x.split(20), y.split(20), strict=True))


def tried(model: nn.Module, removed: tuple[int, ...], loader: Batches) -> np.ndarray:
    """Whether each sample is right after a cut, sample by sample."""
    cropped = crop(model, remove=removed).eval()
    with torch.no_grad():
        rows = [
            float(cropped(sample_x[None])[0].argmax() == target)
            for x, y in loader
            for sample_x, target in zip(x, y, strict=True)
        ]
    return np.array(rows)


@torch.no_grad()
def losses(model: nn.Module, removed: tuple[int, ...], loader: Batches) -> np.ndarray:
    """The loss of each sample after a cut."""
    cropped = crop(model, remove=removed).eval()
    return torch.cat([LOSS(cropped(x), y) for x, y in loader]).numpy()


@torch.no_grad()
def silenced(kind: str, places: set[int]) -> nn.Module:
    """A network in which the layers at these places do exactly nothing."""
    model = shaken(STAGES[kind]()).eval()
    for n in places:
        (block,) = anatomy(model).layers[n].controls
        # The last norm: scale and bias.
        norms = [m for m in block.modules() if isinstance(m, nn.BatchNorm2d | nn.GroupNorm)]
        for parameter in norms[-1].parameters():
            parameter.zero_()
    # Logits of mean 0 and spread 1 for each class: all classes are answered.
    head = model.linear if kind == "CIFAR ResNet" else model.head[-1]
    logits = model(inputs(IMAGE))
    head.weight.div_(logits.std(0)[:, None])
    head.bias.sub_(logits.mean(0)).div_(logits.std(0))
    return model


# Not shrunk: that takes minutes, and one network is as small as another.
@settings(max_examples=3, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(
    kind=st.sampled_from(sorted(STAGES)),
    places=st.sets(st.integers(0, 5), min_size=1, max_size=4),
    data=st.data(),
)
def test_layers_that_do_nothing_go_first_whatever_the_budget(
    kind: str, places: set[int], data: st.DataObject
) -> None:
    model = silenced(kind, places)
    horizon = anatomy(model).horizon
    loader = self_labelled(model, inputs(IMAGE))
    made = turnpike_profile(model, loader, LOSS)
    assert {n for n, influence in enumerate(made.influence) if influence == 0} == places
    exact = tuple(sorted(places))
    kept = horizon - len(places)
    assert choose_cut(model, made, blocks=kept).removed == exact
    assert choose_cut(model, made, loader, blocks=kept).removed == exact
    fewer = data.draw(st.integers(kept, horizon))
    assert set(choose_cut(model, made, loader, blocks=fewer).removed) <= places
    chosen = choose_cut(model, made, loader, accuracy=0.0)
    assert chosen.removed == exact
    assert chosen.accuracy_after == chosen.accuracy_before == 1
    one = inputs(IMAGE, 1)
    share = multiply_adds(crop(model, remove=places), one) / multiply_adds(model, one)
    assert choose_cut(model, made, loader, multiply_adds=share).removed == exact


def test_with_a_confidence_samples_that_judge_ordered_nothing() -> None:
    places = {1, 3, 6}
    model = silenced("group", places)
    loader = self_labelled(model, inputs(IMAGE, 200))
    made = turnpike_profile(model, loader, LOSS)
    # What the profile says, of these very samples, decides nothing.
    told = replace(made, influence=tuple(reversed(made.influence)))
    for one in (made, told):
        chosen = choose_cut(model, one, loader, accuracy=0.02, confidence=0.95)
        assert (chosen.removed, chosen.score, chosen.samples) == ((1, 3, 6), "trial", 180)
        assert chosen.confidence == 0.95


@pytest.mark.usefixtures("long_latencies")
def test_the_latency_that_is_kept() -> None:
    torch.manual_seed(0)
    model = Architecture("vector", (16,), CLASSES, (14,), width=16, hidden=16).build().eval()
    alive = {3, 11}
    with torch.no_grad():
        for n in alive:
            for p in model.stages[0][n].parameters():
                p.normal_()
    x = torch.randn(30, 16)
    loader = self_labelled(model, x)
    made = turnpike_profile(model, loader, LOSS)
    chosen = choose_cut(model, made, loader, latency=0.5)
    assert 0 < chosen.latency_after <= 0.5 * chosen.latency_before
    assert not alive & set(chosen.removed)
    assert 3 < len(chosen.removed) < 12  # about half of the layers
    assert chosen.accuracy_after == 1
    assert chosen.multiply_adds_after == chosen.multiply_adds_before - 512 * len(chosen.removed)


@pytest.mark.parametrize("name", ["three stages, batch", "CIFAR ResNet", "vector", "chain, Heun"])
@pytest.mark.parametrize(
    "budget", [{"accuracy": 0.1}, {"accuracy": 0.45}, {"blocks": 2}, {"multiply_adds": 0.7}]
)
def test_every_figure_is_the_counted_one(name: str, budget: dict[str, float]) -> None:
    family = sample(name)
    model, x = family.model, inputs(tuple(family.x.shape[1:]), 50)
    loader = self_labelled(copy.deepcopy(model), x)
    for k, count in enumerate((6, 3)):
        wrong = (loader[k][1] + 1) % CLASSES
        loader[k] = (loader[k][0], torch.where(torch.arange(20) < count, wrong, loader[k][1]))
    made = turnpike_profile(model, loader, LOSS)
    chosen = choose_cut(model, made, loader, **budget)
    assert all(module.training for module in model.modules())
    (asked, limit), horizon = next(iter(budget.items())), family.depth
    assert (chosen.budget, chosen.limit) == (asked, limit)
    # The first batch puts the layers in order, the others judge.
    judging = loader[1:]
    before, after = tried(model, (), judging), tried(model, chosen.removed, judging)
    assert chosen.samples == 30
    assert chosen.accuracy_before == pytest.approx(before.mean(), abs=1e-12) == 27 / 30
    assert chosen.accuracy_after == pytest.approx(after.mean(), abs=1e-12)
    error = (after - before).std() / math.sqrt(30)
    assert chosen.accuracy_error == pytest.approx(error, abs=1e-12)
    assert chosen.multiply_adds_before == multiply_adds(model, x[:1])
    assert chosen.multiply_adds_after == multiply_adds(crop(model, remove=chosen.removed), x[:1])
    assert (chosen.latency_before, chosen.latency_after) == (None, None)
    # By hand: a strided block of the CIFAR ResNet is entered by a state of the stage before it.
    firsts = {"three stages, batch": (0, 2, 3), "CIFAR ResNet": (0, 3, 5)}.get(name, (0,))
    ends = (*firsts[1:], horizon)
    stages = [set(range(a, b)) for a, b in zip(firsts, ends, strict=True)]
    assert chosen.layers_before == tuple(map(len, stages))
    assert chosen.layers_after == tuple(len(own - set(chosen.removed)) for own in stages)
    assert chosen.removed == tuple(sorted(set(chosen.removed)))
    if asked == "accuracy":
        tests = 2 * math.ceil(math.log2(horizon + 1)) + 1
        z = NormalDist().inv_cdf(1 - 0.05 / tests)
        assert (before - after).mean() + z * error <= limit + 1e-12
    elif asked == "blocks":
        assert horizon - len(chosen.removed) == limit
    else:
        assert chosen.multiply_adds_after <= limit * chosen.multiply_adds_before


def test_the_number_that_goes_is_the_counted_one() -> None:
    """Every order by hand: its longest beginning that loses little, its shortest that saves enough.

    Along these orders the loss grows from layer to layer, so that bisection finds what a walk does.
    """
    family = sample("CIFAR ResNet")
    model, x = family.model, inputs(IMAGE, 50)
    loader = self_labelled(model, x)
    made = turnpike_profile(model, loader, LOSS)
    by_influence = sorted(range(family.depth), key=lambda n: made.influence[n])
    orders = {
        "influence": by_influence,
        "tail": list(range(family.depth))[::-1],
        "trial": naive_greedy(model, loader[0][0]),
    }

    def beginnings(score: str) -> list[tuple[int, ...]]:
        return [tuple(sorted(orders[score][:k])) for k in range(family.depth + 1)]

    tests = 2 * math.ceil(math.log2(family.depth + 1)) + 1
    z = NormalDist().inv_cdf(1 - 0.05 / tests)
    scale = math.log(CLASSES) - LOSS.minimum

    def good(removed: tuple[int, ...], limit: float) -> bool:
        lost = 1 - tried(model, removed, loader[1:])
        risen = losses(model, removed, loader[1:]) - losses(model, (), loader[1:])
        bounds = [v.mean() + z * v.std() / math.sqrt(30) for v in (lost, risen)]
        return bounds[0] <= limit and bounds[1] <= max(0.01, limit) * scale

    for limit in (0.0, 0.4):
        chosen = choose_cut(model, made, loader, accuracy=limit)
        fits = {
            score: [removed for removed in beginnings(score) if good(removed, limit)]
            for score in orders
        }
        assert chosen.removed in fits[chosen.score]
        assert len(chosen.removed) == max(len(own[-1]) for own in fits.values())
    costs = _costs(model, x)
    whole = multiply_adds(model, x[:1])
    for share in (0.5, 1.0):
        chosen = choose_cut(model, made, loader, multiply_adds=share)
        enough = {
            score: next(
                removed
                for removed in beginnings(score)
                if whole - sum(costs[n] for n in removed) <= share * whole
            )
            for score in orders
        }
        hits = {
            score: tried(model, removed, loader[1:]).mean() for score, removed in enough.items()
        }
        assert chosen.removed == enough[chosen.score]
        assert chosen.accuracy_after == max(hits.values())
    for kept in (1, 3):
        chosen = choose_cut(model, made, loader, blocks=kept)
        hits = {
            score: tried(model, beginnings(score)[family.depth - kept], loader[1:]).mean()
            for score in orders
        }
        assert chosen.accuracy_after == max(hits.values())
        assert chosen.removed == beginnings(chosen.score)[family.depth - kept]
        # Without data: the tail only where the profile says that it is not needed.
        assert (
            choose_cut(model, made, blocks=kept).removed
            == (
                beginnings("tail" if kept >= made.depth_within() else "influence")[
                    family.depth - kept
                ]
            )
        )


@torch.no_grad()
def naive_greedy(model: nn.Module, x: Tensor) -> list[int]:
    """Each time the layer whose removal leaves the answers nearest to the model's own."""
    p = model.eval()(x).softmax(1).numpy()
    left, gone = set(range(anatomy(model).horizon)), []
    while left:

        def apart(n: int) -> float:
            q = crop(model, remove=[*gone, n])(x).softmax(1).numpy()
            return float((p * np.log(p / q)).sum(1).mean())

        gone.append(min(left, key=apart))
        left.remove(gone[-1])
    return gone


def _costs(model: nn.Module, x: Tensor) -> list[int]:
    whole = multiply_adds(model, x[:1])
    layers = range(anatomy(model).horizon)
    return [whole - multiply_adds(crop(model, remove=[n]), x[:1]) for n in layers]


@torch.no_grad()
def test_the_order_by_trial_is_greedy() -> None:
    family = sample("three stages, batch")
    loader = self_labelled(family.model, inputs(IMAGE, 50))
    trials = Trials(anatomy(family.model), loader)
    greedy = naive_greedy(family.model, loader[0][0])
    assert list(trials.order(range(5))) == greedy
    assert list(trials.order(reversed(range(5)))) == greedy
    p, q = (m(loader[0][0]).softmax(1) for m in (family.model, crop(family.model, remove=[1, 3])))
    by_hand = float((p * (p / q).log()).sum(1).mean())
    assert trials.divergence([1, 3]) == pytest.approx(by_hand, rel=1e-10)
    assert trials.divergence([]) == 0


def arc(influence: tuple[float, ...] | None) -> TurnpikeProfile:
    """Five layers; the states enter the tube at layer 1 and leave it behind layer 3."""
    made = profile([9.0, 0.5, 0.4, 0.3, 8.0, 8.0], accuracy=[0.1, 0.8, 0.8, 0.8, 0.8, 0.99])
    return replace(made, influence=influence, relative_update=(0.5, 0.1, 0.4, 0.2, 0.3))


def test_what_a_profile_puts_first() -> None:
    model = sample("three stages, batch").model
    nan = float("nan")
    for influence, order, score in (
        ((0.3, 0.1, nan, 0.0, 0.1), [3, 4, 1, 0, 2], "influence"),  # who is not known goes last
        (None, [1, 3, 4, 2, 0], "update"),  # a profile saved by an earlier version
    ):
        for kept in range(1, 5):
            chosen = choose_cut(model, arc(influence), blocks=kept)
            assert chosen.removed == tuple(sorted(order[: 5 - kept]))
            assert chosen.score == score
            assert (chosen.accuracy_after, chosen.multiply_adds_after) == (None, None)
    # From the exit back is another order that may be best on data.
    made = arc((0.1, 0.2, 0.3, 0.4, 0.5))
    loader = self_labelled(silenced("batch", {1, 2}), inputs(IMAGE))
    chosen = choose_cut(silenced("batch", {1, 2}), replace_horizon(made), loader, blocks=4)
    assert (chosen.removed, chosen.score) == ((1, 2), "turnpike")


def replace_horizon(made: TurnpikeProfile) -> TurnpikeProfile:
    """With a sixth layer."""
    longer = {
        name: (*getattr(made, name), getattr(made, name)[-1])
        for name in (
            "loss",
            "accuracy",
            "distance",
            "loss_error",
            "accuracy_error",
            "relative_update",
            "influence",
        )
    }
    return replace(made, **longer)


def test_wrong_budgets_are_refused() -> None:
    family = sample("vector")
    loader = self_labelled(family.model, inputs((6,)))
    made = turnpike_profile(family.model, loader, LOSS)

    def refused(message: str, data: object = loader, **budget: object) -> None:
        with pytest.raises(InputError, match=message):
            choose_cut(family.model, made, data, **budget)

    refused("one budget: accuracy, rise, blocks, multiply_adds or latency; none given")
    refused("blocks and latency given", blocks=2, latency=0.5)
    refused("0 blocks are to be kept; the model has 4: 1 … 4", blocks=0)
    refused("5 blocks are to be kept; the model has 4", blocks=5)
    for wrong in (0.0, -1.0, 1.5, float("nan")):
        refused("multiply-adds is to be kept; expected one above 0 up to 1", multiply_adds=wrong)
        refused("latency is to be kept", latency=wrong)
    for wrong in (-0.1, 0.5, 1.0, float("nan")):
        refused("points of accuracy may be lost; expected from 0 to less than 50", accuracy=wrong)
    refused("budget accuracy is measured on data", None, accuracy=0.1)
    refused("budget latency is measured on data", None, latency=0.5)
    refused("cannot reach by removing layers; give a larger budget", multiply_adds=0.01)
    refused("gone through only once", iter(loader), blocks=2)
    refused("no batch", [], blocks=2)
    with pytest.raises(InputError, match="with 5 layers, the model has 4; profile this model"):
        choose_cut(family.model, arc(None), blocks=2)

    class Shuffled(list):
        def __iter__(self):
            self.reverse()
            return super().__iter__()

    refused("another order every time", Shuffled(loader), blocks=2)


def test_layers_that_cannot_be_removed_stay() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=4,
        hidden_sizes=[4, 8],
        depths=[2, 2],
        layer_type="basic",
        num_labels=CLASSES,
    )
    torch.manual_seed(0)
    model = shaken(transformers.ResNetForImageClassification(config)).eval()
    structure = anatomy(model)
    assert structure.fixed
    free = [n for n in range(structure.horizon) if n not in structure.fixed]
    x = inputs((3, 32, 32), 12)
    with torch.no_grad():
        loader = [(x, model(x).logits.argmax(1))]
    made = turnpike_profile(model, loader, LOSS)
    chosen = choose_cut(model, made, blocks=structure.horizon - 1)
    ranked = sorted(free, key=lambda n: made.influence[n])
    assert chosen.removed in ((ranked[0],), (max(free),))
    for data in (None, loader):
        with pytest.raises(InputError, match=r"layers .*\b2\b.* cannot be removed"):
            choose_cut(model, made, data, blocks=1)
    assert not set(structure.fixed) & set(choose_cut(model, made, loader, accuracy=0.45).removed)


def test_a_choice_is_a_line_and_a_cut() -> None:
    family = sample("CIFAR ResNet")
    loader = self_labelled(family.model, inputs(IMAGE, 20))
    chosen = choose_cut(
        family.model, turnpike_profile(family.model, loader, LOSS), loader, blocks=4
    )
    assert isinstance(chosen, CutChoice)
    smaller = crop(family.model, remove=chosen.removed)
    assert anatomy(smaller).horizon == sum(chosen.layers_after) == 4
    kept = zip(chosen.layers_after, chosen.layers_before, strict=True)
    shown = ", ".join(f"{a} of {b}" for a, b in kept)
    assert str(chosen) == (
        f"layers kept per stage: {shown} (by {chosen.score}); accuracy 100.00 → "
        f"{100 * chosen.accuracy_after:.2f} % of 10 samples; multiply-adds "
        f"{chosen.multiply_adds_before:,} → {chosen.multiply_adds_after:,}"
    )
