"""Run folders that are missing, unfinished, damaged or of another version: code 2, one line."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_commands import command, contents


def refused(*args: str | Path, says: tuple[str, ...], folder: Path) -> None:
    """The command is refused in one line, and leaves the folder as it was."""
    before = contents(folder)
    done = command(*args)
    assert done.code == 2, done.err
    assert done.out == ""
    (line,) = done.err.splitlines()
    assert line.startswith("deeplimit: ")
    for said in says:
        assert said in line
    assert contents(folder) == before


@pytest.mark.parametrize("verb", [["profile"], ["crop", "--to", "2"], ["report"]])
def test_no_such_run(verb: list[str], tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    refused(*verb, nowhere, says=(str(nowhere), "no such folder", "train"), folder=tmp_path)


@pytest.mark.parametrize("verb", [["profile"], ["crop"], ["report"], ["train", "--resume"]])
def test_a_folder_that_is_no_run(verb: list[str], tmp_path: Path) -> None:
    refused(*verb, tmp_path, says=("no recipe.toml", "deeplimit train"), folder=tmp_path)


@pytest.mark.parametrize("verb", [["profile"], ["crop"], ["report"], ["train", "--resume"]])
def test_a_run_of_another_version(verb: list[str], run: Path) -> None:
    recipe = run / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("format = 1", "format = 99"))
    refused(*verb, run, says=("recipe.toml", "99", "another version", "train again"), folder=run)


def test_a_recipe_cut_in_half(run: Path, cut_in_half: Callable[[Path], None]) -> None:
    cut_in_half(run / "recipe.toml")
    refused("profile", run, says=("recipe.toml", "damaged"), folder=run)


def test_a_recipe_with_a_word_for_a_number(run: Path) -> None:
    recipe = run / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("epochs = 2", 'epochs = "many"'))
    says = ("recipe.toml", "epochs", "'many'", "whole number")
    refused("train", "--recipe", recipe, "--runs", run, says=says, folder=run)


@pytest.mark.parametrize("verb", [["profile"], ["crop", "--to", "2"]])
def test_a_run_that_is_not_finished(verb: list[str], stopped: Path) -> None:
    says = ("model.safetensors", f"deeplimit train --resume {stopped}")
    refused(*verb, stopped, says=says, folder=stopped)


def test_no_whole_checkpoint(stopped: Path, cut_in_half: Callable[[Path], None]) -> None:
    cut_in_half(stopped / "checkpoint" / "epoch-00001.pt")
    says = ("checkpoint", "epoch-00001.pt", "recipe.toml")
    refused("train", "--resume", stopped, says=says, folder=stopped)


@pytest.mark.parametrize("verb", [["profile"], ["crop", "--to", "2"]])
def test_weights_cut_in_half(
    verb: list[str], run: Path, cut_in_half: Callable[[Path], None]
) -> None:
    cut_in_half(run / "model.safetensors")
    refused(*verb, run, says=("model.safetensors", "damaged"), folder=run)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("profile.json", "deeplimit profile"),
        ("trajectories.json", "deeplimit profile"),
        ("crop.json", "deeplimit crop"),
        ("metrics.csv", "delete it, then deeplimit train --resume"),
    ],
)
def test_results_cut_in_half(
    name: str, remedy: str, run: Path, cut_in_half: Callable[[Path], None]
) -> None:
    cut_in_half(run / name)
    refused("report", run, says=(name, "damaged", remedy, str(run)), folder=run)


@pytest.mark.slow
def test_a_result_with_an_unknown_field(run: Path) -> None:
    cut = json.loads((run / "crop.json").read_text())
    (run / "crop.json").write_text(json.dumps(cut | {"remvoed": []}))
    refused("report", run, says=("crop.json", "remvoed", "did you mean removed?"), folder=run)


@pytest.mark.parametrize("to", ["4", "-1"])
def test_a_cut_that_cannot_be_made(to: str, run: Path) -> None:
    refused("crop", run, "--to", to, says=(f"{to} layers", "0 … 3", "auto"), folder=run)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["digits"], ("data set digits", "leave")),
        (["--depth", "7"], ("--depth 7", "leave out --depth")),
        (["--name", "other"], ("--name other", "leave out --name")),
        (["--learning-rate", "0.5"], ("--learning-rate 0.5", "leave out --learning-rate")),
    ],
)
def test_a_resumed_run_takes_no_other_option(
    args: list[str], says: tuple[str, ...], stopped: Path
) -> None:
    """An option would silently be ignored: the run's own recipe decides."""
    says = (*says, f"--resume {stopped}")
    refused("train", "--resume", stopped, *args, says=says, folder=stopped)


def test_resume_and_recipe(stopped: Path) -> None:
    recipe = stopped / "recipe.toml"
    says = ("--recipe", "--resume", "leave out")
    refused("train", "--resume", stopped, "--recipe", recipe, says=says, folder=stopped)


@pytest.mark.parametrize("points", ["-1", "50", "nan"])
def test_points_that_cannot_be_lost(points: str, run: Path) -> None:
    refused(
        "crop",
        run,
        "--points",
        points,
        says=(f"--points is {float(points)}; expected a number from 0 to less than 50",),
        folder=run,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--blocks", "4"], ("4 blocks", "the model has 3", "1 … 3")),
        (["--blocks", "0"], ("--blocks is 0; expected at least 1",)),
        (["--multiply-adds", "1.5"], ("--multiply-adds is 1.5; expected a number above 0 to 1",)),
        (["--latency", "nan"], ("--latency is nan; expected a number above 0 to 1",)),
        (["--multiply-adds", "0.0001"], ("cannot reach", "larger budget")),
        (["--blocks", "2", "--latency", "0.5"], ("--blocks and --latency", "give one")),
        (["--to", "2", "--points", "0.1"], ("--to and --points", "give one")),
        (["--search", "--blocks", "2"], ("--search and --blocks", "with --points or --rise")),
        (["--search", "--bridge"], ("--search and --bridge",)),
        (["--epochs", "3"], ("--epochs given, but nothing is healed", "--search")),
        (["--to", "2", "--confidence", "0.9"], ("--confidence and --to", "auto, --points")),
    ],
)
def test_budgets_that_cannot_be_met(args: list[str], says: tuple[str, ...], run: Path) -> None:
    refused("crop", run, *args, says=says, folder=run)
