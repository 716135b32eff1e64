"""Profiles, verdicts and cuts by losses that know no classes, against loops over samples."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import t as student
from torch import Tensor, nn

from deeplimit import (
    InputError,
    SoftCrossEntropy,
    anatomy,
    at_depth,
    choose_cut,
    crop,
    every_depth,
    turnpike_profile,
    verify_crop,
)
from deeplimit.control import CropResult, CutChoice, TurnpikeProfile
from deeplimit.control.verdict import Z, judge_losses, quantile

pytestmark = pytest.mark.slow

LAYERS = 5


class Block(nn.Module):
    def __init__(self, size: float) -> None:
        super().__init__()
        self.linear, self.size = nn.Linear(6, 6), size

    def forward(self, x: Tensor) -> Tensor:
        return x + self.size * torch.tanh(self.linear(x))


def network(sizes: tuple[float, ...] = (0.5, 0.3, 0.02, 0.001, 0.0)) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), *map(Block, sizes), nn.Linear(6, 3)).double().eval()


def data(count: int = 90, noise: float = 0.05) -> tuple[nn.Sequential, Tensor, Tensor]:
    model, rng = network(), torch.Generator().manual_seed(1)
    x = torch.randn(count, 4, generator=rng, dtype=torch.float64)
    with torch.no_grad():
        y = model(x) + noise * torch.randn(count, 3, generator=rng, dtype=torch.float64)
    return model, x, y


def batches(x: Tensor, y: Tensor, size: int = 32) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(size), y.split(size), strict=True))


@torch.no_grad()
def layer_outputs(model: nn.Sequential, x: Tensor) -> list[Tensor]:
    stem, *blocks, head = model
    states = [stem(x)]
    for block in blocks:
        states.append(block(states[-1]))
    return [head(s) for s in states]


def rows(model: nn.Sequential, x: Tensor, y: Tensor, loss) -> np.ndarray:
    """[N + 1, samples], sample by sample."""
    outputs = layer_outputs(model, x)
    return np.array([[float(loss(z[i], y[i])) for i in range(len(x))] for z in outputs])


def squared(z: Tensor, y: Tensor) -> Tensor:
    return ((z - y) ** 2).mean()


def asked(z: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(z, y)


CASES = {
    "module": (nn.MSELoss(), squared),
    "function of means": (F.mse_loss, squared),
    "values of samples": (lambda z, y: (z - y).square().mean(1), squared),
    "values of numbers": (lambda z, y: (z - y).square(), squared),
    "absolute": (nn.L1Loss(), lambda z, y: (z - y).abs().mean()),
    "several labels": (nn.BCEWithLogitsLoss(), asked),
}


@pytest.mark.parametrize("name", CASES)
def test_a_profile_is_the_naive_one(name: str) -> None:
    loss, naive = CASES[name]
    model, x, y = data()
    if name == "several labels":
        y = (y > 0.1).double()
    table = rows(model, x, y, naive)
    made = turnpike_profile(model, batches(x, y), loss)
    assert (made.samples, made.classes, made.horizon) == (90, 0, LAYERS)
    assert (made.accuracy, made.distance, made.accuracy_error) == ((), (), ())
    assert made.loss == pytest.approx(table.mean(1), rel=1e-12)
    gaps = table - table[-1]
    assert made.loss_error == pytest.approx(gaps.std(1) / math.sqrt(90), rel=1e-9, abs=1e-12)
    mean = y.double().mean(0)
    answer = {"absolute": y.median(0).values, "several labels": mean.logit()}.get(name, mean)
    constant = float(np.mean([float(naive(answer, own)) for own in y]))
    assert made.constant == pytest.approx(constant, rel=1e-9)
    assert made.loss_range == pytest.approx(max(constant - table[-1].mean(), 0), rel=1e-9)
    for rise in (None, 0.0, 1e-4, 0.05, 10.0):
        limit = 0.01 * made.loss_range if rise is None else rise
        good = [
            n for n in range(LAYERS) if gaps[n].mean() + Z * gaps[n].std() / math.sqrt(90) <= limit
        ]
        assert made.depth_within(rise=rise) == min(good, default=LAYERS)
    assert (made.entry(), made.exit(), made.outside()) == (None, None, 0)
    assert TurnpikeProfile.from_json(made.to_json()) == made
    assert "accuracy" not in str(made)
    assert len(str(made).splitlines()) == LAYERS + 3


@pytest.mark.parametrize(
    ("depth", "tolerance", "word"),
    [
        (4, None, "kept"),
        (4, 0.0, "unresolved"),
        (1, 1e-4, "lost"),
        (2, 1.0, "kept"),
        (1, None, "lost"),
    ],
)
def test_the_verdict_is_of_the_rise_of_the_loss(
    depth: int, tolerance: float | None, word: str
) -> None:
    model, x, y = data(400)
    report = verify_crop(
        model, crop(model, depth), batches(x, y), nn.MSELoss(), tolerance=tolerance
    )
    table = rows(model, x, y, squared)
    rise = table[depth] - table[-1]
    error = rise.std(ddof=1) / math.sqrt(400)
    assert (report.loss_before, report.loss_after) == pytest.approx(
        (table[-1].mean(), table[depth].mean()), rel=1e-12
    )
    assert report.loss_error == pytest.approx(rise.std() / math.sqrt(400), rel=1e-9)
    for invented in (report.accuracy_before, report.accuracy_after, report.agreement):
        assert math.isnan(invented)
    verdict = report.verdict
    assert (verdict.word, verdict.samples) == (word, 400)
    if depth < 4:
        spread = student.ppf(0.95, 399) * error
        bounds = (rise.mean() - spread, rise.mean() + spread)
        assert (verdict.at_least, verdict.at_most) == pytest.approx(bounds, rel=1e-6)
    else:  # the last layer does nothing: no sample differs, and that is no certainty
        span = float((y - y.mean(0)).square().mean()) - table[-1].mean()
        assert verdict.at_most == pytest.approx(Z**2 / (400 + Z**2) * span, rel=1e-9)
    assert (verdict.lost, verdict.gained) == (int((rise > 0).sum()), int((rise < 0).sum()))
    assert str(verdict).lower().startswith(word)
    assert "accuracy" not in str(report)
    assert CropResult.from_json(report.to_json()) == report
    assert report._repr_html_().startswith("<pre>")


def test_students_quantile() -> None:
    for n in (11, 20, 100, 10_000):
        exact = student.ppf(0.95, n - 1) * math.sqrt(n / (n - 1))
        assert quantile(n) == pytest.approx(exact, rel=1e-3)


def test_so_many_samples_would_resolve_a_rise() -> None:
    rng = torch.Generator().manual_seed(0)
    before = torch.rand(50, generator=rng, dtype=torch.float64)
    after = before + 0.01 + 0.1 * torch.randn(50, generator=rng, dtype=torch.float64)
    verdict = judge_losses(before, after, tolerance=0.03)
    assert verdict.word == "unresolved"
    more = math.ceil(verdict.needed / 50)
    assert (
        judge_losses(before.repeat(more), after.repeat(more), tolerance=0.03).word != "unresolved"
    )
    alike = judge_losses(before, before, tolerance=0.01)
    assert (alike.word, alike.at_most > 0) == ("unresolved", True)
    enough = math.ceil(alike.needed / 50)
    assert judge_losses(before.repeat(enough), before.repeat(enough), tolerance=0.01).word == "kept"
    few = judge_losses(before[:5], before[:5], tolerance=10.0)
    assert few.word == "unresolved"


def test_nothing_learnt_is_said_where_a_constant_answer_is_known() -> None:
    model, x, y = data(200)
    y = y[torch.randperm(200, generator=torch.Generator().manual_seed(2))]
    smaller = crop(model, 3)
    verdict = verify_crop(model, smaller, batches(x, y), nn.MSELoss()).verdict
    assert verdict.word == "nothing learnt"
    assert verdict.constant == pytest.approx(float((y - y.mean(0)).square().mean()), rel=1e-9)
    assert "a constant answer" in str(verdict)

    def of_batch(z: Tensor, batch: tuple[Tensor]) -> Tensor:
        return (z - batch[0]).square().mean(1)

    wrapped = [(a, (b,)) for a, b in batches(x, y)]
    verdict = verify_crop(model, smaller, wrapped, of_batch).verdict
    assert verdict.word != "nothing learnt"
    assert verdict.constant is None
    assert verdict.tolerance == pytest.approx(0.01 * verdict.loss, rel=1e-12)


@pytest.mark.parametrize("rise", [0.0005, 0.02, 0.2])
def test_a_cut_is_chosen_by_the_rise_of_the_loss(rise: float) -> None:
    model, x, y = data(240)
    loader = batches(x, y, 60)
    made = turnpike_profile(model, loader, nn.MSELoss())
    chosen = choose_cut(model, made, loader, loss=nn.MSELoss(), rise=rise)
    judging = batches(x[60:], y[60:], 60)

    @torch.no_grad()
    def risen(removed: tuple[int, ...]) -> np.ndarray:
        smaller = crop(model, remove=removed)
        parts = [((smaller(a) - b) ** 2 - (model(a) - b) ** 2).mean(1).numpy() for a, b in judging]
        return np.concatenate(parts)

    change = risen(chosen.removed)
    assert (chosen.samples, chosen.budget, chosen.limit) == (180, "rise", rise)
    assert (chosen.accuracy_before, chosen.accuracy_after) == (None, None)
    assert chosen.loss_after - chosen.loss_before == pytest.approx(change.mean(), abs=1e-12)
    assert chosen.loss_error == pytest.approx(change.std() / math.sqrt(180), abs=1e-12)
    assert change.mean() + Z * change.std() / math.sqrt(180) <= rise
    assert len(chosen.removed) >= {0.0005: 2, 0.02: 2, 0.2: 3}[rise]
    assert "% of" not in str(chosen)
    assert CutChoice.from_json(chosen.to_json()) == chosen
    kept = choose_cut(model, made, loader, loss=nn.MSELoss(), blocks=3)
    assert kept.removed == choose_cut(model, made, blocks=3).removed == (3, 4)


def small_bert(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=24,
    )
    return getattr(transformers, kind)(config).double().eval()


def texts(count: int = 24, length: int = 7) -> dict[str, Tensor]:
    ids = torch.randint(5, 50, (count, length), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[::3, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def split(batch: dict[str, Tensor], size: int = 10) -> list[dict[str, Tensor]]:
    parts = zip(*(v.split(size) for v in batch.values()), strict=True)
    return [dict(zip(batch, part, strict=True)) for part in parts]


def test_questions_are_answered_by_two_logits_a_token() -> None:
    model, batch = small_bert("BertForQuestionAnswering"), texts()
    batch["start_positions"] = batch["input_ids"].sum(1) % 5
    batch["end_positions"] = (batch["start_positions"] + 1) % 5

    def loss(z: Tensor, whole: dict[str, Tensor]) -> Tensor:
        start, end = z.unbind(-1)
        ends = (start, whole["start_positions"]), (end, whole["end_positions"])
        return sum(F.cross_entropy(a, b, reduction="none") for a, b in ends) / 2

    def mean(z: Tensor, whole: dict[str, Tensor]) -> Tensor:
        return loss(z, whole).mean()

    made = turnpike_profile(model, split(batch), loss)
    assert turnpike_profile(model, split(batch), mean).loss == pytest.approx(made.loss, rel=1e-12)
    for depth in (1, 3, 4):  # the loss of transformers' own class
        with torch.no_grad():
            own = float(crop(model, depth)(**batch).loss)
        assert made.loss[depth] == pytest.approx(own, rel=1e-12)
    report = verify_crop(model, crop(model, 2), split(batch), loss, tolerance=5.0)
    assert report.loss_after == pytest.approx(made.loss[2], rel=1e-12)
    assert (report.samples, report.verdict.word) == (24, "kept")
    chosen = choose_cut(model, made, split(batch, 8), loss=loss, rise=5.0)
    assert crop(model, chosen).config.num_hidden_layers == sum(chosen.layers_after) < 4


def test_embeddings_are_judged_by_their_cosine() -> None:
    """What a SentenceTransformer holds: states, whose mean over a text is its embedding."""
    model, batch = small_bert("BertModel"), texts()
    batch["labels"] = F.normalize(torch.randn(24, 16, dtype=torch.float64), dim=1)

    def pooled(z: Tensor, whole: dict[str, Tensor]) -> Tensor:
        mask = whole["attention_mask"][..., None]
        return (z * mask).sum(1) / mask.sum(1)

    def cosine(z: Tensor, whole: dict[str, Tensor]) -> Tensor:
        return 1 - F.cosine_similarity(pooled(z, whole), whole["labels"])

    made = turnpike_profile(model, split(batch), cosine)
    by_hand = []
    for depth in range(5):
        with torch.no_grad():
            states = model(**{k: batch[k] for k in ("input_ids", "attention_mask")},
                           output_hidden_states=True).hidden_states  # fmt: skip
        by_hand.append(float(cosine(states[depth], batch).mean()))
    assert made.loss == pytest.approx(by_hand, rel=1e-12)
    assert made.constant is None

    def contrastive(z: Tensor, whole: dict[str, Tensor], reduction: str = "mean") -> Tensor:
        alike = F.normalize(pooled(z, whole), dim=1) @ whole["labels"].T
        return F.cross_entropy(alike / 0.1, torch.arange(len(z)), reduction=reduction)

    def of_samples(z: Tensor, whole: dict[str, Tensor]) -> Tensor:
        return contrastive(z, whole, "none")

    with pytest.raises(InputError, match=r"no mean of its samples'.*reduction='none'"):
        turnpike_profile(model, split(batch), contrastive)
    report = verify_crop(model, crop(model, 3), split(batch), of_samples)
    assert report.loss_before == pytest.approx(
        sum(float(of_samples(model(**{k: v for k, v in part.items() if k != "labels"})[0], part)
                  .sum().detach()) for part in split(batch)) / 24,
        rel=1e-12,
    )  # fmt: skip


def test_a_plain_cross_entropy_knows_classes_but_no_minimisers() -> None:
    model, x, y = data()
    y = y.argmax(1)
    made = turnpike_profile(model, batches(x, y), nn.CrossEntropyLoss())
    soft = turnpike_profile(model, batches(x, y), SoftCrossEntropy(3, 0.05))
    assert (made.accuracy, made.accuracy_error) == (soft.accuracy, soft.accuracy_error)
    assert (made.classes, made.softness, made.distance) == (3, 0.0, ())
    assert made.loss_range == math.log(3)
    assert made.loss[-1] == pytest.approx(float(F.cross_entropy(model(x), y).detach()), rel=1e-12)
    smoothing = 0.05 * 3 / 2
    smooth = turnpike_profile(model, batches(x, y), nn.CrossEntropyLoss(label_smoothing=smoothing))
    assert smooth.loss == pytest.approx(soft.loss, rel=1e-12)
    assert smooth.loss_range == pytest.approx(soft.loss_range, rel=1e-12)
    chosen = choose_cut(model, made, batches(x, y), accuracy=0.1)
    again = choose_cut(model, made, batches(x, y), loss=nn.CrossEntropyLoss(), accuracy=0.1)
    assert chosen == again
    assert chosen.accuracy_after is not None
    seen = y != 1
    ignoring = nn.CrossEntropyLoss(ignore_index=1)
    some = verify_crop(model, crop(model, 3), batches(x, y), ignoring)
    alone = verify_crop(model, crop(model, 3), [(x[seen], y[seen])], nn.CrossEntropyLoss())
    assert some.samples == alone.samples == int(seen.sum())
    assert some.loss_after == pytest.approx(alone.loss_after, rel=1e-12)
    assert some.accuracy_after == alone.accuracy_after


def test_labels_may_stand_in_a_mapping() -> None:
    model, batch = small_bert("BertForSequenceClassification"), texts()
    batch["labels"] = batch["input_ids"][:, 0] % 2
    pairs = [({k: v for k, v in b.items() if k != "labels"}, b["labels"]) for b in split(batch)]
    loss = SoftCrossEntropy(2)
    assert turnpike_profile(model, split(batch), loss) == turnpike_profile(model, pairs, loss)


@torch.no_grad()
def test_a_decoder_is_given_its_labels_as_inputs_one_place_further_on() -> None:
    """As transformers does where a batch holds no others; labels may be the encoder's inputs."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, pad_token_id=0
    )
    config.decoder_start_token_id = 0
    model = transformers.T5ForConditionalGeneration(config).double().eval()
    ids = torch.arange(3, 39).view(4, 9)
    for labels in (ids, ids.flip(1).masked_fill(ids % 4 == 0, -100)):
        batch = {"input_ids": ids, "attention_mask": (ids > 5).long(), "labels": labels}
        structure = anatomy(model, blocks="decoder.block")
        made = turnpike_profile(structure, [batch], nn.CrossEntropyLoss())
        assert made.loss[-1] == pytest.approx(float(model(**batch).loss), rel=1e-12)


def test_inputs_may_be_several() -> None:
    class Two(nn.Sequential):
        def forward(self, x: Tensor, more: Tensor) -> Tensor:
            return super().forward(x + more)

    model, x, y = data()
    two = Two(*model)
    structure = anatomy(two, example=(x[:2], x[:2]))
    loader = [((a / 2, a / 2), b) for a, b in batches(x, y)]
    made = turnpike_profile(structure, loader, nn.MSELoss())
    expected = turnpike_profile(model, batches(x, y), nn.MSELoss())
    assert made.loss == pytest.approx(expected.loss, rel=1e-12)
    wrong = [((a, a.clone()), b) for a, b in batches(x, y)]
    wrong[1][0][1][3, 2] = torch.nan
    with pytest.raises(InputError, match=r"x\[1\]\[3, 2\] is nan, and so are 0 more"):
        turnpike_profile(structure, wrong, nn.MSELoss())


@torch.no_grad()
def test_a_graph_is_measured_as_a_whole() -> None:
    """Its nodes are the samples; on a part of them, with all edges, the model does not run."""

    class Gathering(Block):
        def forward(self, x: Tensor, edges: Tensor) -> Tensor:
            return super().forward(x + torch.zeros_like(x).index_add(0, edges[1], x[edges[0]]))

    class Graphs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
            self.body = nn.ModuleList(Gathering(0.1) for _ in range(3))

        def forward(self, x: Tensor, edges: Tensor) -> Tensor:
            h = self.stem(x)
            for block in self.body:
                h = block(h, edges)
            return self.head(h)

    torch.manual_seed(0)
    model, count = Graphs().double().eval(), 12
    x, edges = torch.randn(count, 4).double(), torch.randint(count, (2, 30))
    y = torch.randint(3, (count,))
    structure, loader = anatomy(model, example=(x, edges)), [[[x, edges], y]]
    depths = every_depth(structure, loader, nn.CrossEntropyLoss())
    for n in range(4):
        with at_depth(model, n):
            z = model(x, edges)
        assert depths.loss[n] == pytest.approx(float(F.cross_entropy(z, y)), rel=1e-12)
    assert depths.costs.multiply_adds == tuple(4 * 6 + 6 * 3 + n * 6 * 6 for n in range(4))
    choice = choose_cut(structure, depths, loader, blocks=2)
    report = verify_crop(structure, crop(structure, choice), loader)
    expected = float(F.cross_entropy(crop(structure, choice)(x, edges), y))
    assert report.loss_after == pytest.approx(expected, rel=1e-12)


def test_what_is_no_loss_of_samples_is_refused_in_one_line() -> None:
    model, x, y = data()
    loader = batches(x, y)
    made = turnpike_profile(model, loader, nn.MSELoss())

    def refused(message: str, call) -> None:
        with pytest.raises(InputError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)

    refused(
        "no mean of its samples'",
        lambda: turnpike_profile(model, loader, nn.MSELoss(reduction="sum")),
    )
    refused("no mean of its", lambda: turnpike_profile(model, loader, lambda z, y: (z - y).std()))
    refused(
        "the loss returned 3; expected a tensor",
        lambda: turnpike_profile(model, loader, lambda z, y: 3),
    )
    refused(
        "given as the loss; expected SoftCross", lambda: turnpike_profile(model, loader, nn.MSELoss)
    )
    refused("the loader gave no sample", lambda: turnpike_profile(model, [], nn.MSELoss()))
    refused(
        r"gives a tensor of shape \[90, 4\]; expected batches",
        lambda: turnpike_profile(model, [x], nn.MSELoss()),
    )
    refused(
        "shift=True given with a loss",
        lambda: verify_crop(model, model, loader, nn.MSELoss(), shift=True),
    )
    refused(
        "knows no classes, and which it is it does not tell; give it: loss=",
        lambda: choose_cut(model, made, loader, blocks=2),
    )
    refused("give rise=", lambda: choose_cut(model, made, loader, loss=nn.MSELoss(), accuracy=0.01))
    refused(
        "the rise of the loss that is allowed is -1",
        lambda: choose_cut(model, made, loader, loss=nn.MSELoss(), rise=-1.0),
    )
    refused(
        "the rise of the loss that is allowed is nan",
        lambda: verify_crop(model, model, loader, nn.MSELoss(), tolerance=math.nan),
    )
    refused("budget rise is measured on data", lambda: choose_cut(model, made, rise=0.1))
    flat = [(a, b[:, 0]) for a, b in loader]
    single = nn.Sequential(*model[:-1], nn.Linear(6, 1)).double()
    refused(
        r"returned shape \[32, 32\] for outputs of shape \[32, 1\]: it broadcast",
        lambda: turnpike_profile(single, flat, nn.MSELoss()),
    )
    refused(
        r"the loss fails on outputs of shape \[32, 3\]: ",
        lambda: turnpike_profile(model, flat, nn.MSELoss()),
    )
    shuffled = [loader, list(reversed(loader))]

    class Shuffled(list):
        def __iter__(self):
            shuffled.reverse()
            return iter(shuffled[0])

    refused(
        "another order every time",
        lambda: choose_cut(model, made, Shuffled(loader), loss=nn.MSELoss(), rise=0.1),
    )


def test_tables_are_at_most_a_screen() -> None:
    model = network((0.1,) * 60)
    x = torch.randn(40, 4, dtype=torch.float64)
    made = turnpike_profile(model, [(x, torch.zeros(40, 3, dtype=torch.float64))], nn.MSELoss())
    lines = str(made).splitlines()
    assert len(lines) == 22
    layers = [int(line.split()[0]) for line in lines[2:]]
    assert (layers[0], layers[-1]) == (0, 60)
    assert all(a < b for a, b in pairwise(layers))


@pytest.mark.parametrize("form", ["time first", "two rows a sample", "of another text"])
@torch.no_grad()
def test_updates_are_of_samples_wherever_the_states_have_them(form: str) -> None:
    """Of states [L, B, d], [2 B, L, d], and of a text that the targets are not of."""

    class Texts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
            self.body = nn.ModuleList(map(Block, (0.5, 0.3)))

        def forward(self, x: Tensor) -> Tensor:  # [B, L, 4]
            h = self.stem(x)
            h = h.transpose(0, 1) if form == "time first" else h
            h = h.reshape(-1, 3, 6) if form == "two rows a sample" else h
            for block in self.body:
                h = block(h)
            if form == "time first":
                return self.head(h.mean(0))
            if form == "two rows a sample":
                return self.head(h.view(-1, 6, 6).mean(1))
            return self.head(h[:, :4] + h.mean(1, keepdim=True))

    torch.manual_seed(0)
    model, x = Texts().double().eval(), torch.randn(5, 6, 4).double()
    y = torch.arange(20).view(5, 4) % 3 if form == "of another text" else torch.arange(5) % 3
    y[2] = -100
    made = turnpike_profile(anatomy(model, example=x), [(x, y)], nn.CrossEntropyLoss())
    h = model.stem(x)
    for n, block in enumerate(model.body):
        before, h = h, block(h)
        moved = (h - before).flatten(1).norm(dim=1) / before.flatten(1).norm(dim=1)
        expected = float(moved[[0, 1, 3, 4]].mean())
        assert made.relative_update[n] == pytest.approx(expected, rel=1e-12)
