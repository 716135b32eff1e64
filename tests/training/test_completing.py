"""What follows a training: the control of a cut, whole or stopped, and where there is none."""

import contextlib
import io
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock, Timeout
from training_runs import checkpoint_of, same_but_for_seconds

from deeplimit import verbs
from deeplimit.control import verifying
from deeplimit.data import iter_batches
from deeplimit.errors import InputError, RunError, several
from deeplimit.training import (
    Recipe,
    RunFolder,
    analysis,
    complete,
    crop_run,
    resume,
    run_data,
    train,
)
from deeplimit.training.loop import Training
from deeplimit.training.run_files import LOCK

pytestmark = pytest.mark.slow

RECIPE = Recipe(  # cut to 3 layers
    depth=(4,),
    hidden=16,
    stage_cost=1.0,
    epochs=3,
    learning_rate=1e-2,
    device="cpu",
    control="plain",
    points=5.0,
)
PLAIN = "runs-without-stage-cost"


@pytest.fixture(scope="module", autouse=True)
def untimed() -> Iterator[None]:
    """Latencies depend on the machine, and take longer than these trainings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verifying, "latencies", lambda *_: (1.0, 1.0))
        yield


@pytest.fixture(scope="module")
def told() -> io.StringIO:
    """What the whole run says on stderr."""
    return io.StringIO()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, told: io.StringIO) -> RunFolder:
    folder = train(RECIPE, runs=tmp_path_factory.mktemp("whole"), name="runs", quiet=True)
    with contextlib.redirect_stderr(told):
        complete(folder)
    return folder


def small_run(folder: RunFolder) -> RunFolder:
    cut = folder.cut()
    assert cut is not None
    return RunFolder.open(folder.path.with_name(f"runs-plain-{cut.report.horizon_after}"))


def test_the_cut_is_compared_with_a_network_of_its_depth_sample_by_sample(
    whole: RunFolder,
) -> None:
    reference, test = whole.reference(), run_data(whole).test
    assert reference is not None
    assert reference.small is not None
    x, y = next(iter(iter_batches(test, len(test))))
    with torch.no_grad():
        cut, small = (m(x).argmax(1) == y for m in (whole.cropped(), small_run(whole).model()))
    difference = cut.double() - small.double()
    report = reference.small
    assert report.samples == len(y)
    assert report.accuracy_after == pytest.approx(cut.double().mean().item())
    assert report.accuracy_before == pytest.approx(small.double().mean().item())
    error = difference.std(correction=0).item() / len(y) ** 0.5
    assert error > 0
    assert report.accuracy_error == pytest.approx(error)
    cropped: Any = whole.cropped()
    fresh: Any = small_run(whole).model()
    assert cropped.architecture == fresh.architecture


@pytest.mark.parametrize("stopped_at", [4, 8])
def test_stopped_in_its_control_a_run_goes_on_to_the_same_result(
    stopped_at: int, whole: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first control's first epoch, and in the second control's second."""
    begun = 0
    run_epoch = Training.run_epoch

    def stopping(training: Training, *args: Any) -> None:
        nonlocal begun
        begun += 1
        if begun == stopped_at:
            raise KeyboardInterrupt
        run_epoch(training, *args)

    monkeypatch.setattr(Training, "run_epoch", stopping)
    folder = train(RECIPE, runs=tmp_path, name="runs", quiet=True)
    with pytest.raises(KeyboardInterrupt, match=f"deeplimit train --resume {folder.path} goes on"):
        complete(folder, quiet=True)
    assert folder.cut() is not None
    assert folder.reference() is None
    complete(resume(folder.path, quiet=True), quiet=True)
    assert begun == 10  # the epoch that was stopped begins twice, no other one does
    assert folder.reference() == whole.reference()
    for name in (PLAIN, small_run(whole).path.name):
        again = checkpoint_of(folder.path.with_name(name))
        assert same_but_for_seconds(again, checkpoint_of(whole.path.with_name(name)))
    complete(folder, quiet=True)  # nothing is left to do
    assert begun == 10
    assert len(list(tmp_path.glob("runs*"))) == 3


def test_a_control_of_a_run_that_is_gone_is_left_alone(whole: RunFolder, tmp_path: Path) -> None:
    """Its recipe is the same, its data may have been others."""
    older = train(replace(RECIPE, stage_cost=0.0, control="none"), runs=tmp_path, name=PLAIN)
    files = {path: path.read_bytes() for path in older.path.rglob("*") if path.is_file()}
    folder = train(RECIPE, runs=tmp_path, name="runs", quiet=True)
    complete(folder, quiet=True)
    assert (tmp_path / f"{PLAIN}-2").is_dir()
    assert files == {path: path.read_bytes() for path in older.path.rglob("*") if path.is_file()}
    assert folder.reference() == whole.reference()


def test_another_cut_gets_a_control_of_its_own(
    whole: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained is the network of its depth alone; the one of full depth is there."""
    for path in whole.path.parent.glob("runs*"):
        shutil.copytree(path, tmp_path / path.name)
    folder = RunFolder.open(tmp_path / "runs")
    before = folder.reference()
    assert before is not None
    assert len(crop_run(folder, 2).removed) == 2 != len(before.removed or ())
    trained = []
    run_epoch = Training.run_epoch

    def counting(training: Training, *args: Any) -> None:
        trained.append(training.recipe.horizon)
        run_epoch(training, *args)

    monkeypatch.setattr(Training, "run_epoch", counting)
    complete(folder, quiet=True)
    reference = folder.reference()
    assert reference is not None
    assert reference.small is not None
    assert reference.removed == (2, 3)
    assert reference.small.horizon_before == 2
    assert reference.report.horizon_after == 2
    assert reference.test == before.test
    complete(folder, quiet=True)
    assert trained == [2] * RECIPE.epochs


def test_each_training_of_the_control_is_announced(whole: RunFolder, told: io.StringIO) -> None:
    lines = [line for line in told.getvalue().splitlines() if not line.startswith("epoch")]
    small, runs = small_run(whole).path, whole.path.parent
    layers = several(int(small.name.removeprefix("runs-plain-")), "layer")
    assert lines == [
        f"Control: the same network without stage cost, 4 layers ({runs / PLAIN}), 3 epochs",
        f"Control: a network of the cut's depth without stage cost, {layers} ({small}), 3 epochs",
    ]


def test_a_control_that_fails_says_that_the_run_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = train(RECIPE, runs=tmp_path, name="runs", quiet=True)

    def fails(*_: Any) -> None:
        raise RunError("the loss is not finite")

    monkeypatch.setattr(Training, "run_epoch", fails)
    with pytest.raises(RunError, match=f"{PLAIN}: the loss .*; of the run itself deeplimit report"):
        complete(folder, quiet=True)
    assert folder.cut() is not None


def test_where_no_layer_or_all_of_a_stage_is_removed_less_is_trained(
    whole: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = whole.cut()
    assert cut is not None
    folder = train(RECIPE, runs=tmp_path, name="runs", quiet=True)
    complete(replace(folder, recipe=replace(folder.recipe, control="none")), quiet=True)
    model: Any = folder.model()
    folder.write(replace(cut, removed=()))
    folder.write_cropped(model)
    capsys.readouterr()
    complete(folder)
    assert capsys.readouterr().err == (
        "Control: no layer was removed, so there is nothing to compare\n"
    )
    assert folder.reference() is None
    folder.write(replace(cut, removed=(0, 1, 2, 3)))
    folder.write_cropped(model.without({0, 1, 2, 3}))
    complete(folder)
    assert "Control: a stage of the cut has no layer" in capsys.readouterr().err
    reference = folder.reference()
    assert reference is not None
    assert reference.small is None
    assert reference.report.horizon_after == 0
    assert reference.removed == (0, 1, 2, 3)
    assert {path.name for path in tmp_path.glob("runs*")} == {"runs", PLAIN}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stage_cost": 0.0}, "control is plain, but stage_cost is 0"),
        ({"start": Path("start.safetensors")}, "control is plain, but start is start.safetensors"),
    ],
)
def test_no_control_where_it_cannot_start_from_scratch(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        replace(RECIPE, **fields)
    given = {"model": "transformers:vit", "depth": Recipe.depth, "hidden": Recipe.hidden}
    with pytest.raises(InputError, match="control is plain, but model is transformers:vit"):
        replace(RECIPE, **given)
    assert RECIPE.of_model("transformers:vit").control == "none"


@pytest.mark.parametrize("verb", ["train", "resume"])
def test_nobody_gets_in_between_training_and_cut(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process would find the run free, finish it, and this one would fail."""
    complete, refused = analysis.complete, []

    def watched(folder: RunFolder, *, quiet: bool) -> None:
        with pytest.raises(Timeout):  # another process's: not one that may take it again
            FileLock(folder.path / LOCK, timeout=0).acquire()
        refused.append(verb)
        complete(folder, quiet=quiet)

    monkeypatch.setattr(analysis, "complete", watched)
    recipe = replace(RECIPE, depth=(2,), epochs=1, control="none")
    if verb == "train":
        verbs.train(recipe, runs=tmp_path, quiet=True)
    else:
        train(recipe, runs=tmp_path, quiet=True)
        verbs.resume(str(tmp_path / "digits"), quiet=True)
    assert refused == [verb]
