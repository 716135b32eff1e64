"""A run folder from somebody else that names code: no verb runs it unless it is trusted."""

import copy
import json
import pickle
import shutil
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import tomli_w
from cli_commands import Done, command, contents, npz

from deeplimit.errors import InputError
from deeplimit.records import to_plain
from deeplimit.training import Recipe, RunFolder, load_model, resume, train
from deeplimit.training.results import Plan
from deeplimit.training.run_folder import load_named
from deeplimit.training.specification import Named, sources
from deeplimit.training.verifying import verify_run

pytestmark = pytest.mark.slow

MODULE = """
import sys
from pathlib import Path

import torch
from torch import nn

Path(__file__).with_name("marker").touch()
print("the module runs", file=sys.stderr)

class Mlp(nn.Module):  # a mean of particles
    def __init__(self):
        super().__init__()
        self.fc1, self.activation_fn, self.fc2 = nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4)

    def forward(self, x):
        return self.fc2(self.activation_fn(self.fc1(x)))

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = Mlp()

    def forward(self, x):
        return x + self.mlp(x)

class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks, self.readout = nn.ModuleList(Block() for _ in range(3)), nn.Linear(4, 3)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.readout(x)

def build():
    return Network()
"""
SPEC = "runs.theirs.evil:build"
THEIRS = Path("runs") / "theirs"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a function that was typed: it goes through to profile, cut and page."""
    place = tmp_path_factory.mktemp("typed")
    (place / "typed_networks.py").write_text(MODULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(place)
        more = ["--epochs", "1", "--device", "cpu", "--runs", place, "--name", "run"]
        data = npz(place / "data.npz")
        done = command("train", data, "--model", "typed_networks:build", *more)
    assert done.code == 0, done.err
    assert (place / "run" / "report.html").is_file()
    return place / "run"


@pytest.fixture
def theirs(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder has it as runs/theirs, with a package whose modules leave a marker."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, THEIRS)
    recipe = THEIRS / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("typed_networks:build", SPEC))
    (THEIRS / "evil.py").write_text(MODULE)
    (THEIRS / "__init__.py").write_text(
        "from pathlib import Path\nPath(__file__).with_name('marker').touch()\n"
    )
    verify_run(THEIRS, accepting=True)  # who sends a run can write its run.json too
    cut = RunFolder.open(THEIRS).cut()
    assert cut is not None
    plan = Plan(cut.removed, "none", 0.0, 2.0, 1, 1e-3)
    (THEIRS / "heal").mkdir()
    (THEIRS / "heal" / "plan.json").write_text(json.dumps(to_plain(plan)))
    shutil.copytree(THEIRS, Path("runs") / "others")
    nested = Path("runs") / "others" / "recipe.toml"
    nested.write_text(nested.read_text().replace(SPEC, str(THEIRS)))
    verify_run(nested.parent, accepting=True)
    path = list(sys.path)
    yield THEIRS
    sys.path[:] = path
    for name in [name for name in sys.modules if name.partition(".")[0] == "runs"]:
        del sys.modules[name]
    monkeypatch.undo()


VERBS = {
    "crop": ["crop", THEIRS, "--to", "2"],
    "profile": ["profile", THEIRS],
    "heal": ["heal", THEIRS],
    "heal --resume": ["heal", THEIRS, "--resume"],
    "ode": ["ode", THEIRS],
    "gradient": ["gradient", THEIRS, "--steps", "1"],
    "refine": ["refine", THEIRS],
    "compare": ["compare", THEIRS, "runs/others"],
    "interpolate": ["interpolate", THEIRS, "runs/others"],
    "merge": ["merge", THEIRS, "runs/others"],
    "train --resume": ["train", "--resume", THEIRS],
    "train --recipe": ["train", "--recipe", THEIRS / "recipe.toml", "--runs", "runs"],
    "train --model": ["train", "npz:data.npz", "--model", THEIRS, "--epochs", "1"],
    "a run of a run": ["train", "--resume", "runs/others"],
}
LIKE_OTHERS = ("profile", "heal", "train --model")  # like crop and train --resume, to save time
NEVER = {  # what is said of a network of one's own class, once it could be read
    "refine": "cannot store another depth",
    "merge": "cannot store another width or depth",
}


def marks() -> list[Path]:
    return sorted(Path().rglob("marker"))


@pytest.mark.parametrize("verb", VERBS)
def test_code_in_a_received_folder_is_not_run(verb: str, theirs: Path) -> None:
    npz(Path("data.npz"))
    before = contents(Path())
    done = command(*VERBS[verb])
    assert (done.code, done.out) == (2, "")
    (line,) = done.err.splitlines()
    assert line.startswith(f"deeplimit: {theirs}/recipe.toml names code, {SPEC} (")
    assert f"{theirs.resolve()}/__init__.py, {theirs.resolve()}/evil.py)" in line
    assert "give --trust" in line
    assert marks() == []
    assert {k: v for k, v in contents(Path()).items() if not k.startswith("runs/.data")} == before


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in LIKE_OTHERS])
def test_trusted_it_is_run_and_its_files_are_told_first(verb: str, theirs: Path) -> None:
    npz(Path("data.npz"))
    done = command(*VERBS[verb], "--trust")
    told, ran, *_ = done.err.splitlines()
    assert told.startswith(f"deeplimit: running code that {theirs}/recipe.toml names, {SPEC}: ")
    assert told.endswith(f"{theirs.resolve()}/__init__.py, {theirs.resolve()}/evil.py")
    assert ran == "the module runs"
    assert marks() == [theirs / "marker"]
    if verb in NEVER:
        assert done.code == 2
        assert NEVER[verb] in done.err
    else:
        assert done.code == 0, done.err


def test_the_page_needs_no_code(theirs: Path) -> None:
    assert command("report", theirs).code == 0
    assert marks() == []


def test_a_function_typed_instead_is_run(theirs: Path) -> None:
    """--model beside --recipe: what is typed counts, not what the file names."""
    Path("own_typed_networks.py").write_text(MODULE)
    recipe = ["--recipe", theirs / "recipe.toml", "--runs", "runs"]
    done: Done = command("train", *recipe, "--model", "own_typed_networks:build")
    assert done.code == 0, done.err
    assert marks() == [Path("marker")]


def test_in_python_trust_is_an_argument(theirs: Path, tmp_path: Path) -> None:
    recipe = Recipe.from_toml(theirs / "recipe.toml")
    folder = RunFolder.open(theirs)
    for call in (
        folder.model,
        folder.cropped,
        lambda: load_model(str(theirs)),
        lambda: resume(theirs, quiet=True),
        lambda: train(recipe, runs=tmp_path / "made", quiet=True),
        lambda: train(replace(folder.recipe, epochs=2), runs=tmp_path / "made", quiet=True),
    ):
        with pytest.raises(InputError, match=r"names code, .*trust=True"):
            call()
    assert marks() == []
    assert not list(tmp_path.glob("made/[!.]*"))
    model = RunFolder.open(theirs, trust=True).model()
    assert len(model.blocks) == 3
    assert marks() == [theirs / "marker"]
    again = train(
        Recipe.from_toml(theirs / "recipe.toml", trust=True), runs=tmp_path / "made", quiet=True
    )
    assert len(again.model().blocks) == 3


def test_files_are_found_without_being_run(theirs: Path) -> None:
    here = theirs.resolve()
    assert sources("runs.theirs.evil") == [f"{here}/__init__.py", f"{here}/evil.py"]
    assert sources("runs.theirs.nothing") == [f"{here}/__init__.py"]
    assert sources("no_such_module.at.all") == []
    assert sources("json.decoder")[1] == json.decoder.__file__
    assert marks() == []
    assert str(Path.cwd()) not in sys.path


def test_the_mark_goes_with_a_recipe_wherever_it_goes(theirs: Path, tmp_path: Path) -> None:
    recipe = Recipe.from_toml(theirs / "recipe.toml")
    again = tmp_path / "again.toml"
    again.write_text(recipe.with_absolute_paths().to_toml())
    ways = {
        "copied": copy.deepcopy(copy.copy(recipe)),
        "pickled": pickle.loads(pickle.dumps(recipe)),
        "changed": replace(recipe, seed=3),
        "with_absolute_paths": recipe.with_absolute_paths(),
        "written": Recipe.from_toml(again),
        "a run of a run": Recipe.from_toml("runs/others/recipe.toml").with_absolute_paths(),
    }
    for way, other in ways.items():
        assert isinstance(other.model, Named), way
        with pytest.raises(InputError, match=r"names code, .* which is not run unasked"):
            load_named(other.model)
    assert Recipe.from_toml("runs/others/recipe.toml").with_absolute_paths().model.file is not None
    assert marks() == []


def test_a_text_made_of_a_marked_one_is_not_trusted(theirs: Path) -> None:
    """What lost its mark, by whatever way, is not what the user typed."""
    marked = Recipe.from_toml(theirs / "recipe.toml").model
    assert marked is not None
    for text in (
        str(marked),
        f"{marked}",
        marked[:],
        marked.strip(),
        ":".join(marked.split(":")),
        json.loads(json.dumps(marked)),
        tomllib.loads(tomli_w.dumps({"model": marked}))["model"],
    ):
        assert text == SPEC
        with pytest.raises(InputError, match=r"something unknown names code, .*not run unasked"):
            load_named(text)
    assert marks() == []
