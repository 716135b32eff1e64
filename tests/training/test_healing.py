"""A cut network trained a little more: against a naive loop, resumed, refused."""

import copy
import inspect
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from training_runs import equal_weights

from deeplimit import crop, heal, verify_crop
from deeplimit.control import SoftCrossEntropy, StageCost
from deeplimit.data import DataSet, iter_batches
from deeplimit.errors import InputError
from deeplimit.network import ResidualChain
from deeplimit.records import to_plain
from deeplimit.training import (
    Recipe,
    RunFolder,
    crop_run,
    heal_run,
    load_data,
    loss_of,
    resume_heal,
    run_data,
    train,
)
from deeplimit.training.building import Fade
from deeplimit.training.loop import Training
from deeplimit.training.results import Plan

RECIPE = Recipe(
    data="digits", depth=(6,), width=32, hidden=16, epochs=8, stage_cost=0.0, device="cpu"
)
SHORT = replace(RECIPE, epochs=2, learning_rate=2e-3, weight_decay=0.0, stage_cost=0.1)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Cut to 2 of 6 layers, which costs it much: it was trained without stage cost."""
    folder = train(RECIPE, runs=tmp_path_factory.mktemp("runs"), quiet=True)
    crop_run(folder, 2)
    return folder


@pytest.fixture(scope="module")
def data(run: RunFolder) -> DataSet:
    return load_data(RECIPE, run.path.parent)


def naive(student: torch.nn.Module, teacher: torch.nn.Module | None, data: DataSet, w: float):
    """Two epochs written down as plainly as can be, τ = 3."""
    student = copy.deepcopy(student).train()
    objective = StageCost(student, SoftCrossEntropy(10, SHORT.softness), SHORT.stage_cost)
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3, weight_decay=0.0, fused=True)
    steps = 2 * (len(data.train) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for epoch in range(2):
        for x, y in iter_batches(data.train, 64, seed=0, epoch=epoch):
            optimizer.zero_grad()
            cost, logits = objective(x, y)
            if teacher is not None:
                with torch.no_grad():
                    soft = teacher(x)
                kl = F.kl_div(
                    F.log_softmax(logits / 3, -1), F.softmax(soft / 3, -1), reduction="batchmean"
                )
                cost = (1 - w) * cost + w * 9 * kl
            cost.backward()
            optimizer.step()
            schedule.step()
    return student


@pytest.mark.slow
@pytest.mark.parametrize("taught", [True, False])
def test_it_is_the_naive_loop(taught: bool, run: RunFolder, data: DataSet) -> None:
    full = run.model()
    cropped = crop(full, 2)
    before = copy.deepcopy(cropped)
    teacher = full if taught else None
    healed = heal(cropped, data, teacher=teacher, teacher_weight=0.7, temperature=3.0, recipe=SHORT)
    by_hand = naive(cropped, teacher, data, 0.7)
    for p, q in zip(healed.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=2e-5)
    assert equal_weights(cropped, before)  # the one given is left as it was
    assert healed.training == cropped.training
    loss = loss_of(SHORT, data)
    report = verify_crop(cropped, healed, iter_batches(data.test, 256), loss)
    assert report.accuracy_after > report.accuracy_before + 0.02
    if not taught:
        assert equal_weights(healed, by_hand)


@pytest.mark.slow
def test_a_bridged_cut_does_better_and_is_healed_from_there(run: RunFolder, tmp_path: Path) -> None:
    folder = RunFolder.open(shutil.copytree(run.path, tmp_path / "run"))
    plain = folder.cut()
    cut = crop_run(folder, 2, bridge=True)
    assert (plain.bridge, folder.cut()) == (None, cut)
    (gap,) = cut.bridge.gaps
    assert (gap.start, gap.stop, gap.kind, cut.bridge.samples) == (2, 6, "linear", 1024)
    assert cut.report.accuracy_after > plain.report.accuracy_after + 0.02
    assert cut.report.loss_after < plain.report.loss_after
    with pytest.raises(
        InputError, match=r"its cut is bridged: .* they cannot fade out; leave fade"
    ):
        heal_run(folder, fade=0.3, quiet=True)
    healing = heal_run(folder, quiet=True)
    assert healing.fade == 0
    assert healing.from_cropped.accuracy_before == cut.report.accuracy_after


@pytest.mark.slow
def test_what_it_writes_is_what_it_says(run: RunFolder, data: DataSet, tmp_path: Path) -> None:
    folder = RunFolder.open(shutil.copytree(run.path, tmp_path / "run"))
    healing = heal_run(folder, epochs=2, learning_rate=2e-3, quiet=True)
    assert folder.healing() == healing
    assert (healing.removed, healing.teacher, healing.teacher_weight) == ((2, 3, 4, 5), "full", 0.5)
    assert not (folder.path / "heal").exists()
    full, cropped, healed = folder.model(), folder.cropped(), folder.healed()
    loss = loss_of(RECIPE, data)
    by_hand = verify_crop(full, healed, iter_batches(data.test, 256), loss)
    for name in ("accuracy_before", "accuracy_after", "agreement", "loss_after", "samples"):
        assert getattr(healing.from_full, name) == pytest.approx(getattr(by_hand, name), rel=1e-6)
    against = verify_crop(cropped, healed, iter_batches(data.test, 256), loss)
    assert healing.from_cropped.accuracy_before == against.accuracy_before
    assert healing.from_cropped.accuracy_before == folder.cut().report.accuracy_after
    assert against.accuracy_after > against.accuracy_before
    # The same as in Python, with the run's own recipe.
    recipe = replace(RECIPE, epochs=2, learning_rate=2e-3)
    again = heal(full, data, remove=healing.removed, teacher=full, recipe=recipe)
    assert equal_weights(again, healed)
    crop_run(folder, 3)  # another cut, which nobody has healed
    assert folder.healing() is None
    assert RunFolder.open(folder.path).results().healing is None
    assert not [*folder.path.glob("heal*")]


@pytest.mark.slow
def test_cut_at_once_where_asked_for(run: RunFolder, data: DataSet, tmp_path: Path) -> None:
    folder = RunFolder.open(shutil.copytree(run.path, tmp_path / "run"))
    heal_run(folder, epochs=2, learning_rate=2e-3, fade=0.0, quiet=True)
    recipe = replace(RECIPE, epochs=2, learning_rate=2e-3)
    by_hand = heal(folder.cropped(), data, teacher=folder.model(), recipe=recipe)
    assert equal_weights(by_hand, folder.healed())


@pytest.mark.slow
def test_a_teacher_that_learns_beside(
    run: RunFolder, data: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a naive loop has it, which moves both; stopped after an epoch, to the same result."""
    full = run.model()
    cropped = crop(full, 2)
    settings = {"teacher": full, "teacher_learns": True, "teacher_weight": 0.7, "temperature": 3.0}
    healed = heal(cropped, data, recipe=SHORT, **settings)
    student, teacher = copy.deepcopy(cropped).train(), copy.deepcopy(full).train()
    objective = StageCost(student, loss_of(SHORT, data), SHORT.stage_cost)
    both = [*student.parameters(), *teacher.parameters()]
    optimizer = torch.optim.AdamW(both, lr=2e-3, weight_decay=0.0, fused=True)
    steps = len(iter_batches(data.train, 64, seed=0))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, SHORT.learning_rate, total_steps=SHORT.epochs * steps
    )
    for epoch in range(SHORT.epochs):
        for x, y in iter_batches(data.train, 64, seed=0, epoch=epoch):
            optimizer.zero_grad()
            (cost, logits), soft = objective(x, y), teacher(x)
            kl = F.kl_div(
                F.log_softmax(logits / 3, -1),
                F.softmax(soft.detach() / 3, -1),
                reduction="batchmean",
            )
            (0.3 * cost + 0.7 * 9 * kl + loss_of(SHORT, data)(soft, y).mean()).backward()
            optimizer.step()
            schedule.step()
    for p, q in zip(healed.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=2e-5)
    assert equal_weights(full, run.model())

    whole = RunFolder.open(shutil.copytree(run.path, tmp_path / "whole"))
    unbroken = heal_run(whole, epochs=2, learning_rate=2e-3, teacher="beside", quiet=True)
    assert unbroken.teacher == "beside"
    stopped = RunFolder.open(shutil.copytree(run.path, tmp_path / "stopped"))
    an_epoch = Training.run_epoch

    def then_stop(self: Training, *args: object) -> None:
        an_epoch(self, *args)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(Training, "run_epoch", then_stop)
    with pytest.raises(KeyboardInterrupt):
        heal_run(stopped, epochs=2, learning_rate=2e-3, teacher="beside", quiet=True)
    monkeypatch.undo()
    assert resume_heal(stopped.path, quiet=True).from_full.accuracy_after == pytest.approx(
        unbroken.from_full.accuracy_after
    )
    assert equal_weights(stopped.healed(), whole.healed())


def test_a_fade_goes_down_between_its_begin_and_its_end() -> None:
    fade = Fade((3,), end=0.75, begin=0.25)
    dones = (0.0, 0.25, 0.375, 0.5, 0.75, 1.0)
    assert [fade.step(done) for done in dones] == [1, 1, 0.75, 0.5, 0, 0]


@pytest.mark.slow
def test_layers_fade_out_as_a_naive_loop_has_it(run: RunFolder, data: DataSet) -> None:
    full, gone, part = run.model(), (3, 4), 0.6
    healed = heal(full, data, remove=gone, fade=part, recipe=SHORT)
    student = run.model()
    objective = StageCost(student.train(), loss_of(SHORT, data), SHORT.stage_cost)
    steps = 2 * (len(data.train) // 64)
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    (chain,) = (m for m in student.modules() if isinstance(m, ResidualChain))
    done, step = 0, [1.0]
    for n in gone:
        chain[n].register_forward_hook(lambda _, args, y: step[0] * y)
    for epoch in range(2):
        for x, y in iter_batches(data.train, 64, seed=0, epoch=epoch):
            step[0] = max(0.0, 1 - done / steps / part)
            optimizer.zero_grad()
            objective(x, y)[0].backward()
            if step[0] == 0:  # a block that is not run has no gradient, so no decay either
                for n in gone:
                    chain[n].zero_grad(set_to_none=True)
            optimizer.step()
            schedule.step()
            done += 1
    cut = crop(student, remove=gone)
    for p, q in zip(healed.parameters(), cut.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=2e-5)


@pytest.mark.slow
def test_cut_otherwise_meanwhile(run: RunFolder, tmp_path: Path) -> None:
    folder = RunFolder.open(shutil.copytree(run.path, tmp_path / "run"))
    (folder.path / "heal").mkdir()
    plan = folder.path / "heal" / "plan.json"
    plan.write_text(json.dumps(to_plain(Plan((3, 4, 5), "full", 0.5, 2.0, 1, 1e-3))))
    with pytest.raises(InputError, match="cut otherwise since its healing was stopped"):
        resume_heal(folder.path)
    plan.write_text(plan.read_text()[:20])
    with pytest.raises(InputError, match=r"plan\.json: damaged .*start again: deeplimit heal"):
        resume_heal(folder.path)


WRONG = {
    "no epochs": ({"epochs": 0}, "epochs is 0; expected at least 1"),
    "weight": ({"teacher_weight": 2.0}, "teacher_weight is 2"),
    "temperature": ({"temperature": -1.0}, "temperature is -1"),
    "fade": ({"fade": 1.5}, "fade is 1.5; expected a part of the training"),
    "rate": ({"learning_rate": 0.0}, "learning_rate is 0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_settings(case: str, run: RunFolder) -> None:
    settings, says = WRONG[case]
    with pytest.raises(InputError, match=says):
        heal_run(run, **settings)
    assert not (run.path / "heal").exists()


@pytest.mark.slow
def test_nothing_to_heal(run: RunFolder, tmp_path: Path) -> None:
    folder = RunFolder.open(shutil.copytree(run.path, tmp_path / "run"))
    with pytest.raises(InputError, match="no healing was stopped; start one: deeplimit heal"):
        resume_heal(folder.path)
    crop_run(folder, 6)
    with pytest.raises(InputError, match="removed no layer, so there is nothing to heal"):
        heal_run(folder)
    (folder.path / "cropped.safetensors").unlink()
    with pytest.raises(InputError, match="make a cut: deeplimit crop"):
        heal_run(folder)


def test_a_loader_is_no_data_set(run: RunFolder, data: DataSet) -> None:
    """Everything else takes one. Without what checks annotations in tests, as users call it."""
    as_users = inspect.unwrap(heal)
    with pytest.raises(InputError, match=r"data is DataLoader; expected a DataSet, by .*load_data"):
        as_users(run.model(), iter_batches(data.train, 8), remove=[1])


def test_nothing_that_could_be_trained(run: RunFolder, data: DataSet) -> None:
    with pytest.raises(InputError, match="every parameter of this ResidualClassifier is frozen"):
        heal(run.model().requires_grad_(False), data)


def test_data_of_other_classes(run: RunFolder) -> None:
    spirals = load_data(replace(RECIPE, data="spirals"), run.path.parent)
    with pytest.raises(InputError, match="does not take the samples of spirals, 2"):
        heal(run.cropped(), spirals)
    assert run_data(run).classes == 10
