"""The verbs on a small run: what they print, what they write, what they leave alone."""

import contextlib
import dataclasses
import io
import json
import re
from pathlib import Path

import pytest
import torch
from cli_commands import SMALL, Done, command, contents

from deeplimit.cli import main
from deeplimit.cli.options import Train, options_of, parse_train
from deeplimit.cli.verbs import STUDIES, VERBS, function_of, summary_of
from deeplimit.errors import InputError
from deeplimit.network.storage import load
from deeplimit.training import RunFolder, recipe_for

pytestmark = pytest.mark.slow

FILES = {
    "run.json",
    "recipe.toml",
    "metrics.csv",
    "checkpoint",
    "model.safetensors",
    "profile.json",
    "trajectories.json",
    "crop.json",
    "cropped.safetensors",
    "report.html",
}


def files(run: Path) -> dict[str, object]:
    return {name: json.loads((run / f"{name}.json").read_text()) for name in ("profile", "crop")}


def printed(done: Done) -> dict[str, object]:
    """The JSON object that is all of stdout."""
    assert done.code == 0, done.err
    assert done.out.count("\n") == 1
    return json.loads(done.out)


def without_times(result: object) -> object:
    """The same result less how long it took."""
    if isinstance(result, dict):
        return {k: without_times(v) for k, v in result.items() if "latency" not in k}
    return result


def test_train_leaves_a_whole_run(trained: Path) -> None:
    assert {path.name for path in trained.iterdir()} == FILES
    folder = RunFolder.open(trained)
    assert (folder.recipe.depth, folder.recipe.hidden, folder.recipe.epochs) == ((3,), 8, 2)
    assert len(folder.metrics()) == 2
    cut = folder.cut()
    assert cut is not None
    assert cut.tolerance == recipe_for("digits").points / 100
    profiles = folder.profiles()
    assert profiles is not None
    assert cut.report.horizon_after == profiles.validation.recommended_depth


def test_train_prints_the_answer_first_and_the_page_last(tmp_path: Path) -> None:
    done = command("train", "digits", *SMALL, "--runs", tmp_path / "runs")
    lines = done.out.splitlines()
    assert re.match(r"Depth 3 → [0-3]$", lines[0].strip())
    assert lines[-1] == f"The page is at {tmp_path / 'runs' / 'digits' / 'report.html'}"
    at = lines.index("Every depth on test data, 359 samples")
    rows = [line.split()[0] for line in lines[at + 2 : at + 6]]
    assert rows == ["0", "1", "2", "3"]
    assert lines[at + 6].startswith("±: one standard error")
    assert lines[at + 7] == (
        f"deeplimit crop {tmp_path / 'runs' / 'digits'} --to K   keeps the first K layers"
    )
    assert lines[at + 8].startswith("with at_depth(model, K): …")
    assert len(lines) == at + 10
    assert len(done.err.splitlines()) == 3  # what is trained, and a line for each epoch
    assert "epoch 2/2" in done.err


def test_train_as_json(tmp_path: Path) -> None:
    result = printed(command("train", "digits", *SMALL, "--runs", tmp_path, "--json"))
    run = tmp_path / "digits"
    assert result["run"] == str(run)
    assert result["page"] == str(run / "report.html")
    results = result["results"]
    assert isinstance(results, dict)
    assert results["profiles"] == files(run)["profile"]
    assert results["cut"] == files(run)["crop"]
    assert results["recipe"]["depth"] == [3]
    assert [row["epoch"] for row in results["metrics"]] == [1, 2]


def test_profile(run: Path) -> None:
    (run / "profile.json").unlink()
    page = (run / "report.html").stat().st_mtime_ns
    result = printed(command("profile", run, "--json"))
    assert result == files(run)["profile"]
    assert (run / "report.html").stat().st_mtime_ns > page
    shown = command("profile", run).out
    assert "Turnpike on validation data, 359 samples" in shown
    assert len(re.findall(r"^ +\d ", shown, flags=re.MULTILINE)) == 4  # layers 0 … 3
    assert f"deeplimit crop {run} --to K" in shown.split("Every depth on test data")[1]


def test_crop_to_a_depth(run: Path) -> None:
    result = printed(command("crop", run, "--to", "2", "--json"))
    assert result == files(run)["crop"]
    assert result["removed"] == [2]
    assert result["tolerance"] is None
    assert result["report"]["horizon_after"] == 2
    assert load(run / "cropped.safetensors").architecture.depths == (2,)
    assert "Depth 3 → 2" in command("crop", run, "--to", "2").out
    assert "Depth 3 → 2" not in command("report", run).err


def test_crop_by_search(run: Path) -> None:
    result = printed(command("crop", run, "--search", "--points", "40", "--epochs", "2", "--json"))
    assert result == files(run)["crop"]
    kept = 3 - len(result["removed"])
    assert load(run / "cropped.safetensors").architecture.depths == (kept,)
    tried = [one["report"]["horizon_after"] for one in result["search"]]
    assert tried in ([1], [1, 2])
    shown = command("crop", run, "--search", "--points", "40")
    assert "The path of the search" in shown.out
    assert f"depth {tried[0]} of 3 layers, 1 epoch" in shown.err
    assert "The path of the search" in (run / "report.html").read_text()


def test_crop_auto_is_the_default(run: Path) -> None:
    before = files(run)["crop"]
    command("crop", run, "--to", "1")
    assert files(run)["crop"] != before
    result = printed(command("crop", run, "--json"))
    assert result["tolerance"] == recipe_for("digits").points / 100
    assert without_times(result) == without_times(before)


@pytest.mark.parametrize(
    ("option", "limit", "budget"),
    [("--blocks", "2", "blocks"), ("--multiply-adds", "0.9", "multiply_adds")],
)
def test_crop_under_a_budget(option: str, limit: str, budget: str, run: Path) -> None:
    result = printed(command("crop", run, option, limit, "--json"))
    assert result == files(run)["crop"]
    choice = result["choice"]
    assert (choice["budget"], choice["limit"]) == (budget, float(limit))
    assert choice["removed"] == result["removed"]
    kept = 3 - len(result["removed"])
    assert choice["layers_after"] == [kept]
    assert kept == 2 or choice["multiply_adds_after"] <= 0.9 * choice["multiply_adds_before"]
    assert load(run / "cropped.safetensors").architecture.depths == (kept,)
    assert f"kept per stage: {kept} of 3" in " ".join(
        command("crop", run, option, limit).out.split()
    )
    assert "Layers of any place" in (run / "report.html").read_text()


def test_report_renews_the_page_and_computes_nothing(run: Path) -> None:
    command("crop", run, "--to", "2")
    before = contents(run)
    (run / "report.html").unlink()
    result = printed(command("report", run, "--json"))
    assert result["results"]["cut"] == files(run)["crop"]
    assert contents(run) == before
    assert "<title>small: depth 3 → 2" in (run / "report.html").read_text()


def test_report_of_a_run_that_is_not_finished(stopped: Path) -> None:
    """There is something to see before the end: what was measured so far."""
    done = command("report", stopped)
    assert done.code == 0
    assert (stopped / "report.html").exists()


def test_names_with_brackets_are_shown_as_they_are(tmp_path: Path) -> None:
    args = ["train", "digits", "--depth", "2", "--epochs", "1", "--runs", tmp_path]
    done = command(*args, "--name", "[bold]x")
    assert done.code == 0
    assert str(tmp_path / "[bold]x" / "report.html") in done.out


def test_a_run_is_never_overwritten(trained: Path) -> None:
    before = contents(trained)
    again = ["train", "digits", *SMALL, "--runs", trained.parent, "--name", "small"]
    assert command(*again).code == 0
    assert command(*again).code == 0
    assert contents(trained) == before
    assert {path.name for path in trained.parent.glob("small*")} == {"small", "small-2", "small-3"}


def test_recipe_repeats_a_run(trained: Path, tmp_path: Path) -> None:
    done = command("train", "--recipe", trained / "recipe.toml", "--runs", tmp_path)
    assert done.code == 0
    first, again = RunFolder.open(trained), RunFolder.open(tmp_path / "digits")
    assert again.recipe == first.recipe
    for old, new in zip(first.metrics(), again.metrics(), strict=True):
        assert old | {"seconds": 0} == new | {"seconds": 0}
    profiles = [without_times(files(folder.path)["profile"]) for folder in (first, again)]
    assert profiles[0] == profiles[1]
    weights = [folder.model().state_dict() for folder in (first, again)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_an_option_overrides_the_recipe(trained: Path, tmp_path: Path) -> None:
    args = ["--recipe", trained / "recipe.toml", "--seed", "5", "--runs", tmp_path]
    assert command("train", *args).code == 0
    recipe = RunFolder.open(tmp_path / "digits").recipe
    assert recipe == dataclasses.replace(RunFolder.open(trained).recipe, seed=5)


def test_resume_goes_on_to_the_same_result(trained: Path, stopped: Path) -> None:
    done = command("train", "--resume", stopped)
    assert done.code == 0
    assert "epoch 2/2" in done.err
    assert "epoch 1/2" not in done.err
    assert "Depth 3 →" in done.out
    assert {path.name for path in stopped.iterdir()} == FILES
    assert without_times(files(stopped)["profile"]) == without_times(files(trained)["profile"])


def test_resume_of_a_finished_run_changes_nothing(run: Path) -> None:
    """Also a depth that the user chose stays; the weights are written again, the same ones."""
    command("crop", run, "--to", "2")
    before, weights = contents(run), load(run / "model.safetensors").state_dict()
    done = command("train", "--resume", run)
    assert done.code == 0
    assert "epoch 2/2" not in done.err
    assert "2 epochs: finished already, nothing to train" in done.err
    assert "Depth 3 → 2" in done.out
    assert f"The page is at {(run / 'report.html').resolve()}" in done.out
    assert contents(run) | {"model.safetensors": ""} == before | {"model.safetensors": ""}
    again = load(run / "model.safetensors").state_dict()
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_defaults_are_the_data_sets(tmp_path: Path) -> None:
    done = command("train", "spirals", "--epochs", "1", "--depth", "4", "--runs", tmp_path)
    assert done.code == 0
    expected = dataclasses.replace(recipe_for("spirals"), epochs=1, depth=(4,))
    assert RunFolder.open(tmp_path / "spirals").recipe == expected


def test_a_network_that_diverges(tmp_path: Path) -> None:
    """Exit code 1: the input was in order, the run failed; the line says where and what to do."""
    done = command("train", *SMALL, "--learning-rate", "1e18", "--runs", tmp_path)
    assert (done.code, done.out) == (1, "")
    line = done.err.splitlines()[-1]
    assert line.startswith("deeplimit: the loss is not finite at step 2")
    assert "layer" in line
    assert "smaller learning rate" in line


def test_a_terminal_that_lacks_letters(run: Path) -> None:
    """The answer comes all the same."""
    written = io.BytesIO()
    out = io.TextIOWrapper(written, encoding="latin-1")
    with contextlib.redirect_stdout(out):
        assert main(["crop", str(run), "--to", "2"]) == 0
    assert "Depth 3 ? 2" in written.getvalue().decode("latin-1")


HELP = [*VERBS[:-1], *(f"study {name}" for name in STUDIES)]
POSITIONAL = {
    "train": {"data": "DATA"},
    "gradient": {"model": "MODEL"},
    "ode": {"model": "RUN", "bound": "--no-bound"},
    "interpolate": {"first": "RUN_A", "second": "RUN_B"},
    "compare": {"runs": "RUN"},
    "merge": {"runs": "RUN"},
}


def explained(help_text: str) -> dict[str, str]:
    """What the help says of each option, without metavar and default."""
    text = re.sub(r"^[│|]|[│|] *$", " ", help_text, flags=re.MULTILINE)
    entries = re.findall(r"^ {2,3}(--[\w-]+|[A-Z_]+)\b(.*?)(?=^ {0,3}\S|\Z)", text, re.M | re.S)
    return {
        name: " ".join(
            re.sub(r"\(default.*|\(required.*|\{.*?\}|\[.*\]", " ", said, flags=re.S).split()
        )
        for name, said in entries
    }


@pytest.mark.parametrize("verb", HELP)
def test_help_names_and_explains_every_option(verb: str) -> None:
    done = command(*verb.split(), "--help")
    assert done.code == 0
    assert done.err == ""
    said = explained(done.out)
    positional = {"run": "RUN"} | POSITIONAL.get(verb, {})
    function = function_of(verb.split()[-1])
    for field in dataclasses.fields(Train if verb == "train" else options_of(function)):
        name = positional.get(field.name, f"--{field.name.replace('_', '-')}")
        assert len(said[name].split()) >= 4, f"{name} is not explained"
    assert f"deeplimit {verb}" in done.out.replace(f"usage: deeplimit {verb}", "")  # an example


@pytest.mark.parametrize("data", ["digits", "mazes", "spirals", "mnist", "cifar10", "npz:x.npz"])
def test_help_shows_the_defaults_of_the_data_set(data: str) -> None:
    recipe = recipe_for(data)
    shown = re.sub(r"[│|\s]+", " ", command("train", data, "--depth", "7", "--help").out)
    for field in dataclasses.fields(recipe):
        value = getattr(recipe, field.name)
        value = " ".join(map(str, value)) if isinstance(value, tuple) else value
        assert value is None or f"(default: {value})" in shown
    assert "(default: None)" not in shown
    depth = re.search(r"--depth .*?\(default: ([\d ]+)\)", shown)
    assert depth is not None
    assert tuple(map(int, depth[1].split())) == recipe.depth


@pytest.mark.parametrize("data", ["digits", "mazes", "cifar10", "npz:x.npz"])
@pytest.mark.parametrize("on", [True, False])
def test_what_one_data_set_does_by_itself_is_said_and_unsaid_of_all(data: str, on: bool) -> None:
    named = [name for name, value in vars(recipe_for(data)).items() if isinstance(value, bool)]
    assert "stage_cost_grows" in named
    assert "flip" in named
    options = parse_train([data, *(f"--{'' if on else 'no-'}{n.replace('_', '-')}" for n in named)])
    assert {name: getattr(options, name) for name in named} == dict.fromkeys(named, on)


@pytest.mark.parametrize("other", ["--no-flip", "--epochs=60", "--depth 20", "--runs elsewhere"])
def test_beside_resume_no_option_is_ignored_that_is_the_default_here(other: str) -> None:
    with pytest.raises(InputError, match=f"^{other} and --resume run given; a run goes on by its"):
        parse_train(["--resume", "run", *other.split()])
    assert parse_train(["--resume", "run", "--json"]).resume == Path("run")


def test_help_teaches() -> None:
    done = command("--help")
    assert done.code == 0
    for verb in VERBS:
        assert verb in done.out
        assert summary_of(verb).split()[-1] in done.out
    assert "deeplimit demo" in done.out
    assert "report.html" in done.out
    assert "2 wrong input" in done.out


def test_version() -> None:
    import deeplimit

    assert command("--version") == Done(0, f"deeplimit {deeplimit.__version__}\n", "")
