"""Every depth in one table: against models that are really cut, evaluated by hand, in float64."""

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from model_families import FAMILIES, sample
from text_families import DEPTH, next_words, padded, text_model
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from vision_families import FAMILIES as VISION
from vision_families import FIXED, vision

from deeplimit import (
    InputError,
    ResidualChain,
    anatomy,
    at_depth,
    crop,
    every_depth,
    turnpike_profile,
)
from deeplimit.control import DepthTable, SoftCrossEntropy
from deeplimit.errors import several
from deeplimit.tables import shown_depths

TEXTS = {"input_ids": padded(6)["input_ids"], "attention_mask": padded(6)["attention_mask"]}
CLASSIFIERS = ("BertForSequenceClassification", "AlbertForSequenceClassification")
WRITERS = ("GPT2LMHeadModel", "LlamaForCausalLM", "Olmo2ForCausalLM")


def products_of(model: nn.Module, x: Any) -> int:
    written_out = sdpa_kernel(SDPBackend.MATH)
    with torch.no_grad(), written_out, FlopCounterMode(display=False) as counter:
        model(**x) if isinstance(x, dict) else model(x)
    return counter.get_total_flops() // 2


def parameters_of(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def logits_of(model: nn.Module, x: Any) -> Tensor:
    z = model(**x) if isinstance(x, dict) else model(x)
    return z if isinstance(z, Tensor) else z.logits


def first(x: Any) -> Any:
    return {k: v[:1] for k, v in x.items()} if isinstance(x, dict) else x[:1]


def checked_crops(table: DepthTable, model: nn.Module, x: Any) -> dict[int, nn.Module]:
    """The crop to each depth that has one, whose parameters and multiply-adds are the table's."""
    assert table.costs is not None
    crops = {}
    for k in range(table.horizon + 1):
        try:
            smaller = crop(model, k)
        except InputError:
            assert k < table.costs.least
            continue
        assert k >= table.costs.least
        assert table.costs.parameters[k] == parameters_of(smaller), k
        assert table.costs.multiply_adds[k] == products_of(smaller, first(x)), k
        crops[k] = smaller
    return crops


@pytest.mark.parametrize("name", FAMILIES)
def test_a_depth_is_what_the_crop_is(name: str) -> None:
    family = sample(name)
    model, x, y = family.model.eval(), family.x, family.y
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    table = every_depth(model, batches, nn.CrossEntropyLoss())
    assert table.horizon == family.depth
    crops = checked_crops(table, model, x)
    structure = anatomy(model)
    own = F.cross_entropy(model(x), y, reduction="none")
    for k in range(table.horizon + 1):
        with torch.no_grad():
            if k in crops:
                z = crops[k](x)
            else:
                z = structure.logits([structure.states(x)[0][k]], k, x=x)[0]
            losses = F.cross_entropy(z, y, reduction="none")
        assert table.loss[k] == pytest.approx(float(losses.mean()), rel=1e-9)
        assert table.accuracy[k] == float((z.argmax(1) == y).double().mean())
        error = float((losses - own).detach().std(correction=0)) / math.sqrt(len(y))
        assert table.loss_error[k] == pytest.approx(error, rel=1e-6, abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_of_texts(name: str) -> None:
    model, y = text_model(name), torch.arange(6) % 4
    table = every_depth(model, [(TEXTS, y)], SoftCrossEntropy(4))
    crops = checked_crops(table, model, TEXTS)
    for k in range(1, DEPTH + 1):
        with torch.no_grad():
            z = logits_of(crops[k], TEXTS)
        assert table.loss[k] == pytest.approx(float(SoftCrossEntropy(4)(z, y).mean()), rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITERS)
def test_of_models_that_write(name: str) -> None:
    model, y = text_model(name), next_words(TEXTS)
    table = every_depth(model, [(TEXTS, y)], nn.CrossEntropyLoss())
    crops = checked_crops(table, model, TEXTS)
    assert table.samples == int((y != -100).sum())
    for k in range(1, DEPTH + 1):
        with torch.no_grad():
            z = logits_of(crops[k], TEXTS)
        expected = F.cross_entropy(z.flatten(0, 1), y.flatten())
        assert table.loss[k] == pytest.approx(float(expected), rel=1e-9)


BATCHES = [(torch.randn(40, 5), torch.arange(40) % 5)]


def plain(depth: int) -> nn.Module:
    torch.manual_seed(0)
    blocks = (nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(depth))
    return ResidualChain(blocks, step=1 / depth).eval()


class Sleeping(nn.Module):
    """Takes its time."""

    def __init__(self, milliseconds: float) -> None:
        super().__init__()
        self.linear, self.milliseconds = nn.Linear(5, 5), milliseconds

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.milliseconds / 1000)
        return x + self.linear(x)


def table_of(model: nn.Module, **more: Any) -> DepthTable:
    return every_depth(model.eval(), BATCHES, SoftCrossEntropy(5), **more)


@pytest.mark.slow
@pytest.mark.usefixtures("long_latencies")
def test_the_latency_of_a_depth_is_that_of_what_runs() -> None:
    """Blocks that take 5, 20, 5 and 40 ms, between a stem of 5 ms and a head."""
    stem, times = Sleeping(5), (5, 20, 5, 40)
    blocks = nn.Sequential(*map(Sleeping, times))
    model = nn.Sequential(nn.Sequential(stem, nn.Linear(5, 5)), blocks, nn.Linear(5, 5))
    structure = anatomy(model, example=torch.randn(2, 5), blocks="1")
    costs = table_of(structure.model).costs
    assert costs is not None
    for k, seconds in enumerate(costs.latency):
        expected = (5 + sum(times[:k])) / 1000
        assert 0.95 * expected - 5e-4 <= seconds <= 1.6 * expected + 0.01


def test_samples_are_gone_through_once_and_other_data_recommend() -> None:
    model = plain(4)
    given = [(torch.randn(30, 5), torch.arange(30) % 5) for _ in range(3)]
    gone: list[int] = []

    def once() -> Iterator[Any]:
        for i, batch in enumerate(given):
            gone.append(i)
            yield batch

    loss = SoftCrossEntropy(5)
    own = turnpike_profile(model, given, loss)
    table = every_depth(model, once(), loss)
    assert gone == [0, 1, 2]
    assert {k: v for k, v in vars(table).items() if k in vars(own)} == vars(own)
    assert table.recommended_depth == own.recommended_depth
    assert replace(table, recommended=3).recommended_depth == 3
    marked = every_depth(model, given, loss, recommended=2)
    assert marked.recommended_depth == 2
    assert "\n2 recommended " in str(marked)


def test_a_loss_that_knows_no_classes_has_no_accuracies() -> None:
    model, x = plain(3).eval(), torch.randn(24, 5)
    table = every_depth(model, [(x, x)], nn.MSELoss())
    assert table.accuracy == ()
    for k in range(4):
        with torch.no_grad():
            expected = float(F.mse_loss(crop(model, k)(x), x)) if k else None
        if expected is not None:
            assert table.loss[k] == pytest.approx(expected, rel=1e-5)
    headings, rows = table.cells()
    expected = ["depth", "loss", "±", "parameters", "multiply-adds", "latency, ms"]
    assert (headings, len(rows)) == (expected, 4)
    assert "accuracy" not in str(table)


@pytest.mark.parametrize("depth", [5, 19, 20, 40, 56])
def test_at_most_a_screen_is_shown(depth: int) -> None:
    table = replace(table_of(plain(depth)), recommended=max(depth - 3, 1))
    lines = str(table).splitlines()
    assert len(lines) <= 24
    shown = [int(line.split()[0]) for line in lines[2:-2]]
    every = {2**i for i in range(6) if 2**i <= depth} | {round(depth * i / 4) for i in range(5)}
    every |= {table.recommended_depth}
    assert set(shown) >= every | {0, depth}
    assert shown == (list(range(depth + 1)) if depth < 20 else sorted(every))
    assert shown == shown_depths(depth, table.recommended_depth)
    assert f"crop(model, {table.recommended_depth})" in lines[-1]


def test_it_is_stored_whole_and_drawn() -> None:
    table = table_of(plain(4), recommended=1)
    assert DepthTable.from_json(table.to_json()) == table
    old = DepthTable.from_json(turnpike_profile(plain(4), BATCHES, SoftCrossEntropy(5)).to_json())
    assert (old.costs, old.recommended) == (None, None)
    assert old.cells()[0] == ["depth", "accuracy", "±", "loss", "±"]
    assert "<pre>40 samples" in table._repr_html_()
    (trace,) = table.plot().data
    assert table.costs is not None
    assert trace.x == table.costs.multiply_adds
    assert trace.y == tuple(100 * a for a in table.accuracy)
    assert trace.error_y.array == tuple(100 * e for e in table.accuracy_error)


@pytest.mark.slow
@pytest.mark.parametrize("name", VISION)
def test_depths_that_no_cut_reaches_are_told(name: str) -> None:
    """Of a model whose stages begin with a layer that has to stay: there it is stopped."""
    family = vision(name)
    model, x = family.model.eval(), family.x
    y = family.y
    table = every_depth(model, [(x, y)], nn.CrossEntropyLoss())
    checked_crops(table, model, x)
    assert table.costs is not None
    least = table.costs.least
    assert least == max(FIXED.get(name, (0,))) + 1
    for k in range(table.horizon + 1):
        with torch.no_grad(), at_depth(model, k):
            expected = float(F.cross_entropy(logits_of(model, x), y))
            assert table.costs.multiply_adds[k] == products_of(model, first(x))
        assert table.loss[k] == pytest.approx(expected, rel=1e-9)
    named = table.marks(cut=least)
    assert {n for n, mark in named.items() if mark == "no cut"} == set(range(least)) - {
        table.recommended_depth
    }
    assert f"crop keeps {several(least, 'layer')} at least" in table.note()


@pytest.mark.parametrize("depth", [-1, 5])
def test_a_depth_that_is_none_is_refused(depth: int) -> None:
    with pytest.raises(InputError, match=f"depth {depth} recommended; expected .* from 0 to 4"):
        table_of(plain(4), recommended=depth)


def test_a_file_of_other_lengths_is_refused() -> None:
    table = table_of(plain(4))
    assert table.costs is not None
    for wrong in (
        {"costs": replace(table.costs, latency=table.costs.latency[1:])},
        {"recommended": 5},
    ):
        with pytest.raises(InputError, match=r"latency has 4 values; expected 5|depth 5 recomm"):
            replace(table, **wrong)


def test_no_data_is_refused() -> None:
    with pytest.raises(InputError, match="the loader gave no batch"):
        every_depth(plain(4), [], SoftCrossEntropy(5))


def test_what_is_recommended_can_be_cut_to() -> None:
    class Still(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x + super().forward(x)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), *(Still(4, 4) for _ in range(3)), nn.Linear(4, 2))
    for block in model[1:4]:
        nn.init.zeros_(block.weight), nn.init.zeros_(block.bias)
    x = torch.randn(40, 3)
    table = every_depth(model, [(x, model(x).argmax(1))], SoftCrossEntropy(2))
    assert table.costs is not None
    assert table.recommended_depth == table.costs.least == 1
    crop(model, table.recommended_depth)
