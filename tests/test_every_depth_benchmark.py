"""The benchmark of every depth: its summary, its arms against the library, how it goes on."""

import importlib.util
import json
import random
import sys
from pathlib import Path

import pytest
import torch

from deeplimit import SoftCrossEntropy, StageCost
from deeplimit.network import Architecture

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    """Its module, under a name of its own."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    path = BENCHMARKS / "every_depth.py"
    spec = importlib.util.spec_from_file_location("every_depth_benchmark", path)
    module = sys.modules["every_depth_benchmark"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for name in ("every_depth_benchmark", "by_hand"):
        sys.modules.pop(name, None)


def test_the_summary_by_hand(script) -> None:
    def row(seed: int, arm: str, layers: int, *accuracies: float) -> dict:
        both = {"accuracy": list(accuracies), "validation": [0.5] * len(accuracies)}
        return {"data": "d", "epochs": 3, "seed": seed, "arm": arm, "layers": layers, **both}

    rows = [
        {"data": "d", "epochs": 3, "seed": 0, "arm": "times"}
        | {"milliseconds": {"plain": 4, "plain-1/4": 1, "plain-1/2": 2, "plain-3/4": 3, "late": 5}}
    ]
    for seed, more in ((0, 0.0), (1, 0.1)):
        rows += [
            row(seed, "plain", 8, *[0.1] * 8, 0.8 + more),
            row(seed, "plain-1/4", 2, 0, 0, 0.4 + more),
            row(seed, "plain-1/2", 4, 0, 0, 0, 0, 0.6),
            row(seed, "plain-3/4", 6, *[0] * 6, 0.6),
            row(seed, "late", 8, 0, 0, 0.4, 0.4, 0.6, 0.6, 0.6, 0.7, 0.7),
        ]
    rows.append(row(0, "linear", 8, *[0.8] * 9))
    rows.append(row(2, "linear", 8, *[0.0] * 9))  # of a seed that has no plain network yet
    told = script.summary(rows)
    assert list(told) == ["d, 3 epochs"]
    told = told["d, 3 epochs"]
    assert list(told) == ["plain", "linear", "late"]
    assert (told["late"]["seeds"], told["linear"]["seeds"]) == ([0, 1], [0])
    assert told["linear"]["test"]["short"] == 0
    # Below 0.4, 0.5, 0.6, 0.6, 0.6, 0.7, 0.8 and 0.5, 0.55, 0.6, 0.6, 0.6, 0.75, 0.9.
    assert told["late"]["test"] == {
        "short": 15.0,
        "short_of_seeds": [10.0, 20.0],
        "short_at_full_depth": 15.0,
        "short_at_full_depth_of_seeds": [10.0, 20.0],
    }
    assert told["late"]["validation"]["short"] == 0
    assert told["late"]["cost"] == {"of_plain": 1.25, "of_all": 0.5}
    assert told["plain"]["test"]["short"] == 62.5  # at 7 layers
    assert script.between({2: 1.0, 5: 4.0, 9: 0.0}, 6) == pytest.approx(3.0)
    text = {"loss": [2.0, 1.5], "validation": [2.5, 1.0]}
    assert script.read(text, "test") == [-200, -150]
    assert script.read(text, "validation") == [-250, -100]


@pytest.fixture
def batch():
    torch.manual_seed(0)
    model = Architecture("vector", (6,), 3, (5,), width=8, hidden=8).build().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model, torch.randn(7, 6).double(), torch.arange(7) % 3


def gradients(cost, model) -> torch.Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(cost, list(model.parameters()))])


@pytest.mark.parametrize("options", [{"heads": "own"}, {"heads": "affine"}, {"taught": (0.0, 2.0)}])
def test_what_is_written_out_is_the_librarys_where_it_changes_nothing(
    script, batch, options
) -> None:
    model, x, y = batch
    loss = SoftCrossEntropy(3)
    expected, _ = StageCost(model, loss, 0.3)(x, y)
    objective = script.Objective(model, loss, script.Arm(**options), seed=0).double()
    cost, _ = objective(x, y)
    assert float(cost.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    if options != {"heads": "own"}:  # whose copies have a part of the head's
        assert torch.allclose(gradients(cost, model), gradients(expected, model), rtol=1e-9)


def test_the_teacher_is_the_last_layer_and_does_not_learn(script, batch) -> None:
    model, x, y = batch
    objective = script.Objective(model, SoftCrossEntropy(3), script.Arm(taught=(1.0, 2.0)), seed=0)
    cost, _ = objective(x, y)
    states, z = objective.anatomy.states(x)
    below = objective.anatomy.logits(states)[:-1]
    teacher = (z.detach() / 2).softmax(-1)
    apart = (teacher * (teacher.log() - (below / 2).log_softmax(-1))).sum(-1).mean(-1).sum()
    expected = objective.loss.mean(z, y) + 0.3 * 4 * apart  # τ² = 4
    assert float(cost.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    assert torch.allclose(gradients(cost, model), gradients(expected, model), rtol=1e-9)


def test_a_balanced_gradient_has_the_norm_that_it_shall_have(script, batch) -> None:
    model, x, y = batch
    loss = SoftCrossEntropy(3)
    objective = script.Objective(model, loss, script.Arm(balanced=True), seed=0)
    seen = []
    with objective.anatomy.hooked(lambda n, s: seen.append(s)):
        cost, logits = objective(x, y)
    state = seen[4]  # of five layers: behind it is the terminal cost alone
    later, own, both = (
        torch.autograd.grad(value, [state], retain_graph=True)[0]
        for value in (loss.mean(logits, y), loss.mean(model.head(state), y), cost)
    )
    assert torch.allclose(both, later + 0.3 * later.norm() / own.norm() * own, rtol=1e-9)


def test_draws_have_the_mean_of_uniform_weights(script) -> None:
    draws = random.Random(0)
    for name in ("drawn-1", "drawn-2", "sandwich"):
        weights = [script.ARMS[name].weights(5, 0.0, draws) for _ in range(4000)]
        mean = torch.tensor(weights).mean(0)
        assert torch.allclose(mean, torch.full((5,), 0.3), atol=0.04), name
        if name == "sandwich":
            assert {w[1] for w in weights} == {0.3}
    for name in ("linear", "rising"):
        assert sum(script.ARMS[name].weights(20, 0.0, draws)) == pytest.approx(6)
    assert script.ARMS["falling"].weights(2, 1.0, draws) == pytest.approx([0.1, 0.1])
    assert script.ARMS["late"].weights(1, 0.3, draws) == [0]


def test_it_goes_on_where_it_was(script, tmp_path, monkeypatch, capsys) -> None:
    out = tmp_path / "found.json"
    asked = ["every_depth.py", "digits", "--epochs", "1", "--seeds", "0", "--out", str(out)]
    arms = ["plain", "plain-1/4", "plain-1/2", "plain-3/4", "dropped"]
    monkeypatch.setattr(sys, "argv", [*asked, "--arms", *arms[:4]])
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    script.main()
    before = json.loads(out.read_text())["runs"]
    assert [row["arm"] for row in before] == sorted(arms[:4])
    monkeypatch.setattr(sys, "argv", [*asked, "--arms", *arms])
    script.main()
    torch.set_num_threads(threads)
    after = json.loads(out.read_text())
    assert [row for row in after["runs"] if row["arm"] != "dropped"] == before
    assert list(after["summary"]["digits, 1 epoch"]) == ["plain", "dropped"]
    assert len(capsys.readouterr().out.splitlines()) == 5
    assert len(after["runs"][0]["accuracy"]) == after["runs"][0]["layers"] + 1
