"""Wrong input: exit code 2, one line that names what was given and what to do, nothing written."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_commands import command, contents, idx_set, npz

Line = Callable[[Path], list[str | Path]]


THIN = ("--width", "1", "--hidden", "1", "--depth", "200000")
SIZES = ("8", "16", "32", "400000000")


@dataclass(frozen=True)
class Wrong:
    """A command line that is wrong.

    Attributes:
        args: the command line, made in an empty folder.
        says: what the line must contain: the value given and the remedy.
    """

    args: Line
    says: tuple[str, ...]


def train(*args: str) -> Line:
    return lambda here: ["train", *args, "--runs", here / "runs"]


def vectors(**arrays: np.ndarray) -> Line:
    return lambda here: ["train", npz(here / "set.npz", **arrays), "--runs", here / "runs"]


def images(change: Callable[[Path], None], **sets: np.ndarray) -> Line:
    def args(here: Path) -> list[str | Path]:
        folder = idx_set(here / "data" / "glyphs", **{"labels": np.arange(60) % 3, **sets})
        change(folder)
        return ["train", "glyphs", "--data-dir", here / "data", "--runs", here / "runs"]

    return args


def cut_gzip(folder: Path) -> None:
    path = folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-500])


def wrong_magic(folder: Path) -> None:
    (folder / "train-images-idx3-ubyte.gz").unlink()
    (folder / "train-images-idx3-ubyte").write_bytes(b"PNG!" + bytes(100))


def swap(folder: Path) -> None:
    labels, pixels = (folder / f"train-{part}-ubyte.gz" for part in ("labels-idx1", "images-idx3"))
    labels.rename(folder / "aside")
    pixels.rename(labels)
    (folder / "aside").rename(pixels)


def file_in(here: Path, name: str, text: str) -> Path:
    path = here / name
    path.write_text(text)
    return path


def link(path: Path, target: Path) -> Path:
    path.symlink_to(target)
    return path


def recipe(text: str) -> Line:
    return lambda here: [
        "train",
        "--recipe",
        file_in(here, "r.toml", text),
        "--runs",
        here / "runs",
    ]


def nothing(folder: Path) -> None:
    """Leaves the files as they are."""


NAN = np.zeros((60, 4), np.float32)
NAN[7, 2] = np.nan

WRONG: dict[str, Wrong] = {
    # data that are not there or not what they should be
    "unknown data set": Wrong(train("digitz"), ("'digitz'", "did you mean digits?", "spirals")),
    "no data folder given": Wrong(train("mnist"), ("'mnist'", "--data-dir", "DEEPLIMIT_DATA")),
    "data folder missing": Wrong(
        train("mnist", "--data-dir", "/no/such/place"), ("/no/such/place", "--data-dir")
    ),
    "set missing in the data folder": Wrong(
        lambda here: ["train", "mnist", "--data-dir", here], ("mnist", "no folder", "put")
    ),
    "gzip cut": Wrong(images(cut_gzip), ("train-images-idx3-ubyte.gz", "cut", "fetch it again")),
    "wrong magic": Wrong(images(wrong_magic), ("504e4721", "00000803", "fetch")),
    "images and labels swapped": Wrong(images(swap), ("train-images", "swapped")),
    "IDX label out of range": Wrong(
        images(nothing, test_labels=np.array([0, 1, 2, 9])), ("label 9", "0, 1, 2", "correct")
    ),
    "no npz file": Wrong(train("npz:/no/such.npz"), ("/no/such.npz", "check the path")),
    "npz that is none": Wrong(
        lambda here: ["train", f"npz:{file_in(here, 'a.npz', 'hello')}"], ("a.npz", "numpy.savez")
    ),
    "npz without x": Wrong(
        lambda here: (np.savez(here / "a.npz", z=NAN, y=NAN), ["train", f"npz:{here}/a.npz"])[1],
        ("no array 'x'", "'z'", "numpy.savez"),
    ),
    "one class only": Wrong(
        vectors(y=np.zeros(60, np.int64)), ("only one class (0)", "at least 2")
    ),
    "NaN features": Wrong(vectors(x=NAN), ("x[7, 2] is nan", "replace")),
    "negative label": Wrong(vectors(y=np.arange(60) % 3 - 1), ("label -1", "number", "from 0")),
    "labels that are no numbers of classes": Wrong(
        vectors(y=np.linspace(0, 1, 60)), ("float64", "integers")
    ),
    "no samples": Wrong(
        vectors(x=np.zeros((0, 4)), y=np.zeros(0, np.int64)), ("no samples", "give")
    ),
    "a class too small to split": Wrong(
        vectors(y=np.r_[np.arange(58) % 2, 2, 2]), ("class 2 has 2 samples", "at least 5")
    ),
    "x and y of different length": Wrong(vectors(y=np.arange(50) % 3), ("60", "50")),
    # recipes
    "depth 0": Wrong(train("--depth", "0"), ("depth is 0", "at least 1")),
    "two stages of a vector network": Wrong(train("--depth", "2", "3"), ("2 3", "one stage")),
    "negative stage cost": Wrong(train("--stage-cost", "-0.1"), ("stage_cost is -0.1", "≥ 0")),
    "negative control cost": Wrong(train("--control-cost", "-2"), ("control_cost is -2", "≥ 0")),
    "negative weight decay": Wrong(train("--weight-decay", "-1"), ("weight_decay is -1", "≥ 0")),
    "softness of 1 − 1/C": Wrong(train("--softness", "0.9"), ("0.9", "10 classes")),
    "softness above 1": Wrong(train("--softness", "1.5"), ("1.5", "0.05")),
    "no epochs": Wrong(train("--epochs", "0"), ("epochs is 0", "at least 1")),
    "learning rate 0": Wrong(train("--learning-rate", "0"), ("learning_rate is 0", "above 0")),
    "learning rate NaN": Wrong(train("--learning-rate", "nan"), ("nan", "above 0")),
    "step of the wrong sign": Wrong(train("--step", "-1"), ("step is -1", "above 0")),
    "seed below 0": Wrong(train("--seed", "-1"), ("seed is -1", "from 0")),
    "stem of no power of 2": Wrong(train("--reduction", "3"), ("reduction is 3", "power of 2")),
    "batch smaller than devices": Wrong(
        train("--batch-size", "1", "--devices", "2"), ("batch_size is 1", "2 devices", "multiple")
    ),
    "convolutions on vectors": Wrong(
        lambda here: ["train", npz(here / "a.npz"), "--kind", "convolutional"],
        ("convolutional", "(4,)", "vector"),
    ),
    "cifar-resnet with one stage": Wrong(train("--kind", "cifar-resnet"), ("20", "three stages")),
    "name that is a path": Wrong(train("--name", "a/b"), ("'a/b'", "plain one")),
    "recipe missing": Wrong(lambda here: ["train", "--recipe", here / "no.toml"], ("no.toml",)),
    "recipe damaged": Wrong(recipe("format = ["), ("r.toml", "damaged", "replace")),
    "recipe of another version": Wrong(recipe("format = 99"), ("99", "another version")),
    "recipe with an unknown field": Wrong(
        recipe("format = 1\n[recipe]\ndpeth = [3]\n"), ("r.toml", "dpeth", "did you mean depth")
    ),
    "recipe and data set": Wrong(
        lambda here: ["train", "digits", "--recipe", here / "r.toml"],
        ("'digits'", "r.toml", "leave one of them out"),
    ),
    "a network larger than memory": Wrong(
        lambda here: ["train", "--width", "1000000", "--hidden", "1000000", "--runs", here / "r"],
        ("width 1000000, hidden 1000000", "does not fit into memory", "smaller"),
    ),
    "a network deeper than memory": Wrong(
        train("--depth", "100000000"),
        ("100000000 layers does not fit into memory", "TB of memory needed", "smaller"),
    ),
    "a network wider than numbers": Wrong(
        train("--width", "1" + 30 * "0"), ("does not fit into any memory", "smaller")
    ),
    **{
        f"{name} beyond 32 bits": Wrong(
            train(f"--{name.replace('_', '-')}", "1e300"),
            (f"{name} is 1e+300", "at most 1e+18", "smaller"),
        )
        for name in ("stage_cost", "control_cost", "weight_decay", "learning_rate", "step")
    },
    "name of bytes that are no characters": Wrong(
        train("--name", "a\udcff"), ("'a\\udcff'", "not in UTF-8", "another name")
    ),
    "name with a control character": Wrong(
        train("--name", "a\x1b[31mb"), (r"'a\x1b[31mb'", "plain one")
    ),
    **{
        f"name {name!r}": Wrong(train("--name", name), (f"{name!r}", "plain"))
        for name in ("", "..")
    },
    "name that is too long": Wrong(
        train("--name", "é" * 101), ("202 bytes", "at most 200", "shorter")
    ),
    "runs that are a link to nowhere": Wrong(
        lambda here: ["train", "--runs", link(here / "link", here / "gone")],
        ("link is a link to", "gone, which is not there", "make that folder"),
    ),
    "a seed that no generator takes": Wrong(
        lambda here: ["ode", "transformers:vit", "--seed", "99999999999999999999999"],
        ("seed is 99999999999999999999999", "from 0 to 2147483647"),
    ),
    # places
    "runs below a file": Wrong(
        lambda here: ["train", "--runs", file_in(here, "file", "") / "runs"],
        ("file/runs", "another folder"),
    ),
    "runs in a file": Wrong(
        lambda here: ["train", "--runs", file_in(here, "file", "")], ("file", "another folder")
    ),
    "runs where nobody may write": Wrong(
        lambda here: ["train", "--runs", "/proc/deeplimit"], ("/proc/deeplimit", "another folder")
    ),
    # studies
    "study without seeds": Wrong(
        lambda here: ["study", "horizon", "--seeds", "--runs", here], ("(none)", "at least one")
    ),
    "study with a seed twice": Wrong(
        lambda here: ["study", "horizon", "--seeds", "1", "1"], ("1 1", "each once")
    ),
    "study of negative radius": Wrong(
        lambda here: ["study", "horizon", "--radius", "-1"], ("-1", "≥ 0")
    ),
    "study that does not fit": Wrong(
        lambda here: ["study", "horizon", "--depth", "400000000", "--runs", here / "runs"],
        ("1600000000 layers does not fit into memory",),
    ),
    "linear networks that do not fit": Wrong(
        lambda here: ["study", "linear", "--depths", "8", "40000000000", "--runs", here / "runs"],
        ("networks of 40000000000 layers do not fit into memory",),
    ),
    "smooth networks that do not fit": Wrong(
        lambda here: ["study", "smooth", "--depths", "8", "40000000000", "--runs", here / "runs"],
        ("networks of 40000000000 layers do not fit into memory",),
    ),
    "a smooth start that does not fit": Wrong(
        lambda here: ["study", "smooth", "--depths", "8", "200000", "--runs", here / "runs"],
        ("a smooth start in 200000 layers does not fit into memory: 1.3 TB",),
    ),
    "a run with a smooth start that does not fit": Wrong(
        lambda here: ["train", *THIN, "--initialisation", "smooth", "--runs", here / "runs"],
        ("a smooth start in 200000 layers does not fit into memory: 1.3 TB",),
    ),
    "convergence that does not fit": Wrong(
        lambda here: ["study", "convergence", "--depth", "400000000", "--runs", here / "runs"],
        ("networks of 400000000 layers do not fit into memory",),
    ),
    "consistency that does not fit": Wrong(
        lambda here: ["study", "consistency", "--depths", *SIZES, "--runs", here / "runs"],
        ("networks of 400000000 layers do not fit into memory",),
    ),
    "study at depth 0": Wrong(lambda here: ["study", "horizon", "--depth", "0"], ("depth is 0",)),
    "study of unknown data": Wrong(
        lambda here: ["study", "horizon", "--data", "digit", "--runs", here / "runs"],
        ("'digit'", "did you mean digits?"),
    ),
    "study of falling depths": Wrong(
        lambda here: ["study", "linear", "--depths", "16", "8"], ("16 8", "smallest to the largest")
    ),
    "study of no learning": Wrong(
        lambda here: ["study", "linear", "--learning-rate", "0"], ("learning rate is 0", "above 0")
    ),
    "study of no curve": Wrong(
        lambda here: ["study", "smooth", "--depths", "16", "24"], ("16 24", "divide the largest")
    ),
    "study of an unknown activation": Wrong(
        lambda here: ["study", "smooth", "--activations", "tahn"], ("'tahn'", "tanh")
    ),
    "study of no length": Wrong(
        lambda here: ["study", "smooth", "--length-scale", "0"], ("length scale is 0", "above 0")
    ),
    "study in a file": Wrong(
        lambda here: ["study", "linear", "--runs", file_in(here, "file", "")],
        ("file", "another folder"),
    ),
    "demo below a file": Wrong(
        lambda here: ["demo", "--runs", file_in(here, "file", "")], ("file", "another folder")
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WRONG)
def test_wrong_input(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DEEPLIMIT_DATA", raising=False)
    args = WRONG[name].args(tmp_path)
    before = contents(tmp_path)
    done = command(*args)
    assert done.code == 2
    assert done.out == ""
    (line,) = done.err.splitlines()
    assert line.startswith("deeplimit: ")
    for said in WRONG[name].says:
        assert said in line
    assert contents(tmp_path) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_where_there_is_none(tmp_path: Path) -> None:
    done = command("train", "--device", "cuda", "--runs", tmp_path / "runs")
    assert done.code == 2
    (line,) = done.err.splitlines()
    assert "cuda" in line
    assert "cpu or auto" in line
    assert contents(tmp_path) == {}


def test_a_hub_set_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = pytest.importorskip("datasets", reason="the extra `hub` is not installed").config
    monkeypatch.setattr(config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "downloads")
    done = command("train", "hub:no-such-owner/no-such-set", "--runs", tmp_path / "runs")
    assert done.code == 2
    line = done.err.splitlines()[-1]
    assert line.startswith("deeplimit: data set 'hub:no-such-owner/no-such-set'")
    assert "hub:PATH" in line
    assert not (tmp_path / "runs").exists()
