"""A run refined into another run: against a naive loop, resumed, refused."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import OneCycleLR
from training_runs import checkpoint_of, equal_weights, files_at_most

from deeplimit.control import SoftCrossEntropy, StageCost
from deeplimit.data import iter_batches
from deeplimit.errors import InputError, RunError
from deeplimit.network import ResidualClassifier
from deeplimit.ode import refine
from deeplimit.training import Recipe, RunFolder, load_data, refine_run, resume, train

pytestmark = pytest.mark.slow

SMALL = Recipe(device="cpu", batch_size=256)
ADAMW = replace(SMALL, depth=(4,), width=16, hidden=8, epochs=2, step=0.5)
RECIPES = {
    "adamw": ADAMW,
    "sgd": replace(ADAMW, optimizer="sgd", learning_rate=0.05, weight_decay=1e-3, scheme="heun"),
}


@pytest.fixture(scope="module", params=["adamw", "sgd"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    runs = tmp_path_factory.mktemp("runs")
    return train(RECIPES[request.param], runs=runs, name="a", quiet=True)


def naive(run: RunFolder, epochs: int) -> torch.nn.Module:
    """The run's network and its optimiser, refined; a schedule over them; batch after batch."""
    recipe = run.recipe
    model = run.model().train()
    if recipe.optimizer == "sgd":
        settings = {"momentum": 0.9, "nesterov": True, "weight_decay": recipe.weight_decay}
        optimizer = SGD(model.parameters(), lr=1.0, **settings)
    else:
        optimizer = AdamW(model.parameters(), weight_decay=recipe.weight_decay, fused=True)
    saved = checkpoint_of(run.path).optimizer
    for name, p in model.named_parameters():
        optimizer.state[p] = {k: v.clone() for k, v in saved["state"][name].items()}
    (group,) = optimizer.param_groups
    group["lr"] = recipe.learning_rate
    model = refine(model, 2, optimizer=optimizer)
    rates = [group["lr"] for group in optimizer.param_groups]
    data = load_data(recipe, run.path.parent)
    steps = len(data.train) // recipe.batch_size
    schedule = OneCycleLR(optimizer, rates, total_steps=epochs * steps)
    objective = StageCost(model, SoftCrossEntropy(10, recipe.softness), recipe.stage_cost)
    for epoch in range(epochs):
        for x, y in iter_batches(data.train, recipe.batch_size, seed=0, epoch=epoch):
            optimizer.zero_grad()
            objective(x, y)[0].backward()
            optimizer.step()
            schedule.step()
    return model


def test_training_goes_on_as_a_naive_loop_does(run: RunFolder) -> None:
    made = refine_run(run, 2, epochs=2, quiet=True)
    assert made.path == run.path.with_name("a-x2")
    assert equal_weights(made.model(), naive(run, 2))
    recipe = made.recipe
    assert (recipe.depth, recipe.step, recipe.epochs) == ((8,), 0.25, 2)
    assert recipe.start == made.path / "start.safetensors"
    again = replace(recipe, depth=(4,), step=0.5, start=None)
    assert again == run.recipe
    found = made.refinement()
    assert found is not None
    assert found.trained is not None
    assert (found.source, found.factor, found.carried) == (str(run.path), 2, True)
    assert (found.report.horizon_before, found.report.horizon_after) == (4, 8)
    assert found.trained.accuracy_before == found.report.accuracy_before
    data = load_data(recipe, run.path.parent).test
    x, y = data.batch(torch.arange(len(data)))
    for model, accuracy in (
        (run.model(), found.report.accuracy_before),
        (refine(run.model(), 2), found.report.accuracy_after),
        (made.model(), found.trained.accuracy_after),
    ):
        with torch.no_grad():
            assert float((model(x).argmax(-1) == y).double().mean()) == pytest.approx(accuracy)


def test_without_training_the_network_is_the_refined_one(run: RunFolder) -> None:
    made = refine_run(run, 3, name="deeper", quiet=True)
    assert made.path.name == "deeper"
    assert equal_weights(made.model(), refine(run.model(), 3))
    assert (made.recipe.epochs, made.recipe.depth) == (0, (12,))
    found = made.refinement()
    assert found is not None
    assert (found.trained, found.carried, found.epochs) == (None, False, 0)
    assert not (made.path / "checkpoint").exists()
    # The recipe in it repeats it: the same start, nothing trained.
    again = train(Recipe.from_toml(made.path / "recipe.toml"), runs=run.path.parent, quiet=True)
    assert equal_weights(again.model(), made.model())
    further = refine_run(made, 2, quiet=True)
    assert further.path.name == "deeper-x2"
    assert equal_weights(further.model(), refine(refine(run.model(), 3), 2))
    assert further.recipe.start == further.path / "start.safetensors"


def test_a_run_that_was_moved_is_still_whole(run: RunFolder, tmp_path: Path) -> None:
    made = refine_run(run, 2, epochs=1, name="moving", quiet=True)
    moved = Path(shutil.move(made.path, tmp_path / "moved"))
    assert 'start = "start.safetensors"' in (moved / "recipe.toml").read_text()
    opened = RunFolder.open(moved)
    assert opened.recipe.start == moved / "start.safetensors"
    assert opened.recipe == replace(made.recipe, start=opened.recipe.start)
    shutil.rmtree(moved / "checkpoint")  # trained again from its start; the optimiser's is anew
    (moved / "model.safetensors").unlink()
    again = resume(moved, quiet=True)
    other = train(Recipe.from_toml(moved / "recipe.toml"), runs=tmp_path, name="o", quiet=True)
    assert equal_weights(again.model(), other.model())


def test_stopped_it_goes_on_to_the_same_result(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = refine_run(run, 2, epochs=2, name="whole", quiet=True)

    def stopped(*args: object, **more: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("deeplimit.training.fit.resume", stopped)
    with pytest.raises(KeyboardInterrupt):
        refine_run(run, 2, epochs=2, name="stopped", quiet=True)
    path = run.path.with_name("stopped")
    begun = checkpoint_of(path)
    assert (begun.step, begun.rows) == (0, [])
    part = path.with_name("part")
    shutil.copytree(path, part)
    made = resume(path, quiet=True)
    assert equal_weights(made.model(), whole.model())
    # After an epoch, of a run whose optimiser has several groups.
    shutil.copytree(whole.path / "checkpoint", part / "checkpoint", dirs_exist_ok=True)
    (part / "checkpoint" / "epoch-00002.pt").unlink()
    assert len(checkpoint_of(part).optimizer["param_groups"]) > 1
    assert checkpoint_of(part).epochs == 1
    assert equal_weights(resume(part, quiet=True).model(), whole.model())


def test_a_run_that_was_refined_is_refined_again_with_its_optimiser(run: RunFolder) -> None:
    once = refine_run(run, 2, epochs=1, name="once", quiet=True)
    twice = refine_run(once, 2, epochs=1, name="twice", learning_rate=1e-3, quiet=True)
    rates = [group["max_lr"] for group in checkpoint_of(twice.path).optimizer["param_groups"]]
    scale = 4 if run.recipe.optimizer == "sgd" else 1  # outside the stages as it was
    assert sorted(rates) == pytest.approx([1e-3, 1e-3 * scale])
    assert (twice.recipe.learning_rate, twice.recipe.depth) == (1e-3, (16,))


def test_on_a_full_disk_nothing_is_left(run: RunFolder) -> None:
    before = sorted(run.path.parent.iterdir())
    smallest = min(p.stat().st_size for p in (run.path / "checkpoint").glob("*.pt"))
    with files_at_most(smallest), pytest.raises(RunError, match="cannot be written"):
        refine_run(run, 3, epochs=1, quiet=True)
    assert sorted(run.path.parent.iterdir()) == before


def test_settings_that_cannot_be(run: RunFolder, tmp_path: Path) -> None:
    before = sorted(path.name for path in run.path.parent.iterdir())
    for settings, words in (
        ({"factor": 0}, "factor is 0; expected a whole number"),
        ({"epochs": -1}, "epochs is -1; expected at least 0"),
        ({"epochs": 1, "learning_rate": -1.0}, "learning_rate is -1; expected a number above 0"),
        ({"learning_rate": 1e-3}, "the learning rate is 0.001, but nothing is trained"),
        ({"name": "a/b"}, "the name 'a/b' cannot be a folder's"),
    ):
        with pytest.raises(InputError, match=words):
            refine_run(run, **settings, quiet=True)
    assert sorted(path.name for path in run.path.parent.iterdir()) == before
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    shutil.copy(run.path / "recipe.toml", unfinished)
    with pytest.raises(InputError, match=r"no model.safetensors yet; finish the run"):
        refine_run(RunFolder.open(unfinished), quiet=True)


def test_a_start_of_another_shape(run: RunFolder) -> None:
    start = run.path / "model.safetensors"
    wrong = replace(run.recipe, start=start, width=32)
    with pytest.raises(InputError, match=r"its width is 16, the recipe's 32; a network starts"):
        train(wrong, runs=run.path.parent, quiet=True)
    same = train(replace(run.recipe, start=start, epochs=0), runs=run.path.parent, quiet=True)
    assert isinstance(same.model(), ResidualClassifier)
    assert equal_weights(same.model(), run.model())
