"""What one verb writes appears together, wherever it is killed; run.json vouches for it."""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch
from torch import nn
from training_runs import SMALL

from deeplimit.control import CropResult
from deeplimit.errors import InputError
from deeplimit.files import new_folder, whole, write_text
from deeplimit.network import Architecture
from deeplimit.training import Cut, Recipe, RunFolder, crop_run, profile_run, run_files, train
from deeplimit.training.checkpoint import Checkpoint, save_checkpoint
from deeplimit.training.results import Refinement
from deeplimit.training.run_files import RunFiles
from deeplimit.training.run_folder import write_metrics
from deeplimit.training.verifying import verify_run

TOUCHES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod"}
VIT = {"hidden_size": 8, "intermediate_size": 8, "image_size": 8, "patch_size": 4}


def own(depth: int) -> nn.Module:
    torch.manual_seed(depth)
    return Architecture("vector", (64,), 10, depths=(depth,), width=4, hidden=4).build()


def vit(depth: int) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(depth)
    config = transformers.ViTConfig(num_hidden_layers=depth, num_attention_heads=2, **VIT)
    return transformers.ViTForImageClassification(config)


def contents(folder: Path) -> dict[str, bytes]:
    """Of the files in a run folder but for the checkpoints."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in files
        if path.parent.name != "checkpoint"
    }


def depth_of(model: nn.Module) -> int:
    if hasattr(model, "config"):
        return model.config.num_hidden_layers  # type: ignore[union-attr,return-value]
    return sum(model.architecture.depths)  # type: ignore[union-attr,arg-type]


def report(before: int, after: int) -> CropResult:
    return CropResult(
        3, before, after, 1.0, 1.0, 0.0, 0.4, 0.5, 1.0, 20, 10, 200, 100, 2e-3, 1e-3, 3, "cpu"
    )


def cut_to(folder: RunFolder, build: Callable[[int], nn.Module], depth: int) -> None:
    """As `deeplimit crop RUN --to DEPTH` writes: a network, its figures, a page."""
    with folder.commit() as new:
        new.write_cropped(build(depth))
        new.write(Cut(tuple(range(depth, 4)), None, report(4, depth)))
        write_text(new.files.place("report.html"), f"{depth} layers")


def write_everything(folder: RunFolder, depth: int) -> None:
    """Files, a folder of files, one fewer the second time, and a folder that goes; no networks."""
    with folder.commit() as new:
        with whole(new.files.place("cropped"), folder=True) as aside:
            for name in ("config.json", "a.safetensors", "b.safetensors")[: depth + 1]:
                (aside / name).write_text(f"{depth} layers")
        new.write(Cut(tuple(range(depth, 4)), None, report(4, depth)))
        write_text(new.files.place("report.html"), f"{depth} layers")
        if depth == 1:
            new.files.drop("heal")


def seen(folder: RunFolder) -> set[int]:
    """The depths that the files tell of."""
    cut, depths = folder.cut(), set()
    assert cut is not None
    for name in ("cropped", "report.html"):
        found = folder.files.find(name)
        assert found is not None
        assert found.state == "sound"
        files = [found.path] if found.path.is_file() else [*found.path.iterdir()]
        depths |= {int(file.read_text().split()[0]) for file in files}
    return depths | {cut.report.horizon_after}


def killed_at(step: int, folder: Path, work: Callable[[], object]) -> bool:
    """Forks, works, and kills at the step-th time that something below the folder is touched.

    Returns:
        Whether it came to that; else the work was done before.
    """
    sys.stdout.flush()
    child = os.fork()
    if child:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, -9), status
        return status == -9
    left = step

    def hook(event: str, args: tuple[object, ...]) -> None:
        nonlocal left
        if event in TOUCHES and str(folder) in f"{args[0]}{args[1] if len(args) > 1 else ''}":
            left -= 1
            if left == 0:
                os.kill(os.getpid(), 9)

    try:
        sys.addaudithook(hook)
        work()
        os._exit(0)
    finally:  # whatever happens, no test goes on in the child
        os._exit(1)


@pytest.mark.slow
def test_killed_anywhere_all_that_is_old_is_seen_or_all_that_is_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_files, "PAUSES", (0.0,))  # nobody else is at it
    start = RunFolder.create(tmp_path, "start", Recipe())
    write_everything(start, 2)
    (start.path / "heal").mkdir()
    outcomes = []
    for step in count(1):
        path = Path(shutil.copytree(start.path, tmp_path / f"killed-{step}"))
        folder = replace(start, path=path)
        if not killed_at(step, path, lambda folder=folder: write_everything(folder, 1)):
            break
        (depth,) = seen(folder)
        outcomes.append(depth == 1)
        assert not verify_run(path).wrong
        with folder.commit():  # whoever writes next finishes it, or drops it
            pass
        assert seen(folder) == {depth}
        assert (path / "heal").exists() == (depth == 2)
        names = ["a.safetensors", "b.safetensors", "config.json"]
        assert sorted(p.name for p in (path / "cropped").iterdir()) == names[:: 3 - depth]
        assert not list(path.rglob(".*"))
    assert seen(folder) == {1}
    assert len(outcomes) > 40
    assert outcomes == sorted(outcomes)  # there is one moment from which on it counts
    assert set(outcomes) == {False, True}


@pytest.mark.slow
def test_killed_while_a_run_is_made_nothing_is_in_the_way(tmp_path: Path) -> None:
    """As refine and merge make one: a start, a checkpoint, figures, the recipe."""
    model = own(4)
    refinement = Refinement("a", 2, report(2, 4), 1, 1e-3, carried=True)

    def fill(folder: RunFolder, path: Path) -> None:
        save_checkpoint(folder.path, Checkpoint({}, {}, {}, 0, []))
        folder.write(refinement)

    def make() -> RunFolder:
        recipe = Recipe(depth=(4,), width=4, hidden=4)
        return RunFolder.create_from(tmp_path / "runs", "a", recipe, model, 1, ("x",), fill)

    made = []
    for step in count(1):
        if not killed_at(step, tmp_path / "runs", make):
            break
        visible = [path for path in (tmp_path / "runs").glob("*") if path.name[0] != "."]
        made.append(bool(visible))
        for path in visible:
            folder = RunFolder.open(path)
            assert folder.refinement() == refinement
            assert folder.recipe.start == path / "start.safetensors"
            assert (path / "checkpoint" / "latest").exists()
            assert not verify_run(path).wrong
            shutil.rmtree(path)
        assert new_folder(tmp_path / "runs", "a", lambda folder, path: None).name == "a"
        assert [path.name for path in (tmp_path / "runs").iterdir()] == ["a"]
        shutil.rmtree(tmp_path / "runs")
    assert len(made) > 40
    assert made == sorted(made)
    assert not made[0]


def test_what_fails_leaves_the_run_as_it_was(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "run", Recipe())
    cut_to(folder, own, 3)
    before = contents(folder.path)

    def fail() -> None:
        with folder.commit() as new:
            new.write_cropped(own(2))
            assert depth_of(new.cropped()) == 2  # who writes sees it
            assert depth_of(folder.cropped()) == 3
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert contents(folder.path) == before


def test_commits_within_a_commit_are_one(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "run", Recipe())
    with folder.commit() as outer:
        cut_to(outer, own, 3)
        with outer.commit() as inner:
            inner.write_healed(own(3))
        assert folder.cut() is None
        assert not (folder.path / "healed.safetensors").exists()
    assert depth_of(folder.healed()) == 3
    assert folder.cut() is not None


def flipped(path: Path, at: int) -> None:
    """The highest bit of a number's exponent is another."""
    whole = bytearray(path.read_bytes())
    whole[at] ^= 0x40
    path.write_bytes(whole)


@pytest.mark.parametrize("build", [own, vit])
def test_a_flipped_bit_is_refused_with_the_remedy(
    build: Callable[[int], nn.Module], tmp_path: Path
) -> None:
    folder = RunFolder.create(tmp_path, "run", Recipe())
    cut_to(folder, build, 3)
    weights = next(folder.path.rglob("*.safetensors"))
    flipped(weights, -1)
    with pytest.raises(InputError, match=r"vouches for; make the cut again: deeplimit crop"):
        folder.cropped()
    (wrong,) = verify_run(folder.path).wrong
    assert (wrong.name, wrong.state) == (weights.relative_to(folder.path).as_posix(), "changed")
    weights.unlink()
    if build is vit:  # the folder is there, but not whole
        with pytest.raises(InputError, match="make the cut again"):
            folder.cropped()
    (wrong,) = verify_run(folder.path).wrong
    assert (wrong.name, wrong.state) == (weights.relative_to(folder.path).as_posix(), "missing")
    cut_to(folder, build, 2)
    assert depth_of(folder.cropped()) == 2
    assert not verify_run(folder.path).wrong


def test_a_result_or_recipe_of_another_time_is_refused(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "run", Recipe())
    cut_to(folder, own, 3)
    other = json.loads((folder.path / "crop.json").read_text()) | {"removed": [3, 2]}
    (folder.path / "crop.json").write_text(json.dumps(other))
    with pytest.raises(
        InputError, match=r"crop\.json.*write it again: deeplimit crop .* --to auto"
    ):
        folder.cut()
    (folder.path / "profile.json").write_text("{}")  # put there by somebody
    assert {f.name: f.state for f in verify_run(folder.path).wrong} == {
        "crop.json": "changed",
        "profile.json": "unknown",
    }
    recipe = folder.path / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("seed = 0", "seed = 1"))
    with pytest.raises(InputError, match=r"recipe\.toml.*deeplimit verify .* --accept"):
        RunFolder.open(folder.path)
    (folder.path / "profile.json").unlink()
    assert not verify_run(folder.path, accepting=True).wrong
    assert RunFolder.open(folder.path).recipe.seed == 1
    found = folder.cut()
    assert found is not None
    assert found.removed == (3, 2)


def test_without_run_json_nothing_is_read_until_it_is_accepted(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "run", Recipe())
    cut_to(folder, own, 3)
    (folder.path / "notes.txt").write_text("{")
    (folder.path / "run.json").unlink()
    for read in (folder.cut, folder.cropped):
        with pytest.raises(InputError, match=r"run\.json is lost; .*deeplimit verify .* --accept"):
            read()
    assert {f.state for f in verify_run(folder.path).files} == {"unknown"}
    assert "notes.txt" not in {f.name for f in verify_run(folder.path).wrong}
    assert not verify_run(folder.path, accepting=True).wrong
    assert depth_of(folder.cropped()) == 3
    (folder.path / "heal.json").write_text("{}")  # put there by somebody, later
    (wrong,) = verify_run(folder.path).wrong
    assert (wrong.name, wrong.state) == ("heal.json", "unknown")


def test_metrics_grow_and_are_vouched_for_at_the_end(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "run", Recipe())

    def state() -> str | None:
        files = {file.name: file.state for file in verify_run(folder.path).files}
        assert {file.name for file in verify_run(folder.path).wrong} <= {"metrics.csv"}
        return files.get("metrics.csv")

    rows = [{"epoch": 1.0, "loss": 0.5}, {"epoch": 2.0, "loss": 0.25}]
    assert state() is None
    write_metrics(folder.path, rows[:1])
    assert state() == "growing"
    assert [row["loss"] for row in folder.metrics()] == [0.5]
    folder.write_metrics(rows)
    assert state() == "sound"
    write_metrics(folder.path, rows[:1])  # the checkpoints were deleted: it starts again
    assert state() == "growing"
    assert [row["loss"] for row in folder.metrics()] == [0.5]
    assert not verify_run(folder.path, accepting=True).wrong
    assert state() == "sound"
    write_metrics(folder.path, rows)
    assert state() == "growing"
    folder.write_metrics(rows)
    verify_run(folder.path, accepting=True)
    path = folder.path / "metrics.csv"
    path.write_text(path.read_text().replace("0.25", "0.15"))
    assert state() == "changed"
    with pytest.raises(InputError, match=r"metrics\.csv.*delete it"):
        folder.metrics()


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"format": 1}', '{"format": 2, "files": {}}', '{"format": 1, "files": {"a": 1}}']
    + [f'{{"format": 1, "files": {{"{n}": {{"size": 1, "sha256": ""}}}}}}' for n in ("../a", "/a")],
)
def test_a_damaged_run_json_is_named(text: str, tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "run", Recipe())
    (folder.path / "run.json").write_text(text)
    with pytest.raises(InputError, match=r"run\.json: damaged.*--accept"):
        RunFolder.open(folder.path)
    assert not verify_run(folder.path, accepting=True).wrong
    assert RunFolder.open(folder.path) == folder


def test_damaged_checkpoints_are_told(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "run", Recipe())
    for epochs in (1, 2):
        rows = [{"epoch": n + 1.0} for n in range(epochs)]
        save_checkpoint(folder.path, Checkpoint({"w": torch.ones(64)}, {}, {}, 0, rows))
    assert not verify_run(folder.path).wrong
    flipped(folder.path / "checkpoint" / "epoch-00002.pt", 900)
    (wrong,) = verify_run(folder.path).wrong
    assert wrong.name == "checkpoint/epoch-00002.pt"
    assert "checksum" in wrong.remedy
    assert "goes on from the one before" in wrong.remedy


@pytest.mark.slow
def test_a_reader_beside_a_writer_sees_whole_commits(tmp_path: Path) -> None:
    """A process that cuts to and fro, and this one that looks all the time."""
    folder = RunFolder.create(tmp_path, "run", Recipe())
    cut_to(folder, own, 3)
    child = os.fork()
    if not child:
        try:
            for k in range(60):
                cut_to(folder, own, 2 + k % 2)
                time.sleep(0.004 * (k % 7))  # unevenly: a reader that waits may see every second
            os._exit(0)
        finally:
            os._exit(1)
    looks = set()
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        results = folder.results()
        assert results.cut is not None
        looks.add(results.cut.report.horizon_after)
    assert looks == {2, 3}


def test_names_stay_in_the_run_folder(tmp_path: Path) -> None:
    """The documented names, and nothing beside them."""
    folder = RunFolder.create(tmp_path, "run", Recipe())
    cut_to(folder, own, 3)
    expected = {"recipe.toml", "run.json", "cropped.safetensors", "crop.json", "report.html"}
    assert {path.name for path in folder.path.iterdir()} == expected
    manifest = json.loads((folder.path / "run.json").read_text())
    assert set(manifest["files"]) == expected - {"run.json"}
    assert RunFiles(folder.path).find("nothing") is None


@pytest.mark.slow
def test_the_same_recipe_gives_the_same_files(tmp_path: Path) -> None:
    """All but those that say how long something took."""
    runs = [train(SMALL, runs=tmp_path, name=name, quiet=True) for name in ("a", "b")]
    for run in runs:
        profile_run(run)
        crop_run(run, 2)
    first, second = (contents(run.path) for run in runs)
    assert first.keys() == second.keys()
    timed = {"metrics.csv", "crop.json", "profile.json", "run.json"}
    assert {name for name in first if first[name] != second[name]} == timed
    one, other = (run.profiles() for run in runs)
    assert one is not None
    assert other is not None
    times = {"latency": other.test.costs.latency}
    assert replace(one.test.costs, **times) == other.test.costs
    assert one.validation == other.validation
