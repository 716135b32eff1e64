"""Early exit: rows that left are gone, answers are those of really cut models, the risk is kept."""

import copy
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from own_models import Own, X
from scipy.stats import binom
from text_families import DEPTH, text_model
from torch import Tensor, nn

from deeplimit import Heun, InputError, ResidualChain, StageCost, anatomy, crop, turnpike_profile
from deeplimit.control import EarlyExit, ExitChoice, SoftCrossEntropy, at_depth, exit_depths
from deeplimit.control.exit_choice import Answers, binomial_tail
from deeplimit.network import CifarArchitecture

IDS = torch.randint(3, 60, (12, 7), generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(7) < torch.arange(12)[:, None] % 5 + 3).long()


def chain(scheme: object = None) -> nn.Module:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(6)]
    return ResidualChain(blocks, step=0.5, scheme=scheme).double()  # type: ignore[arg-type]


def cases() -> Iterable[Any]:
    rows = torch.randn(16, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    images = torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(1)).double()
    torch.manual_seed(0)
    text = {"input_ids": IDS, "attention_mask": MASK}
    yield "own", lambda: Own().double(), X.double()
    yield "chain", chain, rows
    yield "Heun", lambda: chain(Heun()), rows
    yield "stages", lambda: CifarArchitecture(depths=(2, 2, 2)).build().double(), images
    yield "text", lambda: text_model("BertForSequenceClassification"), text


CASES = list(cases())
FORMS = pytest.mark.parametrize(("make", "x"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])


def called(model: nn.Module, x: Any) -> Tensor:
    z = model(**x) if isinstance(x, dict) else model(x)
    return z if isinstance(z, Tensor) else z.logits


@FORMS
@torch.no_grad()
def test_at_a_depth_a_model_answers_as_its_crop(make: Callable[[], nn.Module], x: Any) -> None:
    model = make().eval()
    own, keys = called(model, x), list(model.state_dict())
    states, _ = anatomy(model).states(x)
    for depth in range(1, anatomy(model).horizon + 1):
        with at_depth(model, depth):
            z = called(model, x)
            assert list(model.state_dict()) == keys
        try:
            expected = called(crop(model, depth), x)
        except InputError:  # a layer that has to stay
            expected = anatomy(model).logits([states[depth]], depth, x=x)[0]
        torch.testing.assert_close(z, expected, rtol=0, atol=1e-12)
    assert torch.equal(called(model, x), own)


@FORMS
@torch.no_grad()
def test_each_sample_has_the_answer_of_the_depth_at_which_it_is_sure(
    make: Callable[[], nn.Module], x: Any
) -> None:
    model = make().eval()
    structure = anatomy(model)
    states, own = structure.states(x)
    z = structure.logits(states, x=x)
    sure, depth = z.softmax(-1).amax(-1), structure.horizon
    exits = [1, depth // 2, depth - 1]
    thresholds = {n: float(sure[n].quantile(0.6, interpolation="midpoint")) for n in exits}
    early = EarlyExit(model, thresholds).eval()
    answers = called(early, x)
    for i in range(len(own)):
        left = next((n for n in exits if sure[n, i] >= thresholds[n]), depth)
        assert int(early.taken[i]) == left
        torch.testing.assert_close(answers[i], z[left, i], rtol=0, atol=1e-12)
    assert len(early.taken.unique()) > 1


@torch.no_grad()
def test_rows_that_left_are_gone_from_later_blocks_and_their_masks() -> None:
    model = text_model("BertForSequenceClassification")
    structure = anatomy(model)
    x = {"input_ids": IDS, "attention_mask": MASK}
    sure = structure.logits(structure.states(x)[0], x=x).softmax(-1).amax(-1)
    early = EarlyExit(model, {2: float(sure[2].median())}).eval()
    seen: list[set[int]] = []
    for block in structure.blocks:
        block.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(
                {len(v) for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.dim()}
            ),
            with_kwargs=True,
        )
    early(**x)
    gone = int((early.taken == 2).sum())
    assert 0 < gone < 12
    assert seen == [{12}, {12}, *(DEPTH - 2) * [{12 - gone}]]


@torch.no_grad()
def test_a_text_is_written_by_the_first_layers() -> None:
    model = text_model("LlamaForCausalLM")

    def write(one: Any) -> Tensor:
        return one.generate(IDS[:2], max_new_tokens=8, do_sample=False)

    with at_depth(model, 2):
        draft = write(model)
    assert torch.equal(draft, write(crop(model, 2)))
    assert not torch.equal(draft, write(model))


def test_gradients_at_a_depth_are_those_of_the_crop() -> None:
    model = chain()
    x = torch.randn(8, 5, dtype=torch.float64)
    smaller = crop(model, 3)
    smaller(x).square().sum().backward()
    with at_depth(model, 3):
        model(x).square().sum().backward()
    for own, theirs in zip(list(model)[:3], smaller, strict=True):
        for p, q in zip(own.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=0)
    assert all(p.grad is None for block in list(model)[3:] for p in block.parameters())


class Lists(Own):
    """Takes a list with an entry for each sample, and answers with one."""

    def forward(self, x: Tensor, scales: Any = None) -> dict[str, Any]:
        z = super().forward(x)
        if scales is not None:
            z = torch.stack([scale * one for scale, one in zip(scales, z, strict=False)])
        return {"logits": z, "names": [f"class {n}" for n in z.argmax(1).tolist()]}


@torch.no_grad()
def test_lists_with_an_entry_for_each_sample_lose_those_that_left() -> None:
    model = Lists().double().eval()
    scales = [1.0 + n % 3 for n in range(len(X))]
    with at_depth(model, 1):
        first = model(X.double(), scales=scales)["logits"]
    threshold = float(first.softmax(1).amax(1).median())
    early = EarlyExit(model, {1: threshold}).eval()
    out, last = early(X.double(), scales=scales), model(X.double(), scales=scales)["logits"]
    expected = torch.where((early.taken == 1)[:, None], first, last)
    assert 0 < int((early.taken == 1).sum()) < len(X)
    torch.testing.assert_close(out["logits"], expected, rtol=1e-12, atol=1e-12)
    assert out["names"] == [f"class {n}" for n in expected.argmax(1).tolist()]


@pytest.mark.parametrize(
    "more", [lambda z: float(z.mean()), lambda z: z @ z.T], ids=["mean", "pairs"]
)
@torch.no_grad()
def test_what_is_of_the_whole_batch_is_no_answer_of_samples(more: Callable[[Tensor], Any]) -> None:
    class Whole(Own):
        def forward(self, x: Tensor) -> dict[str, Any]:
            z = super().forward(x)
            return {"logits": z, "more": more(z)}

    model = Whole().eval()
    with at_depth(model, 1):
        threshold = float(model(X)["logits"].softmax(1).amax(1).median())
    with pytest.raises(InputError, match="none of single samples"):
        EarlyExit(model, {1: threshold}).eval()(X)


@torch.no_grad()
def test_an_empty_batch_and_a_block_in_place_of_another() -> None:
    rows = X.double()
    model = Own().double().eval()
    with at_depth(model, 2):
        threshold = float(model(rows).softmax(1).amax(1).median())
    early = EarlyExit(model, {2: threshold}).eval()
    assert early(rows[:0]).shape == model(rows[:0]).shape
    assert early.taken.shape == (0,)
    model.body[3] = copy.deepcopy(model.body[0])
    fresh = EarlyExit(model, {2: threshold}).eval()
    torch.testing.assert_close(early(rows), fresh(rows), rtol=0, atol=0)


def test_in_training_mode_all_samples_go_to_the_end() -> None:
    model = chain()
    early = EarlyExit(model, {1: 0.0})
    x = torch.randn(4, 5, dtype=torch.float64)
    assert torch.equal(early.train()(x), model(x))
    assert not torch.equal(early.eval()(x), model(x))


@pytest.mark.parametrize(("make", "x"), [(Own, X), CASES[1][1:]], ids=["own", "chain"])
@torch.no_grad()
def test_of_depths_in_one_another_the_innermost_counts(make: Callable[[], Any], x: Tensor) -> None:
    model = make().to(x.dtype).eval()
    expected = [crop(model, n)(x) for n in range(1, 5)]
    with at_depth(model, 2):
        for n in (4, np.int64(1), torch.tensor(3)):
            with at_depth(model, n):
                assert torch.equal(model(x), expected[n - 1])
            assert torch.equal(model(x), expected[1])


@pytest.mark.slow
@pytest.mark.parametrize("before", [False, True])
@torch.no_grad()
def test_a_compiled_model_stops_too(before: bool) -> None:
    """Whether it was called before or not; nothing that was compiled inside stays."""
    model = Own().eval()
    compiled = torch.compile(model, backend="eager")
    if before:
        compiled(X)
    for n in (1, 3):
        with at_depth(compiled, n):
            assert torch.equal(compiled(X), crop(model, n)(X))
    assert torch.equal(compiled(X), model(X))


@torch.no_grad()
def test_threads_stop_one_model_at_several_depths() -> None:
    """Also while it is read, or copied, for one of them."""
    model = Own().eval()
    expected = [crop(model, n)(X) for n in (1, 2, 3, 4)]

    def serve(n: int) -> None:
        for _ in range(30):
            with at_depth(model, n + 1):
                assert torch.equal(model(X), expected[n])
            assert torch.equal(crop(model, n + 1)(X), expected[n])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(serve, range(4)))


def test_a_copy_is_made_after_the_pass_of_another_thread() -> None:
    """What stands in the blocks meanwhile is not copied."""
    model, inside, go = Own().eval(), threading.Event(), threading.Event()
    structure, copied = anatomy(model), []

    class Mark:
        def __deepcopy__(self, _: object) -> "Mark":
            copied.append(go.is_set())
            return self

    def stopped() -> Tensor:
        with at_depth(structure, 2):
            answer: Tensor = model(X)
            return answer

    model.mark = Mark()  # type: ignore[assignment]
    model.stem.register_forward_pre_hook(lambda *_: inside.set() or (go.wait(60) and None))
    with ThreadPoolExecutor(2) as pool:
        answer = pool.submit(stopped)
        assert inside.wait(60)
        smaller = pool.submit(structure.without, {2, 3, 4})
        time.sleep(0.3)
        go.set()
        assert torch.equal(smaller.result()(X), answer.result())
    assert copied == [True]


@torch.no_grad()
def test_threads_take_turns() -> None:
    model = chain().eval()
    early = EarlyExit(model, {1: 0.25, 3: 0.3}).eval()
    xs = [torch.randn(32, 5, dtype=torch.float64) for _ in range(8)]
    expected = [early(x) for x in xs]

    def serve(i: int) -> None:
        for _ in range(20):
            assert torch.equal(copy.copy(early)(xs[i]), expected[i])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(serve, range(8)))


def naive_thresholds(
    sure: Tensor, same: Tensor, exits: list[int], level: float
) -> dict[int, float]:
    gone, spent, found = set(), 0, {}
    for i, n in enumerate(exits, 1):
        allowed = int(level * len(sure) * i / len(exits) + 1e-9) - spent
        best = None
        for t in sorted({float(s) for s in sure[:, n]}, reverse=True):
            leave = [j for j in range(len(sure)) if j not in gone and sure[j, n] >= t]
            wrong = sum(not same[j, n] for j in leave)
            if leave and wrong <= allowed:
                best = t, leave, wrong
        if best is not None:
            found[n] = best[0]
            gone |= set(best[1])
            spent += best[2]
    return found


def simulated(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Confidences that tell, in ties, how likely an answer is the network's own."""
    draw = torch.Generator().manual_seed(seed)
    hard = torch.rand(count, 1, generator=draw, dtype=torch.float64)
    depth = torch.arange(5, dtype=torch.float64)
    sure = (1 - hard * 0.6 / (1 + depth)).mul(50).round().div(50)
    same = torch.rand(count, 5, generator=draw, dtype=torch.float64) < sure
    same[:, -1] = True
    return sure, same


@pytest.mark.parametrize("level", [0.0, 0.02, 0.1, 0.5])
def test_thresholds_are_the_lowest_that_spend_no_more(level: float) -> None:
    for seed in range(5):
        sure, same = simulated(80, seed)
        for exits in ([0], [1, 3], [0, 1, 2, 3]):
            got = Answers(sure, same, range(5)).thresholds(exits, level)
            assert got == naive_thresholds(sure, same, exits, level)


def test_the_binomial_tail_is_scipys() -> None:
    for k, n, p in [(0, 10, 0.01), (3, 500, 0.01), (40, 4000, 0.013), (10, 10, 0.3)]:
        assert binomial_tail(k, n, p) == pytest.approx(binom.cdf(k, n, p), rel=1e-9)


class Told(nn.Module):
    """A network whose confidences and answers are in its inputs: one number a layer and class."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleList(Part(n) for n in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for block in self.body:
            h = block(h)
        return h.reshape(len(h), 5, 3)[:, 0]


class Part(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.n, self.scale = n, nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), 5, 3).roll(-1, 1).flatten(1) * self.scale


def told_samples(count: int, seed: int) -> Tensor:
    sure, same = simulated(count, seed)
    z = torch.zeros(count, 5, 3, dtype=torch.float64)
    top = (sure.clamp(max=0.999) * 2 / (1 - sure.clamp(max=0.999))).log()
    return z.scatter(2, (~same).long()[..., None], top[..., None]).flatten(1)


@pytest.mark.slow
def test_the_risk_is_kept_on_other_samples() -> None:
    """Of 100 draws at most 5 may exceed it in the mean; 11 of 100 has probability 0.01 at 5 %."""
    risk, later = 0.05, told_samples(20000, 10**6)
    structure = anatomy(Told(), example=later[:2])
    z = structure.logits(structure.states(later)[0], x=later)
    same = (z.argmax(-1) == z[-1].argmax(-1)).T
    answers = Answers(z.softmax(-1).amax(-1).T, same, range(5))
    over, used = 0, 0
    for seed in range(100):
        x = told_samples(600, seed)
        choice = exit_depths(structure, [(x, torch.zeros(600))], risk=risk, confidence=0.95)
        used += bool(choice.thresholds)
        over += answers.wrong(dict(choice.thresholds)) > risk * answers.count
    assert over <= 11
    assert used >= 50


def test_too_few_samples_show_no_risk() -> None:
    x = told_samples(100, 0)
    choice = exit_depths(anatomy(Told(), example=x[:2]), [(x, torch.zeros(100))], risk=0.01)
    assert (choice.thresholds, choice.mean_depth, choice.needed) == ((), 4, 598)
    assert "at least 598 samples are needed, 100 were given" in str(choice)
    assert ExitChoice.from_json(choice.to_json()) == choice


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (
            lambda: EarlyExit(chain(), {6: 0.5}),
            "depth 6 given; expected a whole number from 0 to 5",
        ),
        (
            lambda: EarlyExit(chain(), {1: 1.5}),
            "threshold of depth 1 is 1.5; expected a confidence",
        ),
        (lambda: at_depth(chain(), 7).__enter__(), "depth 7 given; expected .* from 0 to 6"),
        (lambda: at_depth(chain(), True).__enter__(), "depth True given"),
        (lambda: crop(chain(), True), "depth True given"),
        (lambda: exit_depths(chain(), []), "the loader gave no sample"),
        (lambda: exit_depths(chain(), [], risk=0.0), "risk is 0.0; expected a fraction above 0"),
        (lambda: exit_depths(chain(), [], exits=[6]), "expected depths from 0 to 5"),
        (lambda: exit_depths(chain(), [], exits=[True]), "exits at .True. given"),
        (
            lambda: EarlyExit(text_model("LlamaForCausalLM"), {1: 0.5}).eval()(IDS),
            r"answers \[12, 7, 61\] to 12 samples; expected a row of logits",
        ),
        (
            lambda: EarlyExit(text_model("BertForSequenceClassification"), {1: 0.5}).eval()(
                IDS, labels=IDS[:, 0] % 4
            ),
            "labels given to EarlyExit",
        ),
    ],
)
def test_wrong_exits(wrong: Callable[[], object], says: str) -> None:
    with pytest.raises(InputError, match=says):
        wrong()


@pytest.mark.slow
def test_a_trained_network_leaves_early() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 16), *(Update() for _ in range(6)), nn.Linear(16, 2))
    x = torch.randn(1200, 2)
    y = (x[:, 0] + 0.5 * x[:, 1] > 0).long()
    objective = StageCost(model, SoftCrossEntropy(2), 0.3)
    optimiser = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(150):
        optimiser.zero_grad()
        objective(x[:600], y[:600])[0].backward()
        optimiser.step()
    choice = exit_depths(model, [(x[600:], y[600:])], risk=0.03, confidence=0.9)
    assert choice.mean_depth < 3
    early = EarlyExit(model, choice.thresholds).eval()
    same = early(x[600:]).argmax(-1) == model(x[600:]).argmax(-1)
    assert float((~same).double().mean()) <= 0.03
    profile = turnpike_profile(model, [(x[600:], y[600:])], SoftCrossEntropy(2))
    assert profile.accuracy[-1] > 0.9


class Update(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(torch.tanh(self.inner(x)))
