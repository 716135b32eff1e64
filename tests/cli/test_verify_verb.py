"""`deeplimit verify`: a line per file; what was changed is refused, by the other verbs too."""

import json
from pathlib import Path

import pytest
from cli_commands import command, contents

pytestmark = pytest.mark.slow


def test_a_run_is_as_it_was_written(run: Path) -> None:
    before = contents(run)
    done = command("verify", run)
    assert (done.code, done.err) == (0, "")
    names = {line.split()[1] for line in done.out.splitlines()}
    there = {name for name, digest in before.items() if digest != "folder"}
    assert names == there - {"run.json", "checkpoint/latest"}
    assert {line.split()[0] for line in done.out.splitlines()} == {"sound"}
    found = json.loads(command("verify", run, "--json").out)
    assert {file["name"] for file in found["files"]} == names
    assert contents(run) == before


@pytest.mark.parametrize("verb", ["verify", "profile", "crop", "ode"])
def test_a_flipped_exponent_is_refused(verb: str, run: Path) -> None:
    weights = run / "model.safetensors"
    whole = bytearray(weights.read_bytes())
    whole[-1] ^= 0x40  # a number of 1e-2 becomes one of 1e36
    weights.write_bytes(whole)
    before = contents(run)
    done = command(verb, run)
    assert done.code == 2
    (line,) = done.err.splitlines()
    assert "model.safetensors" in line
    assert f"deeplimit train --resume {run}" in line
    assert contents(run) == before


def test_what_the_remedies_write_is_right_again(run: Path) -> None:
    good = contents(run)
    for name, verb in (
        ("model.safetensors", ["train", "--resume"]),
        ("crop.json", ["crop", "--to", "auto"]),
        ("report.html", ["report"]),
    ):
        (run / name).write_bytes((run / name).read_bytes()[:-1] + b"?")
        assert command("verify", run).code == 2
        assert command(*verb, run).code == 0
        assert command("verify", run).code == 0
    again = contents(run)
    timeless = ("model.safetensors", "cropped.safetensors", "profile.json", "recipe.toml")
    assert {name: again[name] for name in timeless} == {name: good[name] for name in timeless}


def test_what_is_missing_or_accepted(run: Path) -> None:
    (run / "cropped.safetensors").unlink()
    recipe = run / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("seed = 0", "seed = 1"))
    done = command("verify", run)
    assert done.code == 2
    assert "missing  cropped.safetensors" in done.out
    assert "changed  recipe.toml" in done.out
    assert "2 of" in done.err
    assert "--accept" in command("report", run).err
    assert command("verify", run, "--accept").code == 0
    assert command("report", run).code == 0


def test_a_run_without_its_run_json_is_not_called_sound(run: Path) -> None:
    """Nobody knows of its files until they are accepted."""
    (run / "run.json").unlink()
    (line,) = command("crop", run, "--to", "2").err.splitlines()
    assert line.endswith(
        f"run.json is lost; if you know that the files are right: deeplimit verify {run} --accept"
    )
    done = command("verify", run)
    assert done.code == 2
    states = {line.split()[1]: line.split()[0] for line in done.out.splitlines()}
    assert states.pop("metrics.csv") == "growing"
    assert {s for name, s in states.items() if "checkpoint" not in name} == {"unknown"}
    assert "run.json is lost" in done.err
    assert command("verify", run, "--accept").code == command("verify", run).code == 0
    assert command("crop", run, "--to", "2").code == 0


def test_what_is_no_run(tmp_path: Path) -> None:
    for place, said in ((tmp_path, "no recipe.toml in it"), (tmp_path / "no", "no such folder")):
        done = command("verify", place)
        assert done.code == 2
        assert said in done.err


@pytest.mark.parametrize("spoil", ["cut off", "shorter", "recipe"])
def test_what_cannot_be_read_is_not_accepted(run: Path, spoil: str) -> None:
    """Who vouches for it would hear of it from the next verb."""
    path = run / {"recipe": "recipe.toml", "cut off": "crop.json"}.get(spoil, "profile.json")
    if spoil == "shorter":  # of one quantity alone: the profile would be of two networks
        made = json.loads(path.read_text())
        made["validation"]["loss"] = made["validation"]["loss"][:2]
        path.write_text(json.dumps(made))
    else:
        path.write_text("{")
    before = (run / "run.json").read_bytes()
    done = command("verify", run, "--accept")
    assert done.code == 2
    (line,) = done.err.splitlines()
    assert path.name in line
    assert (run / "run.json").read_bytes() == before
