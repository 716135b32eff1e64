"""compare, interpolate, merge: what they say is what Python finds; wrong input in one line."""

import copy
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cli_commands import SMALL, command, contents
from torch import nn

from deeplimit.errors import InputError
from deeplimit.meanfield import LayerwiseMeasure, align_streams, cot_distance, cot_geodesic, merge
from deeplimit.network.storage import load
from deeplimit.records import from_plain
from deeplimit.report.numbers import percent
from deeplimit.studies import Comparison, Interpolation, MergedRuns, compare_runs
from deeplimit.training import RunFolder, loss_of, recipe_for, run_data, train
from deeplimit.training.building import evaluation_batches
from deeplimit.training.verifying import verify_run

pytestmark = pytest.mark.slow

SETTINGS = {"depth": (3,), "hidden": 8, "epochs": 1, "batch_size": 128, "learning_rate": 0.03}
OTHERS: dict[str, dict[str, object]] = {
    "seed": {"seed": 1},
    "deep": {"depth": (2,), "hidden": 6, "seed": 1},
    "narrow": {"width": 32},
    "narrower": {"width": 32, "seed": 1},
    "tanh": {"activation": "tanh"},
    "linear": {"hidden": 0},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small runs that differ in one thing or two; trained, not yet measured."""
    folder = tmp_path_factory.mktemp("pairs")
    for name, changes in {"first": {}, **OTHERS}.items():
        recipe = replace(recipe_for("digits"), device="cpu", **(SETTINGS | changes))
        train(recipe, runs=folder, name=name, quiet=True)
    return folder


@pytest.fixture
def pair(runs: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Copies of two of one shape, which a test may write beside."""
    return tuple(Path(shutil.copytree(runs / n, tmp_path / n)) for n in ("first", "seed"))


def plain_score(model: nn.Module, run: Path) -> tuple[float, float]:
    """Test loss and accuracy, sample by sample."""
    folder = RunFolder.open(run)
    data = run_data(folder)
    loss = loss_of(folder.recipe, data)
    losses, right = [], []
    with torch.no_grad():
        for x, y in evaluation_batches(data.test):
            logits = model.eval()(x)
            losses += loss(logits, y).tolist()
            right += (logits.argmax(1) == y).tolist()
    return math.fsum(losses) / len(losses), sum(right) / len(right)


def model(run: Path) -> nn.Module:
    return RunFolder.open(run).model()


def test_compare_tells_the_distance_and_the_layers(runs: Path, tmp_path: Path) -> None:
    a, b = runs / "first", runs / "seed"
    figure = tmp_path / "far.html"
    done = command("compare", a, b, "--figure", figure, "--json")
    assert done.code == 0, done.err
    assert done.err == ""
    found = from_plain(Comparison, json.loads(done.out))
    (pair,) = found.pairs
    expected = cot_distance(model(a), model(b))
    assert pair.distance == expected.distance
    assert tuple(layer.distance for layer in pair.layers) == expected.per_layer
    x, y = (LayerwiseMeasure.of(model(run)).particles.double() for run in (a, b))
    naive = (x - y).square().sum(2).mean().sqrt()
    assert pair.by_number == pytest.approx(float(naive), rel=1e-9)
    assert pair.by_number > pair.distance
    assert found.networks[0].size == pytest.approx(float(x.square().sum(2).mean().sqrt()))
    assert json.loads(figure.with_suffix(".json").read_text()) == json.loads(done.out)
    assert "by their numbers" in figure.read_text(encoding="utf-8")


def test_one_that_does_not_go_with_the_others_is_refused_before_the_work(runs: Path) -> None:
    told: list[str] = []
    odd = [runs / name for name in ("first", "seed", "tanh")]
    with pytest.raises(InputError, match=r"first and .*tanh: .* state dimension and activation"):
        compare_runs(odd, tell=lambda message, _: told.append(message))
    assert not told


def test_a_network_of_permuted_neurons_is_the_same(runs: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(runs / "first", tmp_path / "first"))
    other = model(run)
    order = torch.tensor([1, 2, 3, 4, 5, 6, 7, 0])
    with torch.no_grad():
        for block in other.stages[0]:
            for p, axis in (
                (block.inner.weight, 0),
                (block.inner.bias, 0),
                (block.outer.weight, 1),
            ):
                p.copy_(p.index_select(axis, order))
    shutil.copytree(run, tmp_path / "turned")
    RunFolder.open(tmp_path / "turned").write_model(other)
    done = command("compare", run, tmp_path / "turned", "--json")
    (pair,) = from_plain(Comparison, json.loads(done.out)).pairs
    assert pair.distance == 0
    assert pair.by_number is not None
    assert pair.by_number > 1
    assert all(layer.unmoved == 0 and layer.atoms == 8 for layer in pair.layers)
    words = command("compare", run, tmp_path / "turned").out
    assert words.startswith("first and turned: d = 0, 0.0\u00a0% of the larger one's size. With ")


def test_compare_of_several_is_a_table(runs: Path) -> None:
    three = [runs / name for name in ("first", "seed", "deep")]
    done = command("compare", *three)
    assert done.code == 0, done.err
    assert done.out.startswith("The nearest two of 3: ")
    assert "comparing: first and deep" in done.err
    found = from_plain(Comparison, json.loads(command("compare", *three, "--json").out))
    assert [(p.first, p.second) for p in found.pairs] == [(0, 1), (0, 2), (1, 2)]
    unequal = cot_distance(model(three[0]), model(three[2]))
    assert found.distance(2, 0) == unequal.distance
    assert found.pairs[1].by_number is None
    assert len(found.pairs[1].layers) == 4  # 1/3, 1/2, 2/3
    assert found.distance(0, 1) <= found.distance(0, 2) + found.distance(2, 1)
    bounded = command("compare", *three, "--sinkhorn", "0.05", "--json")
    two = command("compare", *three[:2], "--sinkhorn", "0.05").out
    assert two.startswith("first and seed: ")
    assert " ≤ d ≤ " in two.splitlines()[0]
    for exact, near in zip(found.pairs, json.loads(bounded.out)["pairs"], strict=True):
        assert near["lower"] <= exact.distance * (1 + 1e-9)
        assert exact.distance <= near["distance"] * (1 + 1e-9)


def test_interpolate_scores_both_ways(pair: tuple[Path, Path]) -> None:
    a, b = pair
    words = ["--points", "3", "--frame", "interpolate", "--save", "0.5", "--name", "between"]
    before = contents(a), contents(b)
    done = command("interpolate", a, b, *words, "--json")
    assert done.code == 0, done.err
    assert (contents(a), contents(b)) == before
    found = from_plain(Interpolation, json.loads(done.out))
    assert found.ts == (0, 0.5, 1)
    written = model(a.parent / "between")
    off = cot_distance(model(a), written).distance, cot_distance(written, model(b)).distance
    assert found.saved_distances == pytest.approx(off, rel=1e-6)
    assert found.lower == found.distance
    middle = cot_geodesic(model(a), model(b), 0.5, frame="interpolate").network()
    plain = copy.deepcopy(model(a))
    mine, theirs = model(a).state_dict(), model(b).state_dict()
    plain.load_state_dict({k: (v + theirs[k]) / 2 for k, v in mine.items()})
    assert found.naive is not None
    for network, score in (
        (middle, found.geodesic[1]),
        (plain, found.naive[1]),
        (model(a), found.ends[0]),
        (model(a), found.geodesic[0]),
        (model(b), found.naive[2]),
        (model(a.parent / "between"), found.geodesic[1]),
    ):
        loss, accuracy = plain_score(network, a)
        assert score.loss == pytest.approx(loss, rel=1e-5)
        assert score.accuracy == accuracy
    for barrier, scores in ((found.barrier, found.geodesic), (found.naive_barrier, found.naive)):
        first, at, last = (score.loss for score in scores)
        assert barrier == pytest.approx(max(0, at - (first + last) / 2), abs=1e-12)
    kept = json.loads((a.parent / "first-to-seed.json").read_text(encoding="utf-8"))
    assert kept == json.loads(done.out)
    page = (a.parent / "first-to-seed.html").read_text(encoding="utf-8")
    for said in ("parameters averaged", "Accuracy between the networks", "Distance in depth"):
        assert said in page
    assert (a.parent / "between" / "report.html").is_file()


def test_interpolate_between_shapes_and_into_a_file(pair: tuple[Path, Path], runs: Path) -> None:
    a, place = pair[0], pair[0].parent / "third.safetensors"
    words = ["--frame", "interpolate", "--points", "4", "--save", "0.25", "--name", place]
    done = command("interpolate", a, runs / "deep", *words)
    assert done.code == 0, done.err
    assert "an average of parameters does not exist: the networks differ in" in done.out
    found = from_plain(Interpolation, json.loads((a.parent / "first-to-deep.json").read_text()))
    assert found.naive is None
    assert found.naive_barrier is None
    assert found.width > 8  # the coupling's support
    made = load(place)
    way = cot_geodesic(model(a), model(runs / "deep"), 0.25, frame="interpolate").network()
    x = run_data(RunFolder.open(a)).test.batch(range(5))[0]
    with torch.no_grad():
        assert torch.equal(made(x), way.eval()(x))


def test_trained_in_one_frame_runs_need_no_other_word(runs: Path, tmp_path: Path) -> None:
    first = Path(shutil.copytree(runs / "first", tmp_path / "first"))
    words = [*SMALL, "--epochs", "1", "--seed", "1", "--depth", "4", "--frame", first]
    done = command("train", "digits", *words, "--runs", tmp_path, "--name", "second")
    assert done.code == 0, done.err
    done = command("interpolate", first, tmp_path / "second", "--points", "2")
    assert done.code == 0, done.err
    assert "stem and head are shared" in " ".join(done.out.split())
    wrong = command("train", "digits", *words, "--width", "8", "--runs", tmp_path, "--name", "no")
    assert (wrong.code, wrong.out) == (2, "")
    assert wrong.err.startswith(f"deeplimit: {first}: its head.")
    assert not (tmp_path / "no").exists()


def test_interpolate_aligned(runs: Path, tmp_path: Path) -> None:
    a, b, figure = runs / "narrow", runs / "narrower", tmp_path / "x.html"
    done = command("interpolate", a, b, "--align", "--points", "2", "--figure", figure, "--json")
    assert done.code == 0, done.err
    found = from_plain(Interpolation, json.loads(done.out))
    assert (found.aligned, found.frame) == (True, "interpolate")
    x = next(iter(evaluation_batches(run_data(RunFolder.open(a)).train.take(256))))[0]
    expected = cot_distance(LayerwiseMeasure.of(model(a)), align_streams(model(a), model(b), x))
    assert found.distance == pytest.approx(expected.distance, rel=1e-6)
    assert found.geodesic[1].loss == pytest.approx(found.ends[1].loss, rel=1e-4)


def test_merge_leaves_a_run(pair: tuple[Path, Path], runs: Path) -> None:
    three = [*pair, runs / "deep"]
    done = command("merge", *three, "--frame", "interpolate", "--width", "5", "--json")
    assert done.code == 0, done.err
    assert done.err == ""
    found = from_plain(MergedRuns, json.loads(done.out))
    folder = pair[0].parent / "merged"
    assert Path(found.folder) == folder
    assert json.loads((folder / "merge.json").read_text()) == json.loads(done.out)
    assert found.verdict.tolerance == RunFolder.open(three[0]).recipe.points / 100
    joined = merge([model(run) for run in three], frame="interpolate")
    assert found.distances == pytest.approx(joined.distances, rel=1e-6)
    assert found.lower == found.distances
    assert (found.depth, found.width, found.averaged) == (4, 5, None)
    assert found.narrowed is not None
    assert found.narrowed > 0
    scores = zip([*three, folder], [*found.parents, found.merged], strict=True)
    for run, score in scores:
        loss, accuracy = plain_score(model(run), pair[0])
        assert (score.loss, score.accuracy) == (pytest.approx(loss, rel=1e-5), accuracy)
    page = (folder / "report.html").read_text()
    rates = [percent(p.accuracy, found.samples) for p in (*found.parents, found.merged)]
    said = f"whose test accuracies are {', '.join(rates[:3])}: {rates[3]}."
    assert f"Merged from first, seed and deep, {said}" in page
    again = command("merge", *pair, "--frame", "interpolate", "--weights", "0.75", "0.25")
    assert "Merged: 2 networks → 1" in again.out
    assert "parameters averaged" in again.out
    assert (pair[0].parent / "merged-2").is_dir()


WRONG = [
    (["compare", "first"], "expected two runs or more, got 1"),
    (["compare", "first", "nowhere"], "nowhere: no such folder"),
    (["compare", "first", "narrow"], "networks of one state dimension and activation"),
    (["compare", "first", "tanh"], "networks of one state dimension and activation"),
    (["compare", "first", "linear"], "linear: "),
    (["compare", "first", "seed", "--sinkhorn", "-1"], "expected a regularisation > 0"),
    (["compare", "first", "seed", "--figure", "no/x.html"], "there is no folder no"),
    (["compare", "first", "seed", "--figure", "x.json"], "expected an .html file"),
    (["interpolate", "first", "seed"], "differ in head.weight, head.bias, which no particles are"),
    (["interpolate", "first", "tanh"], "networks of one state dimension and activation"),
    (["interpolate", "first", "seed", "--points", "1"], "points is 1; expected at least 2"),
    (
        ["interpolate", "first", "seed", "--save", "1.5", "--name", "x"],
        "--save is 1.5; expected a number from 0 to 1",
    ),
    (["interpolate", "first", "seed", "--save", "0.5"], "--save and --name go together"),
    (
        ["interpolate", "first", "seed", "--save", "0", "--name", "no/x.safetensors"],
        "name is no/x.safetensors: there is no folder no",
    ),
    (
        [*["interpolate", "first", "seed", "--save", "0", "--name", "first/model.safetensors"]],
        "name is first/model.safetensors, which is there already; give another name",
    ),
    (["interpolate", "first", "seed", "--align"], "basis of this network's residual stream is"),
    (["interpolate", "first", "seed", "--align", "--frame", "equal"], "align turns the second"),
    (["interpolate", "first", "spirals"], "trained on different data, digits and spirals"),
    (["merge", "first", "spirals"], "trained on different data, digits and spirals"),
    (["merge", "first", "seed", "--width", "0"], "--width is 0; expected at least 1"),
    (
        ["merge", "first", "seed", "--weights", "1"],
        "--weights has 1 numbers; expected 2, one a run",
    ),
    (["merge", "first", "linear"], "linear: "),
]


@pytest.mark.parametrize("verb", ["compare", "interpolate", "merge"])
def test_a_network_that_diverged(verb: str, pair: tuple[Path, Path]) -> None:
    a, b = pair
    network = model(b)
    with torch.no_grad():
        next(iter(network.parameters()))[0] = math.nan
    RunFolder.open(b).write_model(network)
    before = contents(a.parent)
    done = command(verb, a, b)
    assert done.code == 2
    assert "is not finite: its training diverged" in done.err.splitlines()[-1]
    assert "a smaller learning rate" in done.err.splitlines()[-1]
    assert contents(a.parent) == before


@pytest.mark.parametrize(("words", "said"), WRONG)
def test_wrong_input_is_one_line(
    words: list[str], said: str, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in {"first", *words} & {"first", *OTHERS}:
        (tmp_path / name).symlink_to(runs / name)
    if "spirals" in words:
        other = Path(shutil.copytree(runs / "first", tmp_path / "spirals")) / "recipe.toml"
        other.write_text(other.read_text().replace('"digits"', '"spirals"'))
        verify_run(other.parent, accepting=True)
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    done = command(*words)
    assert done.code == 2, done.out
    assert said in done.err
    assert len(done.err.strip().splitlines()) <= 3  # what is done now, and the error
    assert contents(tmp_path) == before
