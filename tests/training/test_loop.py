"""The loop against a naive one; repetition, resumption, divergence, interruption, a full disk."""

import _thread
import math
import re
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from training_runs import (
    SMALL,
    checkpoint_of,
    equal_weights,
    files_at_most,
    largest_difference,
    same_but_for_seconds,
)

from deeplimit.control import SoftCrossEntropy, StageCost, turnpike_profile
from deeplimit.data import iter_batches
from deeplimit.errors import InputError, RunError
from deeplimit.training import (
    Recipe,
    RunFolder,
    build_model,
    load_data,
    loss_of,
    recipe_for,
    resume,
    train,
)
from deeplimit.training.building import prepare, training_batches
from deeplimit.training.fit import fit
from deeplimit.training.loop import Training
from deeplimit.training.processes import fitting_threads, launch, seed_draws
from deeplimit.training.progress import Observer

pytestmark = pytest.mark.slow

DIGITS = replace(recipe_for("digits"), device="cpu")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return train(SMALL, runs=tmp_path_factory.mktemp("runs"), quiet=True)


def naive(recipe: Recipe, runs: Path) -> tuple[torch.nn.Module, list[list[float]]]:
    """The same training written down as plainly as it can be."""
    data = load_data(recipe, runs)
    model, loss = build_model(recipe, data), loss_of(recipe, data)
    objective = StageCost(model, loss, recipe.stage_cost, control_cost=recipe.control_cost)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
    )
    per_epoch = len(data.train) // recipe.batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=recipe.epochs * per_epoch
    )
    figures = []
    for epoch in range(recipe.epochs):
        losses, hits = [], []
        for x, y in iter_batches(data.train, recipe.batch_size, seed=recipe.seed, epoch=epoch):
            optimizer.zero_grad()
            cost, logits = objective(x, y)
            cost.backward()
            optimizer.step()
            schedule.step()
            losses += loss(logits, y).tolist()
            hits += (logits.argmax(-1) == y).tolist()
        profile = turnpike_profile(model, iter_batches(data.validation, 256), loss)
        figures.append(
            [
                sum(losses) / len(losses),
                sum(hits) / len(hits),
                profile.loss[-1],
                profile.accuracy[-1],
                schedule.get_last_lr()[0],
            ]
        )
    return model, figures


def test_it_is_the_naive_loop_bit_by_bit(unbroken: RunFolder) -> None:
    model, figures = naive(SMALL, unbroken.path.parent)
    assert equal_weights(model, unbroken.model())
    names = ("loss", "accuracy", "validation_loss", "validation_accuracy", "learning_rate")
    for row, naively in zip(unbroken.metrics(), figures, strict=True):
        assert [row[name] for name in names] == pytest.approx(naively, abs=1e-12)
    assert checkpoint_of(unbroken.path).step == 3 * 12


def test_the_same_seed_gives_the_same_numbers_and_another_does_not(
    unbroken: RunFolder, tmp_path: Path
) -> None:
    torch.manual_seed(123)  # what was drawn before does not matter, and is not disturbed
    state = torch.get_rng_state()
    again = train(SMALL, runs=tmp_path, quiet=True)
    assert torch.equal(torch.get_rng_state(), state)
    first, second = checkpoint_of(unbroken.path), checkpoint_of(again.path)
    assert largest_difference(first, second) == 0
    assert same_but_for_seconds(first, second)
    other = train(replace(SMALL, seed=1), runs=tmp_path, quiet=True)
    assert not equal_weights(other.model(), again.model())


def test_a_run_leaves_what_it_should(unbroken: RunFolder) -> None:
    assert {path.name for path in unbroken.path.iterdir()} == {
        "recipe.toml",
        "metrics.csv",
        "checkpoint",
        "model.safetensors",
        "run.json",
    }
    assert unbroken.recipe == SMALL
    assert Recipe.from_toml(unbroken.path / "recipe.toml") == SMALL
    assert unbroken.class_names == ("arm 0", "arm 1")
    assert unbroken.metrics() == tuple(checkpoint_of(unbroken.path).rows)
    weights = checkpoint_of(unbroken.path).model
    assert weights.keys() == unbroken.model().state_dict().keys()


def test_it_learns(tmp_path: Path) -> None:
    recipe = replace(recipe_for("digits"), depth=(6,), epochs=8, device="cpu")
    folder = train(recipe, runs=tmp_path, quiet=True)
    rows = folder.metrics()
    assert rows[-1]["validation_accuracy"] is not None
    assert rows[-1]["validation_accuracy"] > 0.95
    assert rows[-1]["learning_rate"] < 1e-3 * recipe.learning_rate  # type: ignore[operator]


def test_a_damaged_checkpoint_costs_an_epoch_and_nothing_else(tmp_path: Path) -> None:
    folder = train(SMALL, runs=tmp_path, quiet=True)
    whole = checkpoint_of(folder.path)
    (folder.path / "model.safetensors").unlink()
    newest = folder.path / "checkpoint" / "epoch-00003.pt"
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    (folder.path / "metrics.csv").unlink()
    resumed = resume(folder.path, quiet=True)
    again = checkpoint_of(folder.path)
    assert largest_difference(whole, again) == 0
    assert same_but_for_seconds(whole, again)
    assert resumed.metrics() == tuple(again.rows)
    assert resumed.model() is not None


def test_a_finished_run_is_only_completed(unbroken: RunFolder) -> None:
    before = checkpoint_of(unbroken.path)
    model = unbroken.model()
    (unbroken.path / "model.safetensors").unlink()
    (unbroken.path / "metrics.csv").unlink()
    resume(unbroken.path, quiet=True)
    assert equal_weights(unbroken.model(), model)
    assert unbroken.metrics() == tuple(before.rows)


def test_a_checkpoint_of_another_network_is_refused(unbroken: RunFolder, tmp_path: Path) -> None:
    other = RunFolder.create(tmp_path, "other", replace(SMALL, hidden=5))
    (other.path / "checkpoint").mkdir()
    for path in (unbroken.path / "checkpoint").iterdir():
        (other.path / "checkpoint" / path.name).write_bytes(path.read_bytes())
    with pytest.raises(InputError, match=r"not of the network in recipe\.toml"):
        resume(other.path, quiet=True)


def once(condition: Callable[[], bool], then: Callable[[], object]) -> threading.Thread:
    """Does something as soon as a condition holds, while the test's own thread trains."""

    def watch() -> None:
        while not condition():
            time.sleep(0.002)
        then()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def test_ctrl_c_says_how_to_go_on_and_that_gives_the_same_result(
    unbroken: RunFolder, tmp_path: Path
) -> None:
    latest = tmp_path / "spirals" / "checkpoint" / "latest"
    once(latest.exists, _thread.interrupt_main)
    longer = replace(SMALL, epochs=15)
    with pytest.raises(KeyboardInterrupt, match="deeplimit train --resume"):
        train(longer, runs=tmp_path, quiet=True)
    done = checkpoint_of(tmp_path / "spirals").epochs
    assert 1 <= done < 15
    resume(tmp_path / "spirals", quiet=True)
    at_once = train(longer, runs=tmp_path, quiet=True)
    assert equal_weights(at_once.model(), RunFolder.open(tmp_path / "spirals").model())


def test_stopped_before_the_first_checkpoint_it_starts_again(
    unbroken: RunFolder, tmp_path: Path
) -> None:
    folder = RunFolder.create(tmp_path, None, SMALL, ("arm 0", "arm 1"))
    resume(folder.path, quiet=True)
    assert equal_weights(folder.model(), unbroken.model())


def test_a_disk_that_fills_up_stops_the_run_and_keeps_its_checkpoint(tmp_path: Path) -> None:
    recipe = replace(recipe_for("digits"), depth=(3,), epochs=3, device="cpu")
    folder = train(recipe, runs=tmp_path, quiet=True)
    newest = folder.path / "checkpoint" / "epoch-00003.pt"
    size = newest.stat().st_size
    newest.unlink()
    before = checkpoint_of(folder.path)
    assert before.epochs == 2
    with files_at_most(size // 2), pytest.raises(RunError, match="free some space"):
        resume(folder.path, quiet=True)
    after = checkpoint_of(folder.path)
    assert largest_difference(before, after) == 0
    resume(folder.path, quiet=True)
    assert checkpoint_of(folder.path).epochs == 3


def test_mixed_precision_computes_in_bfloat16_and_keeps_parameters_whole(
    unbroken: RunFolder, tmp_path: Path
) -> None:
    folder = train(replace(SMALL, precision="bf16-mixed"), runs=tmp_path, quiet=True)
    assert all(w.dtype == torch.float32 for w in checkpoint_of(folder.path).model.values())
    mixed, whole = folder.metrics()[-1]["loss"], unbroken.metrics()[-1]["loss"]
    assert mixed != whole
    assert mixed == pytest.approx(whole, rel=0.01)


def test_small_networks_take_one_thread_and_give_the_others_back() -> None:
    torch.set_num_threads(2)
    try:
        with fitting_threads(SMALL):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
        with fitting_threads(replace(DIGITS, width=512, hidden=512)):
            assert torch.get_num_threads() == 2
        with fitting_threads(recipe_for("mnist")):
            assert torch.get_num_threads() == 2
        with fitting_threads(recipe_for("mazes")):
            assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(1)


DIVERGING = Recipe(
    data="digits", depth=(12,), width=32, hidden=32, epochs=6, batch_size=64, device="cpu"
)


def test_a_huge_learning_rate_is_stopped_at_the_step_and_the_layer(tmp_path: Path) -> None:
    recipe = replace(DIVERGING, learning_rate=1e18)
    layer, step = diverges_at(recipe, tmp_path)
    with pytest.raises(RunError) as caught:
        train(recipe, runs=tmp_path, quiet=True)
    assert str(caught.value) == (
        f"the loss is not finite at step {step} (epoch 1): the first state that is not finite is "
        f"at layer {layer} of 12; train with a smaller learning rate"
    )
    assert 0 < layer < 12


@pytest.mark.parametrize("decay", [400.0, 1000.0])
def test_divergence_in_a_later_epoch_keeps_the_checkpoint_before(
    decay: float, tmp_path: Path
) -> None:
    # Decoupled decay by more than twice the weights at each step: they grow, alternating in sign.
    recipe = replace(DIVERGING, learning_rate=0.01, weight_decay=decay)
    with pytest.raises(RunError) as caught:
        train(recipe, runs=tmp_path, quiet=True)
    good = checkpoint_of(tmp_path / "digits")
    assert good.epochs >= 1
    assert f"epoch {good.epochs + 1}" in str(caught.value)
    assert f"the checkpoint after epoch {good.epochs} is kept" in str(caught.value)
    assert re.search(r"layer \d+ of 12", str(caught.value))
    assert all(weights.isfinite().all() for weights in good.model.values())
    assert len(RunFolder.open(tmp_path / "digits").metrics()) == good.epochs


def diverges_at(recipe: Recipe, runs: Path) -> tuple[int, int]:
    """The layer and the step at which a plain loop meets the first state that is not finite."""
    data = load_data(recipe, runs)
    model, loss = build_model(recipe, data), loss_of(recipe, data)
    objective = StageCost(model, loss, recipe.stage_cost, control_cost=recipe.control_cost)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
    )
    steps = recipe.epochs * (len(data.train) // recipe.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=steps
    )
    step = 0
    for epoch in range(recipe.epochs):
        for x, y in iter_batches(data.train, recipe.batch_size, seed=recipe.seed, epoch=epoch):
            step += 1
            cost, _ = objective(x, y)
            if not math.isfinite(cost.item()):
                states, _ = objective.anatomy.states(x)
                return next(n for n, s in enumerate(states) if not s.isfinite().all()), step
            optimizer.zero_grad()
            cost.backward()
            optimizer.step()
            schedule.step()
    raise AssertionError("it did not diverge")


REFUSED = {
    "softness": (replace(SMALL, softness=0.5), "with 2 classes it must lie between 0 and"),
    "images": (replace(SMALL, kind="convolutional", width=4), "needs images"),
    "colours": (replace(DIGITS, kind="cifar-resnet", depth=(1, 1, 1)), "needs images of three"),
    "augmentation": (replace(SMALL, crop=1), "augmentation is for images"),
    "data": (replace(SMALL, data="spiral"), "did you mean spirals"),
    "batch": (replace(SMALL, batch_size=700, devices=7), "cannot be shared by 7"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_input_is_refused_before_anything_is_written(case: str, tmp_path: Path) -> None:
    recipe, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        train(recipe, runs=tmp_path / "runs", quiet=True)
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="device is cuda, but torch sees none"):
        train(replace(SMALL, device="cuda"), runs=tmp_path / "runs", quiet=True)
    assert not (tmp_path / "runs").exists()


def test_quiet_is_silent_and_otherwise_an_epoch_is_a_line(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    train(replace(SMALL, epochs=1), runs=tmp_path, quiet=True)
    assert capfd.readouterr() == ("", "")
    train(replace(SMALL, epochs=2), runs=tmp_path)
    sys.stderr.flush()
    out, err = capfd.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 3
    assert "logit network of 4 layers on spirals, 2 epochs" in lines[0]
    assert lines[1].startswith("epoch 1/2  loss ")
    assert "entry none yet" in lines[1]
    assert lines[2].startswith("epoch 2/2  loss ")


def test_stopped_after_some_epochs_it_goes_on_to_the_same(
    unbroken: RunFolder, tmp_path: Path
) -> None:
    data = load_data(SMALL, tmp_path)
    for until, done in ((1, 1), (2, 2), (None, SMALL.epochs)):
        found = fit(launch(SMALL), prepare(SMALL, data), tmp_path, until=until, quiet=True)
        assert len(found.rows) == done
    there, here = checkpoint_of(unbroken.path), checkpoint_of(tmp_path)
    assert largest_difference(there, here) == 0
    assert same_but_for_seconds(there, here)


def test_the_layers_of_the_stage_cost_are_drawn_alike_by_a_run_that_goes_on(
    tmp_path: Path,
) -> None:
    recipe = replace(SMALL, stage_cost_layers=1, stage_cost_grows=True)
    data = load_data(recipe, tmp_path)
    for name, ends in (("unbroken", [None]), ("stopped", [1, None])):
        (tmp_path / name).mkdir()
        for until in ends:
            fit(launch(recipe), prepare(recipe, data), tmp_path / name, until=until, quiet=True)
    there, here = checkpoint_of(tmp_path / "unbroken"), checkpoint_of(tmp_path / "stopped")
    assert largest_difference(there, here) == 0
    objective = StageCost(prepare(recipe, data).model, SoftCrossEntropy(2), 0.1, layers=1)
    epochs = []
    for epoch in range(3):
        seed_draws(objective.draws, recipe.seed, epoch)
        epochs.append([objective._drawn() for _ in range(20)])
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_stage_cost_that_grows_is_there_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights: list[float] = []

    def seen(self: StageCost, *batch: Any) -> tuple[Tensor, Tensor]:
        weights.append(self.weight)
        return forward(self, *batch)

    forward = StageCost.forward
    monkeypatch.setattr(StageCost, "forward", seen)
    recipe = replace(SMALL, stage_cost=0.3, stage_cost_grows=True)
    data = load_data(recipe, tmp_path)
    fit(launch(recipe), prepare(recipe, data), tmp_path, quiet=True)
    count = recipe.epochs * len(training_batches(recipe, data, 0))
    assert weights == pytest.approx([0.3 * ((n + 1) / count) ** 2 for n in range(count)])


def test_what_is_drawn_in_an_epoch_is_of_the_recipes_seed_and_the_epoch(tmp_path: Path) -> None:
    """Dropout of a model that is given, for example: torch's generator, seeded anew each epoch."""
    seeds: dict[tuple[int, int], int] = {}

    class Seeds(Observer):
        def step(self, figures: object) -> None:
            seeds[recipe.seed, len(training.rows)] = torch.initial_seed()

    for seed in (0, 1, 7):
        recipe = replace(SMALL, seed=seed)
        start = prepare(recipe, load_data(recipe, tmp_path))
        training = Training(launch(recipe), start, None)
        with torch.random.fork_rng():
            for _ in range(2):
                training.run_epoch(Seeds(), lambda: None)
    assert len(set(seeds.values())) == 6
    for (seed, epoch), found in seeds.items():
        assert found == np.random.SeedSequence([seed, epoch, 0]).generate_state(1)[0]
