"""The verbs on models that the user has already: trained, taken as they are, cut, healed."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_commands import command, contents, interrupted, process

from deeplimit.network.storage import load
from deeplimit.training import RunFolder

pytestmark = pytest.mark.slow

VIT = {
    "model_type": "vit", "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
    "intermediate_size": 32, "image_size": 8, "patch_size": 4, "num_channels": 1,
}  # fmt: skip
MODULE = """
import torch, transformers

def five():
    config = transformers.ViTConfig(num_labels=5, image_size=8, patch_size=4, num_channels=1)
    config.update(dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2))
    return transformers.ViTForImageClassification(config)

def linear():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 4))
"""
FAST = ["--epochs", "3", "--batch-size", "20", "--learning-rate", "0.2", "--device", "cpu"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config, a module and images in four degrees of brightness."""
    pytest.importorskip("transformers", reason="the extra `hub` is not installed")
    folder = tmp_path_factory.mktemp("place")
    y = np.arange(300) % 4
    x = np.random.default_rng(0).integers(0, 130, (300, 1, 8, 8)) + 20 * y[:, None, None, None]
    np.savez(folder / "greys.npz", x=x.astype(np.uint8), y=y)
    (folder / "vit.json").write_text(json.dumps(VIT))
    (folder / "gpt2.json").write_text('{"model_type": "gpt2"}')
    (folder / "wide.json").write_text(json.dumps(VIT | {"image_size": 16}))
    (folder / "own_nets.py").write_text(MODULE)
    return folder


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    """A run of a vision transformer, by the command in a process of its own."""
    args = ["train", "npz:greys.npz", "--model", "transformers:vit.json", "--optimizer", "sgd"]
    done = process(*args, *FAST, cwd=place)
    assert done.code == 0, done.err
    assert done.err.startswith("runs/greys: transformers:vit.json on npz:greys.npz, 3 epochs\n")
    assert len(done.err.splitlines()) == 4  # nothing of what transformers shows besides
    assert "Depth 3 → " in done.out
    return place / "runs" / "greys"


@pytest.fixture
def vit_run(whole: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it; the current folder is where its model's file is."""
    monkeypatch.chdir(place)
    return Path(shutil.copytree(whole, tmp_path / "greys"))


def test_train_leaves_a_run_as_of_our_own(vit_run: Path) -> None:
    names = {path.name for path in vit_run.iterdir()}
    assert names >= {"model", "cropped", "profile.json", "crop.json", "metrics.csv", "report.html"}
    assert "model.safetensors" not in names
    profiles = RunFolder.open(vit_run).profiles()
    assert profiles is not None
    assert profiles.test.accuracy[-1] > 0.4  # chance is a quarter


def test_crop_and_heal(vit_run: Path) -> None:
    assert command("crop", vit_run, "--to", "1").code == 0
    done = command("heal", vit_run, "--epochs", "2", "--learning-rate", "0.1", "--json")
    assert done.code == 0, done.err
    healing = json.loads(done.out)
    assert healing == json.loads((vit_run / "heal.json").read_text())
    assert (healing["removed"], healing["teacher"]) == ([1, 2], "full")
    assert healing["from_full"]["horizon_after"] == 1
    assert healing["from_cropped"]["loss_after"] < healing["from_cropped"]["loss_before"]
    assert RunFolder.open(vit_run).healed().config.num_hidden_layers == 1
    assert (
        "Trained for 2 epochs more with the full network" in (vit_run / "report.html").read_text()
    )
    again = command("heal", vit_run, "--teacher", "none", "--epochs", "1")
    assert "Trained for 1 epoch more, the cut network goes from" in again.out
    assert "Healed: depth 3 → 1" in again.out


def test_a_depth_that_the_model_cannot_have_is_not_offered(vit_run: Path) -> None:
    done = command("crop", vit_run, "--to", "0")
    assert (done.code, done.out) == (2, "")
    assert "a cut to 0 layers; the network has 3: give 1 … 3, auto" in done.err


def test_profile_and_gradient(vit_run: Path) -> None:
    assert json.loads(command("profile", vit_run, "--json").out)["test"]["samples"] == 60
    cost = json.loads(command("gradient", vit_run, "--steps", "1", "--batch", "8", "--json").out)
    assert cost["model"] == str(vit_run)
    assert (vit_run / "gradient.html").is_file()


def test_a_model_without_a_run_gets_one(vit_run: Path, tmp_path: Path) -> None:
    """Nothing is trained; what can be done with a run can be done with it."""
    model = ["transformers:" + str(vit_run / "model"), "--data", "npz:greys.npz"]
    runs = ["--runs", tmp_path / "runs"]
    done = command("profile", *model, *runs, "--json")
    assert done.code == 0, done.err
    profiles = RunFolder.open(vit_run).profiles()
    assert json.loads(done.out)["test"]["accuracy"] == list(profiles.test.accuracy)
    taken = RunFolder.open(tmp_path / "runs" / "greys")
    assert taken.recipe.epochs == 0
    assert command("crop", taken.path, "--to", "2").code == 0
    healed = command("heal", *model, *runs, "--name", "other")
    cut = RunFolder.open(tmp_path / "runs" / "other").cut()
    assert cut is not None
    if cut.removed:
        assert healed.code == 0
        assert "Healed: depth 3 → " in healed.out
    else:
        assert healed.code == 2
        assert "nothing to heal; cut to fewer layers" in healed.err


@pytest.mark.parametrize("verb", ["profile", "crop", "heal"])
def test_random_weights_are_not_measured(verb: str, place: Path, tmp_path: Path) -> None:
    model = [f"transformers:{place / 'vit.json'}", "--data", f"npz:{place / 'greys.npz'}"]
    done = command(verb, *model, "--runs", tmp_path / "runs")
    assert (done.code, done.out) == (2, "")
    assert "has random weights, in which there is nothing to find; give --weights" in done.err
    assert not list((tmp_path / "runs").glob("[!.]*"))


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["crop", "--to", "9"], "a cut to 9 layers; the network has 3"),
        (
            ["crop", "--multiply-adds", "7"],
            "--multiply-adds is 7.0; expected a number above 0 to 1",
        ),
        (["heal", "--epochs", "0"], "epochs is 0; expected at least 1"),
        (["heal", "--fade", "2"], "fade is 2"),
    ],
)
def test_a_model_asked_for_what_cannot_be_leaves_no_run(
    args: list[str], says: str, vit_run: Path, tmp_path: Path
) -> None:
    model = ["transformers:" + str(vit_run / "model"), "--data", "npz:greys.npz"]
    done = command(args[0], *model, "--runs", tmp_path / "runs", *args[1:])
    assert (done.code, done.out) == (2, "")
    (line,) = done.err.splitlines()
    assert says in line
    assert not list((tmp_path / "runs").glob("[!.]*"))


WRONG = {
    "words": (["transformers:gpt2.json"], "classifies no images"),
    "another size": (["transformers:wide.json"], "Input image size (8*8) doesn't match model"),
    "other classes": (["own_nets:five"], "tells 5 classes apart, npz:greys.npz has 4"),
    "no anatomy": (["own_nets:linear"], "no stack of blocks in Sequential"),
    "no such function": (["own_nets:fiv"], "own_nets has no function 'fiv', did you mean five?"),
    "no such file": (["net.safetensors"], "net.safetensors: no such file"),
    "no such run": (["runs/nothing"], "runs/nothing: no such folder"),
    "no form": ([":"], "expected a run folder, module:function"),
    "weights": (
        ["transformers:vit.json", "--weights", "w.pt"],
        "w.pt: cannot be read (No such file or directory)",
    ),
    "channels": (
        ["transformers:vit.json", "--mean", "0.5", "0.5", "--std", "1", "1"],
        "2 means for samples of 1 channels",
    ),
    "our depth": (["transformers:vit.json", "--depth", "9"], "depth is 9, but the model is"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_models(
    case: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line, exit code 2, and nothing is written."""
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(place)
    args, says = WRONG[case]
    done = command(
        "train", "npz:greys.npz", "--model", *args, "--runs", tmp_path / "runs", "--device", "cpu"
    )
    assert (done.code, done.out) == (2, "")
    (line,) = done.err.splitlines()
    assert line.startswith("deeplimit: ")
    assert says in line
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("verb", ["profile", "crop", "heal"])
@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["transformers:vit.json"], "is a model, not a run folder: give its data too"),
        (["RUN", "--data", "digits"], "--data given, but"),
        (["RUN", "--weights", "a.pt"], "--weights given, but"),
    ],
)
def test_a_model_wants_data_and_a_run_has_its_own(
    verb: str, args: list[str], says: str, vit_run: Path
) -> None:
    before = contents(vit_run)
    done = command(verb, *(str(vit_run) if arg == "RUN" else arg for arg in args))
    assert (done.code, done.out) == (2, "")
    assert says in done.err
    assert contents(vit_run) == before


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--resume"], "no healing was stopped; start one"),
        (["--resume", "--epochs", "3"], "--epochs and --resume given"),
        (["--epochs", "0"], "epochs is 0"),
        (["--teacher-weight", "7"], "--teacher-weight is 7.0; expected a number from 0 to 1"),
    ],
)
def test_a_healing_that_cannot_be(args: list[str], says: str, run: Path) -> None:
    command("crop", run, "--to", "1")
    before = contents(run)
    done = command("heal", run, *args)
    assert (done.code, done.out) == (2, "")
    (line,) = done.err.splitlines()
    assert says in line
    assert contents(run) == before


def test_a_healing_stopped_by_ctrl_c_goes_on_to_the_same_result(run: Path, tmp_path: Path) -> None:
    args = ["--to", "2"]
    runs = [Path(shutil.copytree(run, tmp_path / name)) for name in ("whole", "broken")]
    assert all(command("crop", run, *args).code == 0 for run in runs)
    epochs = ["--epochs", "4"]
    assert command("heal", runs[0], *epochs).code == 0
    done = interrupted("heal", runs[1], *epochs, at="epoch 1/")
    assert done.code == 130
    assert f"deeplimit heal {runs[1]} --resume goes on after epoch" in done.err.splitlines()[-1]
    assert not (tmp_path / "broken" / "heal.json").exists()
    done = command("heal", runs[1], "--resume")
    assert done.code == 0, done.err
    assert "epoch 1/4" not in done.err
    assert "epoch 4/4" in done.err
    first, second = (load(run / "healed.safetensors").state_dict() for run in runs)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not (tmp_path / "broken" / "heal").exists()


def test_refine(vit_run: Path) -> None:
    """A deeper model of the same class, which plain transformers loads, trained a little."""
    done = command("refine", vit_run, "--epochs", "1", "--learning-rate", "0.05", "--json")
    assert done.code == 0, done.err
    made = RunFolder.open(vit_run.with_name("greys-x2"))
    refinement = json.loads(done.out)
    assert refinement == json.loads((made.path / "refine.json").read_text())
    report, trained = refinement["report"], refinement["trained"]
    assert (report["horizon_before"], report["horizon_after"]) == (3, 6)
    assert refinement["carried"]
    assert trained["loss_after"] < report["loss_after"], (trained, report)
    assert made.model().config.num_hidden_layers == 6
    assert made.recipe.model == f"transformers:{made.path / 'start'}"
    shown = command("report", made.path)
    assert shown.code == 0, shown.err
