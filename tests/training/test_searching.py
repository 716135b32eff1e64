"""The search for the smallest depth that is kept: against heal, crop and verify called by hand."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training_runs import equal_weights

from deeplimit import choose_cut, crop, heal, turnpike_profile, verify_crop
from deeplimit.data import iter_batches
from deeplimit.errors import InputError
from deeplimit.report.answer import path, rule
from deeplimit.report.page import write_page
from deeplimit.training import Recipe, RunFolder, heal_run, load_data, loss_of, search_run, train
from deeplimit.training.loop import Training
from deeplimit.training.verifying import verify_run

pytestmark = pytest.mark.slow

RECIPE = Recipe(
    data="digits", depth=(8,), width=32, hidden=16, epochs=8, stage_cost=0.1, device="cpu"
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return train(RECIPE, runs=tmp_path_factory.mktemp("runs"), quiet=True)


@pytest.fixture
def run(finished: RunFolder, tmp_path: Path) -> RunFolder:
    return RunFolder.open(shutil.copytree(finished.path, tmp_path / "run"))


def by_hand(run: RunFolder, allowed: float) -> tuple[torch.nn.Module, list[tuple[int, str]], list]:
    """The network found, the depths tried with their verdicts, and the layers that are left."""
    recipe, data, full = run.recipe, load_data(run.recipe, run.path.parent), run.model()
    loss, short = loss_of(recipe, data), replace(recipe, epochs=1, learning_rate=4e-4)
    current, left, tried = full, list(range(recipe.horizon)), []
    low, high = 0, len(left)
    while high > low + 1:
        depth = (low + high) // 2
        validation = iter_batches(data.validation, 256)
        profile = turnpike_profile(current, validation, loss)
        gone = choose_cut(current, profile, validation, blocks=depth).removed
        healed = heal(current, data, remove=gone, teacher=full, recipe=short)
        word = verify_crop(full, healed, validation, loss, tolerance=allowed).verdict.word
        tried.append((depth, word))
        if word == "kept":
            current, high = healed, depth
            left = [n for i, n in enumerate(left) if i not in gone]
        else:
            low = depth
    return current, tried, left


@pytest.mark.parametrize("allowed", [0.02, 0.1])
def test_it_is_heal_and_verify_in_turns(run: RunFolder, allowed: float) -> None:
    network, tried, left = by_hand(run, allowed)
    full = run.model()
    cut = search_run(run, accuracy=allowed, quiet=True)
    assert [(t.report.horizon_after, t.report.verdict.word) for t in cut.search] == tried
    assert cut.removed == tuple(n for n in range(8) if n not in left) != ()
    assert equal_weights(run.cropped(), network)
    data = load_data(RECIPE, run.path.parent)
    assert {t.report.samples for t in cut.search} == {len(data.validation)}
    loss, test = loss_of(RECIPE, data), iter_batches(data.test, 256)
    judged = verify_crop(full, network, test, loss, tolerance=allowed)
    assert (cut.report.samples, cut.report.verdict) == (len(data.test), judged.verdict)
    assert (run.cut(), cut.tolerance) == (cut, allowed)
    assert not (run.path / "search").exists()
    assert not verify_run(run.path).wrong
    # The first depth of that verdict is taken; every depth that was tried stands on the page.
    headings, rows = path(cut)
    assert headings == ("depth", "validation accuracy", "verdict")
    assert [cells[0] for _, cells in rows] == ["8", *(str(depth) for depth, _ in tried)]
    (taken,) = [cells for mark, cells in rows if mark]
    assert (taken[0], taken[2]) == (str(len(left)), "kept")
    assert "searched for" in rule(cut, run.profiles())
    write_page(run.results(), page := run.path / "page.html")
    assert page.read_text().count("<small>taken</small>") == 1
    # The cut can be healed further, as any other.
    assert heal_run(run, quiet=True).removed == cut.removed


def test_it_goes_on_where_it_was_stopped(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = RunFolder.open(shutil.copytree(run.path, tmp_path / "whole"))
    unbroken = search_run(whole, epochs=2, accuracy=0.05, quiet=True)
    assert len(unbroken.search) >= 3
    an_epoch, done = Training.run_epoch, []

    def counted(self: Training, *args: object) -> None:
        an_epoch(self, *args)  # type: ignore[arg-type]
        done.append(len(self.network.stages[0]))
        if len(done) in (1, 4):
            raise KeyboardInterrupt

    monkeypatch.setattr(Training, "run_epoch", counted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            search_run(run, epochs=2, accuracy=0.05, quiet=True)
        assert run.cut() is None or not run.cut().search
    again = search_run(run, epochs=2, accuracy=0.05, quiet=True)
    assert len(done) == 2 * len(unbroken.search)  # no epoch is made twice
    assert [t.removed for t in again.search] == [t.removed for t in unbroken.search]
    assert (again.removed, again.report.verdict) == (unbroken.removed, unbroken.report.verdict)
    assert equal_weights(run.cropped(), whole.cropped())


def test_other_settings_start_anew(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    an_epoch, done = Training.run_epoch, []

    def counted(self: Training, *args: object) -> None:
        an_epoch(self, *args)  # type: ignore[arg-type]
        done.append(self.recipe.epochs)
        if len(done) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Training, "run_epoch", counted)
    with pytest.raises(KeyboardInterrupt):
        search_run(run, epochs=2, accuracy=0.3, quiet=True)
    assert [*(run.path / "search" / "4" / "checkpoint").glob("epoch-*")]
    assert not verify_run(run.path).wrong
    cut = search_run(run, accuracy=0.3, quiet=True)
    assert done == [2] + [1] * len(cut.search)


def test_where_no_depth_is_kept_no_layer_goes(run: RunFolder) -> None:
    full = run.model()
    cut = search_run(run, accuracy=0.001, quiet=True)  # which 359 samples cannot tell
    assert [t.report.horizon_after for t in cut.search] == [4, 6, 7]
    assert {t.report.verdict.word for t in cut.search} <= {"unresolved", "lost"}
    assert (cut.removed, cut.report.verdict.word) == ((), "kept")
    assert equal_weights(run.cropped(), full)
    assert not any(mark for mark, _ in path(cut)[1])


def test_layers_of_any_stage_go(tmp_path: Path) -> None:
    recipe = replace(
        RECIPE, kind="convolutional", depth=(3, 3), width=4, hidden=4, reduction=1, epochs=4
    )
    run = train(recipe, runs=tmp_path, quiet=True)
    network, tried, left = by_hand(run, 0.3)
    cut = search_run(run, accuracy=0.3, quiet=True)
    assert cut.removed == tuple(n for n in range(6) if n not in left) != ()
    assert [(t.report.horizon_after, t.report.verdict.word) for t in cut.search] == tried
    assert equal_weights(run.cropped(), network)
    assert equal_weights(crop(run.model(), remove=cut.removed), network) is False  # it was healed


def test_wrong_settings(run: RunFolder) -> None:
    with pytest.raises(InputError, match="epochs is 0; expected at least 1"):
        search_run(run, epochs=0)
    with pytest.raises(InputError, match="rise given, but digits is measured by its accuracy"):
        search_run(run, rise=0.1)
    with pytest.raises(InputError, match="expected from 0 to less than 50 points"):
        search_run(run, accuracy=0.5)
    assert not (run.path / "search").exists()
