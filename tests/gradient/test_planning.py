"""Plans of memory against all plans, one by one; budgets against the allocator's account."""

import copy
import itertools
import math
import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from adjoint_models import inputs, sequence
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import deeplimit
from deeplimit import (
    InputError,
    ResidualChain,
    gradient_error,
    plan_memory,
    use_adjoint,
    use_backprop,
)
from deeplimit.gradient import AdjointError, DriftWarning, MemoryPlan, Way, layout
from deeplimit.gradient.accuracy import Measurement, peak_memory
from deeplimit.gradient.meter import KEPT
from deeplimit.gradient.planning import EXACTLY, Planner
from deeplimit.gradient.stand_ins import engines
from deeplimit.network.blocks import ConvolutionalResidual, TwoLayerResidual
from deeplimit.records import from_plain, to_plain


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).sin().sum()


class PostNorm(nn.Module):
    """LN(x + g·f(x)), with dropout in f."""

    def __init__(self, width: int = 16, dropout: float = 0.0, gain: float = 1.0):
        super().__init__()
        self.inner, self.outer = nn.Linear(width, 24), nn.Linear(24, width)
        self.norm, self.dropout, self.gain = nn.LayerNorm(width), nn.Dropout(dropout), gain

    def forward(self, x: Tensor) -> Tensor:
        branch = self.outer(self.dropout(nn.functional.gelu(self.inner(x))))
        y: Tensor = self.norm(x + self.gain * branch)
        return y


class Attending(nn.Module):
    """A transformer's block, norms before, with dropout."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.block = nn.TransformerEncoderLayer(
            width, 2, 2 * width, dropout=0.1, batch_first=True, norm_first=True
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(x)
        return y


def post_norm(depth: int, **settings: float) -> nn.Sequential:
    torch.manual_seed(0)
    gains = itertools.cycle((0.1, 3.0, 0.3, 1.0))
    return nn.Sequential(*(PostNorm(gain=next(gains), **settings) for _ in range(depth)))  # type: ignore[arg-type]


def convolutional(depth: int = 8) -> nn.Sequential:
    """With BatchNorm in training mode."""
    torch.manual_seed(0)
    blocks = [ConvolutionalResidual(8, 8, "batch", "gelu") for _ in range(depth)]
    for block in blocks:
        for p in block.parameters():
            nn.init.normal_(p, std=0.2)
    return nn.Sequential(ResidualChain(blocks, step=0.5), nn.Flatten(), nn.Linear(8 * 64, 3))


def transformer(depth: int = 7) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Attending() for _ in range(depth)))


CASES: dict[str, tuple[Callable[[], nn.Sequential], tuple[int, ...]]] = {
    "convolutions, BatchNorm": (convolutional, (16, 8, 8, 8)),
    "transformer, dropout": (transformer, (8, 24, 16)),
    "norm after, dropout": (partial(post_norm, 8, dropout=0.1), (512, 16)),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_budgets_are_kept_and_more_is_never_less_accurate_nor_less_more_memory(case: str) -> None:
    """Ten budgets, from the least that is possible to what all states take."""
    make, shape = CASES[case]
    model, x = make(), torch.randn(*shape, generator=torch.manual_seed(1))
    use_adjoint(model, bits=4, on_drift="ignore")
    planner = Planner(Measurement(model, loss_of, x, **EXACTLY), 1e-2)
    with pytest.raises(InputError, match=r"memory is 1000 bytes; expected at least \d+") as least:
        planner.plan(1000)
    low = int(str(least.value).split("at least ")[1].split(",")[0])
    high = planner.plan(10**9)
    assert high.error == 0.0
    assert set(high.ways.values()) == {KEPT}
    assert high.memory is not None
    budgets = [round(low + k * (high.memory - low) / 9) for k in range(10)]
    plans = [planner.plan(budget) for budget in budgets]
    assert plan_memory(model, loss_of, x, memory=budgets[4]).ways == plans[4].ways
    errors, peaks = [], []
    for budget, plan in zip(budgets, plans, strict=True):
        use_adjoint(model, plan=plan, on_drift="ignore")
        torch.manual_seed(0)
        loss_of(model, x).backward()
        peaks.append(peak_memory(lambda: loss_of(model, x).backward(), model, x.device))
        errors.append(gradient_error(model, loss_of, x).error)
        assert peaks[-1] <= budget
        assert errors[-1] == pytest.approx(plan.error, rel=1e-3, abs=1e-5)
    assert peaks == sorted(peaks)
    assert errors == sorted(errors, reverse=True)
    assert len(set(peaks)) >= 3
    assert errors[0] > 10 * errors[-1]


def test_a_plan_does_not_depend_on_the_callers_random_numbers() -> None:
    model, x = post_norm(4, dropout=0.5), torch.randn(32, 16)
    use_adjoint(model, bits=4, on_drift="ignore")
    plans = []
    for seed in range(2):
        torch.manual_seed(seed)
        plans.append(plan_memory(model, loss_of, x, memory=10**6))
    assert plans[0] == plans[1]
    assert f"of {10**6 / 2**20:.4g} MiB" in str(plans[0])


def all_plans(names: list[str], ways: tuple[Way, ...]) -> list[dict[str, Way]]:
    return [
        dict(zip(names, chosen, strict=True))
        for chosen in itertools.product(ways, repeat=len(names))
    ]


@pytest.mark.slow
def test_hardly_a_plan_takes_less() -> None:
    """All 256 mixtures of codes and kept states, measured; blocks of uneven strength."""
    model, x = post_norm(6), torch.randn(512, 16, generator=torch.manual_seed(1))
    use_adjoint(model, bits=4, on_drift="ignore")
    planner = Planner(Measurement(model, loss_of, x, **EXACTLY), 1e-2)
    ways = (KEPT, *(Way(b, 1) for b in (2, 4, 8)))
    tried = [planner._tried(w)[0] for w in all_plans(list("1234"), ways)]
    for tolerance in (3e-2, 3e-3, 3e-4):
        plan = plan_memory(model, loss_of, x, tolerance)
        enough = [p for p in tried if p.error <= tolerance]
        assert plan.error <= tolerance
        assert plan.states <= 1.1 * min(p.states for p in enough)
        assert plan.states <= min(p.states for p in enough if len(set(p.ways.values())) == 1)


@pytest.mark.slow
def test_states_that_are_rebuilt_lie_between_kept_ones_where_that_is_cheapest() -> None:
    """Float64 states of six numbers: a code costs more than they do. Against all anchors."""
    model, x = sequence(10), inputs(5, 6)
    for n, gain in enumerate((0.1, 0.9, 0.2, 0.1, 1.2, 0.1, 0.3, 0.7, 0.2, 0.1)):
        model[n].gain = gain  # type: ignore[assignment]
    use_adjoint(model, on_drift="ignore")
    names = [str(n) for n in range(1, 9)]
    planner = Planner(Measurement(model, loss_of, x, **EXACTLY), 1e-2)
    every = [planner._tried(w)[0] for w in all_plans(names, (KEPT, Way(0, 2)))]
    for tolerance in (3e-2, 1e-3, 1e-4):
        plan = plan_memory(model, loss_of, x, tolerance)
        assert plan.error <= tolerance
        assert plan.states <= min(p.states for p in every if p.error <= tolerance) + 5 * 6 * 8
        assert gradient_error(
            use_adjoint(model, plan=plan, on_drift="ignore"), loss_of, x
        ).error == pytest.approx(plan.error, rel=1e-6)
        use_adjoint(model, on_drift="ignore")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_any_mixture_of_ways_is_right_to_its_own_precision(seed: int) -> None:
    """Kept, coded and rebuilt in any order, in one chain of contracting blocks; float64."""
    model, x = sequence(12, gain=0.05), inputs(64, 6)
    draw = torch.manual_seed(seed)
    ways = (KEPT, Way(0, 30), Way(8, 1), Way(4, 2), Way(2, 30))
    chosen = {str(n): ways[int(torch.randint(5, (), generator=draw))] for n in range(1, 11)}
    plan = MemoryPlan(chosen, 1.0, 1.0, 0, None, 1e-2, None)
    use_adjoint(model, plan=plan, on_drift="ignore")
    loss_of(model, x).backward()
    model.zero_grad()
    loss_of(model, x).backward()
    found = layout(model)
    assert found.coded == {n: w.bits for n, w in chosen.items() if w.bits}
    assert [n for n in found.rebuilt if n in chosen] == [
        n for n, w in chosen.items() if w == ways[1]
    ]
    assert set(chosen) - {*found.coded, *found.rebuilt} <= set(found.kept)
    error, alone = gradient_error(model, loss_of, x).error, [0.0]
    used = {*chosen.values()} - {KEPT}
    # The error of a state is that of the code before it, less what its own evaluations leave of it.
    for bits, e in itertools.product({w.bits for w in used}, {w.evaluations for w in used}):
        if bits or e == 30:
            use_adjoint(model, bits=bits, evaluations=e, on_drift="ignore")
        alone.append(gradient_error(model, loss_of, x).error)
    assert error <= 1.5 * max(alone) + 1e-14


def test_where_rebuilding_is_enough_nothing_is_kept() -> None:
    model = use_adjoint(sequence(6), evaluations=3, tolerance=0.5)
    plan = plan_memory(model, loss_of, inputs(5, 6))
    assert set(plan.ways.values()) == {Way(0, 1)}
    assert plan.tolerance == 0.5
    assert plan.error < 0.5
    text = str(plan)
    assert "1 … 4" in text
    assert "rebuilt, e = 1" in text
    assert from_plain(MemoryPlan, to_plain(plan)) == plan


def test_the_plan_leaves_the_model_as_it_was() -> None:
    """Without bits blocks that add nothing are plain; in the plan they are coded."""
    model, x = post_norm(5), torch.randn(64, 16)
    with warnings.catch_warnings(record=True):
        use_adjoint(model, on_drift="ignore")
        loss_of(model, x).backward()
        model.zero_grad()
        before = layout(model)
        random = torch.get_rng_state()
        plan = plan_memory(model, loss_of, x, 1e-2)
    assert {way.bits for way in plan.ways.values()} <= {2, 4, 8}
    assert layout(model) == before
    assert set(before.plain) == set("01234")
    assert torch.equal(random, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())
    for wrong in (0.0, -1.0, math.nan):
        with pytest.raises(InputError, match="must be a number > 0"):
            plan_memory(model, loss_of, x, wrong)
    with pytest.raises(InputError, match="memory is 0"):
        plan_memory(model, loss_of, x, memory=0)
    for given in ({"bits": 4}, {"evaluations": 2}):
        with pytest.raises(InputError, match="plan given, and bits or evaluations"):
            use_adjoint(model, plan=plan, **given)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="the plan names '1', which is not one"):
        use_adjoint(sequence(1), plan=plan)
    short = use_adjoint(post_norm(2), bits=4)
    assert plan_memory(short, loss_of, x, memory=10**9).ways == {}


def test_the_old_name_warns() -> None:
    with pytest.warns(DeprecationWarning, match="plan_anchors is called plan_memory now"):
        assert deeplimit.plan_anchors is plan_memory  # type: ignore[attr-defined]


class Model(nn.Module):
    """A loss of its own, with other outputs; blocks with a norm after the addition."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.layers = post_norm(8, dropout=dropout)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor, *, y: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(self.layers(x))
        return {"logits": logits} if y is None else {"loss": logits[:, y].mean(), "logits": logits}


def backward(times: int, loss: Callable[[], Tensor]) -> None:
    for _ in range(times):
        loss().backward()


def steps(model: nn.Module, x: Tensor, count: int, **given: Tensor) -> list[dict[str, Way]]:
    """The ways by which the states of each step came back."""
    found = []
    for _ in range(count):
        out = model(x, **given)
        found.append(dict(engines(model)[0].settings.ways))
        (out["loss"] if given else out["logits"].square().mean()).backward()
    return found


@pytest.mark.parametrize("inside", [True, False], ids=["loss inside", "loss outside"])
def test_auto_is_the_plan_of_the_first_batch(inside: bool) -> None:
    torch.manual_seed(0)
    model, x, y = Model(dropout=0.1), torch.randn(256, 16), torch.tensor([0, 2])
    given = {"y": y} if inside else {}

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        out = model(x, **given)
        return out["loss"] if inside else out["logits"].square().mean()

    use_adjoint(model, bits=8)
    plan = plan_memory(model, loss, x, 5e-3)  # half the tolerance
    use_adjoint(model, bits="auto", tolerance=1e-2)
    before = [b.clone() for b in model.state_dict().values()]
    first, second = steps(model, x, 2, **given)
    assert first == {}
    assert second == plan.ways
    assert all(map(torch.equal, before, model.state_dict().values()))
    assert len(set(second.values())) > 1
    assert gradient_error(model, loss, x).error == pytest.approx(plan.error, rel=1e-3)
    use_backprop(model)
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


def test_auto_measures_again_and_plans_anew_where_blocks_are_no_longer_what_they_were() -> None:
    torch.manual_seed(0)
    model, x = Model(), torch.randn(256, 16)
    use_adjoint(model, bits="auto", tolerance=1e-2)
    _, ways, _ = steps(model, x, 3)
    steps(model, x, 6)
    assert engines(model)[0].settings.ways == ways  # looked at, and kept
    with torch.no_grad():
        for block in model.layers:
            block.inner.weight.mul_(6)  # type: ignore[union-attr, operator]
    loss = lambda m, x: m(x)["logits"].square().mean()  # noqa: E731
    assert gradient_error(model, loss, x).error > 1e-2
    with pytest.warns(DriftWarning, match=r"error was 0\.\d+ when it was measured again"):
        steps(model, x, 12)
    assert engines(model)[0].settings.ways != ways
    assert gradient_error(model, loss, x).error < 5e-3
    use_adjoint(model, bits="auto", tolerance=1e-2, on_drift="raise")
    steps(model, x, 2)
    with torch.no_grad():
        for block in model.layers:
            block.inner.weight.mul_(6)  # type: ignore[union-attr, operator]
    with pytest.raises(AdjointError, match="measured again, beyond the tolerance"):
        steps(model, x, 12)


def test_a_measured_error_stands_as_long_as_its_bound_does() -> None:
    """At 4 bits the bound is beyond the tolerance, the error far below it."""
    torch.manual_seed(0)
    model, x = transformer(6).eval(), torch.randn(16, 24, 16)
    use_adjoint(model, bits=8)
    plan = plan_memory(model, loss_of, x, 3e-2)
    assert 0 < plan.error < 3e-2 < plan.bound
    use_adjoint(model, plan=plan, on_drift="raise")
    for _ in range(2):
        loss_of(model, x).backward()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    with pytest.raises(AdjointError, match=r"beyond the tolerance 0\.03\. A plan for a smaller"):
        loss_of(model, x).backward()


def test_auto_in_copies_in_pickles_and_between_other_passes() -> None:
    torch.manual_seed(0)
    model = use_adjoint(Model(), bits="auto")
    x = torch.randn(256, 16)
    steps(model, x, 1)
    with torch.no_grad():
        model(x)
    assert gradient_error(model, lambda m, x: m(x)["logits"].sum(), x).error < 1e-6
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        first, second, third = steps(other, x, 3)
        assert first == {}
        assert second == third != {}
        assert engines(model)[0].settings.ways == {}
    assert steps(model, x, 1)[0] == second


def test_auto_that_never_sees_the_whole_says_so() -> None:
    torch.manual_seed(0)
    model, x = use_adjoint(Model(), bits="auto"), torch.randn(16, 16)
    with pytest.warns(DriftWarning, match="every state is kept.*has not been run as a whole"):
        backward(4, lambda: model.layers(x).sum())


def test_auto_whose_batch_cannot_be_run_again_takes_eight_bits() -> None:
    class Once(Model):
        """Takes from a list of its caller's."""

        def forward(self, x: list[Tensor]) -> dict[str, Tensor]:  # type: ignore[override]
            return super().forward(x.pop())

    torch.manual_seed(0)
    model = use_adjoint(Once(), bits="auto")
    with pytest.warns(DriftWarning, match="no plan could be made.*8 bits"):
        backward(3, lambda: model([torch.randn(64, 16)])["logits"].square().mean())
    assert set(layout(model).coded.values()) == {8}


def test_auto_with_a_stage_cost_plans_for_the_whole_objective() -> None:
    torch.manual_seed(0)
    chain = ResidualChain([TwoLayerResidual(16, 24, "tanh") for _ in range(8)], step=0.5)
    net = nn.Sequential(chain, nn.Linear(16, 3))
    for p in net.parameters():
        nn.init.normal_(p, std=0.4)
    objective = use_adjoint(
        deeplimit.StageCost(net, deeplimit.SoftCrossEntropy(3), weight=0.1), bits="auto"
    )
    x, y = torch.randn(128, 16), torch.randint(3, (128,))
    backward(2, lambda: objective(x, y)[0])
    ways = engines(objective)[0].settings.ways
    assert set(ways) == {f"model.0.{n}" for n in range(1, 7)}
    error = gradient_error(objective, lambda m, batch: m(*batch)[0], (x, y)).error
    assert 0 < error <= 5e-3
    use_adjoint(net, bits="auto")  # inside, where the costs are not seen
    with pytest.warns(DriftWarning, match="no plan could be made.*give use_adjoint the StageCost"):
        backward(4, lambda: objective(x, y)[0])
    assert set(layout(net).coded.values()) == {8}


TINY: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
}


def of_transformers(kind: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A model of tokens with a batch: a language model, or a classifier of one token."""
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    words = torch.randint(50, (3, 9))
    if kind == "llama":
        config = hf.LlamaConfig(vocab_size=50, num_key_value_heads=1, **TINY)
        return hf.LlamaForCausalLM(config), words, words
    if kind == "bert":
        config = hf.BertConfig(vocab_size=50, num_labels=4, **TINY)
        return hf.BertForSequenceClassification(config), words, torch.tensor([0, 3, 1])
    config = hf.ViTConfig(image_size=16, patch_size=4, num_labels=4, **TINY)
    images = torch.randn(3, 3, 16, 16)
    return hf.ViTForImageClassification(config), images, torch.tensor([0, 3, 1])


@pytest.mark.parametrize("layers", [None, 1], ids=["all layers", "one drawn"])
@pytest.mark.parametrize("kind", ["llama", "bert", "vit"])
@pytest.mark.parametrize("around", [True, False], ids=["around", "inside"])
def test_auto_of_tokens_with_a_stage_cost_trains(
    kind: str, layers: int | None, around: bool
) -> None:
    """The stage cost's head runs the whole model, its blocks bypassed, in the backward pass too."""
    pair = []
    for switched in (True, False):
        model, x, y = of_transformers(kind)
        model.eval()  # without dropout
        if switched and not around:
            use_adjoint(model, bits="auto")
        loss = deeplimit.SoftCrossEntropy(50 if kind == "llama" else 4)
        shift = kind == "llama"
        objective = deeplimit.StageCost(model, loss, weight=0.1, layers=layers, shift=shift)
        pair.append(use_adjoint(objective, bits="auto") if switched and around else objective)
    optimisers = [torch.optim.SGD(objective.parameters(), lr=0.1) for objective in pair]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(6):
            for objective in pair:
                objective(x, y)[0].backward()
            gradients = [torch.cat([p.grad.flatten() for p in o.parameters()]) for o in pair]  # type: ignore[union-attr]
            assert (gradients[0] - gradients[1]).norm() <= 1e-2 * gradients[1].norm()
            if step % 2:  # gradients of two batches together
                for optimiser in optimisers:
                    optimiser.step()
                    optimiser.zero_grad()
                pair[1].load_state_dict(pair[0].state_dict())
            with torch.no_grad():
                pair[0](x, y)
                if kind == "llama":
                    pair[0].model.generate(x, max_new_tokens=2, do_sample=False, pad_token_id=0)
    said = [str(w.message) for w in caught if "no plan could be made" in str(w.message)]
    if around:
        assert not said
        assert set(engines(pair[0])[0].settings.ways) != set()
    else:
        assert len(said) == 1
        assert "give use_adjoint the StageCost" in said[0]
        assert set(layout(pair[0].model).coded.values()) == {8}


def test_auto_plans_for_whole_steps_alone() -> None:
    """Not in a checkpoint's recomputation, nor for a head that is read with blocks bypassed."""
    model, x, _ = of_transformers("vit")
    use_adjoint(model.eval(), bits="auto", on_drift="raise")
    read = deeplimit.anatomy(model, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DriftWarning)
        for step in range(3):
            out = checkpoint(lambda x: model(x).logits, x, use_reentrant=False)
            assert bool(engines(model)[0].settings.ways) is (step > 0)
            out.square().mean().backward()
            state = torch.randn(3, 17, 16, requires_grad=True)
            read.logits([state], x=x).square().mean().backward()
    error = gradient_error(model, lambda m, x: m(x).logits.square().mean(), x).error
    assert error <= 1e-2


def test_gradient_error_says_what_is_wrong() -> None:
    model, x = sequence(3), inputs(5, 6)
    with pytest.raises(InputError, match="not switched; call use_adjoint"):
        gradient_error(model, loss_of, x)
    use_adjoint(model)
    with pytest.raises(InputError, match=r"shape \(5, 6\); expected a scalar"):
        gradient_error(model, lambda m, x: m(x), x)
    with pytest.raises(InputError, match="no parameter"):
        gradient_error(model.requires_grad_(False), loss_of, x)


def test_gradient_error_by_hand() -> None:
    model, x = sequence(6, gain=0.6), inputs(5, 6)
    exact = torch.autograd.grad(loss_of(model, x), list(model.parameters()))
    use_adjoint(model, evaluations=1, on_drift="ignore")
    got = torch.autograd.grad(loss_of(model, x), list(model.parameters()))
    gaps = [float((a - b).norm()) for a, b in zip(got, exact, strict=True)]
    sizes = [float(b.norm()) for b in exact]
    report = gradient_error(model, loss_of, x)
    assert report.error == pytest.approx(math.hypot(*gaps) / math.hypot(*sizes), rel=1e-9)
    floor = 0.01 * math.hypot(*sizes)
    own = [a / max(b, floor) for a, b in zip(gaps, sizes, strict=True)]
    assert report.worst_error == pytest.approx(max(own), rel=1e-9)
    names = [name for name, _ in model.named_parameters()]
    assert report.worst == names[own.index(max(own))]
    assert report.loss == pytest.approx(float(loss_of(model, x).detach()))


@pytest.mark.parametrize(
    ("gives", "what"), [(None, "NoneType"), (3.0, "float"), (torch.ones(2), r"a tensor of shape")]
)
def test_a_loss_that_is_none_is_said(gives: object, what: str) -> None:
    model = use_adjoint(nn.Sequential(PostNorm(), PostNorm()), bits=4)
    with pytest.raises(InputError, match=rf"loss_of gave {what}.*expected a scalar"):
        plan_memory(model, lambda *_: gives, torch.randn(2, 16))  # type: ignore[arg-type, return-value]


def test_a_plan_of_a_shallower_model_is_right_and_of_a_deeper_one_refused() -> None:
    torch.manual_seed(0)
    deep, x = nn.Sequential(*(PostNorm() for _ in range(7))), torch.randn(256, 16)
    shallow = use_adjoint(copy.deepcopy(deep[:5]), bits=8)
    plan = plan_memory(shallow, loss_of, x, 1e-2)
    assert any(way != KEPT for way in plan.ways.values())
    exact = copy.deepcopy(deep)
    loss_of(exact, x).backward()
    loss_of(use_adjoint(deep, plan=plan, on_drift="raise"), x).backward()
    for p, q in zip(deep.parameters(), exact.parameters(), strict=True):
        assert (p.grad - q.grad).norm() <= 0.05 * q.grad.norm()
    assert {"4", "5", "6"} <= set(layout(deep).kept)
    with pytest.raises(InputError, match="the plan names '3', which is not one of the blocks"):
        use_adjoint(nn.Sequential(PostNorm(), PostNorm()), plan=replace(plan, ways={"3": KEPT}))
