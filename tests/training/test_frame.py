"""A recipe's frame: stem and head of another network, kept while the layers learn."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from training_runs import equal_weights

from deeplimit import cot_geodesic
from deeplimit.control import SoftCrossEntropy, StageCost
from deeplimit.data import iter_batches, load_dataset
from deeplimit.errors import InputError
from deeplimit.ode import refine
from deeplimit.studies import merge_runs
from deeplimit.training import (
    Recipe,
    RunFolder,
    build_model,
    crop_run,
    heal_run,
    refine_run,
    train,
)

pytestmark = pytest.mark.slow

RECIPE = Recipe(
    depth=(3,), width=16, hidden=24, activation="tanh", step=1 / 3, stage_cost=0.0, epochs=2,
    weight_decay=0.1, device="cpu",
)  # fmt: skip


def outside(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v for k, v in model.state_dict().items() if not k.startswith("stages.")}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return train(RECIPE, runs=tmp_path_factory.mktemp("frames"), name="first", quiet=True)


@pytest.fixture(scope="module")
def second(first: RunFolder) -> RunFolder:
    """Of another width and depth."""
    own = replace(RECIPE, depth=(4,), step=0.25, hidden=32, seed=1, frame=first.path)
    return train(own, runs=first.path.parent, name="second", quiet=True)


def test_training_is_a_naive_loop_over_the_layers_alone(
    first: RunFolder, second: RunFolder
) -> None:
    data = load_dataset("digits")
    model: Any = build_model(replace(second.recipe, frame=None), data)
    theirs: Any = first.model()
    model.stem, model.head = copy.deepcopy(theirs.stem), copy.deepcopy(theirs.head)
    objective = StageCost(model.train(), SoftCrossEntropy(10, RECIPE.softness), 0.0)
    layers = list(model.stages.parameters())
    optimizer = torch.optim.AdamW(layers, lr=4e-3, weight_decay=0.1, fused=True)
    steps = 2 * (len(data.train) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for epoch in range(2):
        for x, y in iter_batches(data.train, 64, seed=1, epoch=epoch):
            optimizer.zero_grad()
            objective(x, y)[0].backward()
            optimizer.step()
            schedule.step()
    assert equal_weights(second.model(), model)
    assert second.metrics()[-1]["validation_accuracy"] > 0.5


def test_of_one_frame_the_geodesic_is_made_of_networks(first: RunFolder, second: RunFolder) -> None:
    assert same(outside(first.model()), outside(second.model()))
    middle = cot_geodesic(first.model(), second.model(), 0.5).network()
    assert same(outside(middle), outside(first.model()))
    own = train(replace(RECIPE, seed=2), runs=first.path.parent, name="own", quiet=True)
    with pytest.raises(InputError, match=r"differ in stem.*--frame RUN"):
        cot_geodesic(first.model(), own.model(), 0.5)


def test_healing_keeps_the_frame(second: RunFolder) -> None:
    crop_run(second, 2)
    heal_run(second, epochs=1, quiet=True)
    healed = second.healed()
    assert same(outside(healed), outside(second.model()))
    assert not equal_weights(healed, second.cropped())


def test_refined_it_keeps_the_frame_wherever_it_is_done(
    first: RunFolder, second: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(first.path.parent)
    own = replace(RECIPE, seed=3, frame=Path("first"))
    third = train(own, runs=Path(), name="third", quiet=True)
    assert RunFolder.open(third.path).recipe.frame == first.path
    monkeypatch.chdir(tmp_path)  # where another "first" would be another frame
    for epochs in (0, 1):
        run = RunFolder.open(first.path.parent / "third")
        made = refine_run(run, 2, epochs=epochs, name=f"finer-{epochs}", quiet=True)
        assert same(outside(made.model()), outside(first.model()))
        assert equal_weights(made.model(), refine(run.model(), 2)) == (epochs == 0)


def test_what_was_merged_is_merged_again(first: RunFolder, second: RunFolder) -> None:
    one = merge_runs([first.path, second.path], name="one")
    two = merge_runs([one.folder, first.path], name="two")
    made = RunFolder.open(one.folder)
    assert made.recipe.frame == first.path
    further = refine_run(made, 2, epochs=1, name="one-finer", quiet=True)
    assert same(outside(further.model()), outside(first.model()))
    mean = merge_runs(
        [first.path, train(replace(RECIPE, seed=5), runs=first.path.parent, quiet=True).path],
        frame="interpolate",
        name="mean",
    )
    assert RunFolder.open(mean.folder).recipe.frame is None
    assert same(outside(RunFolder.open(two.folder).model()), outside(first.model()))


def test_a_frame_that_does_not_fit(first: RunFolder, tmp_path: Path) -> None:
    def refused(recipe: Recipe, match: str) -> None:
        with pytest.raises(InputError, match=match):
            train(recipe, runs=tmp_path, name="never", quiet=True)
        assert not (tmp_path / "never").exists()

    refused(replace(RECIPE, frame=first.path, width=8), r"head.*weight is 10×16, .* 10×8")
    refused(replace(RECIPE, frame=first.path, data="spirals"), r"head.*is 10.*train 2")
    refused(replace(RECIPE, frame=tmp_path / "none"), "frame is .*none: there is no network")
    for settings in (
        {"kind": "cifar-resnet", "depth": (1, 1, 1)},
        {"kind": "convolutional"},
        {"kind": "convolutional", "norm": "none"},
        {"hidden": 0},
    ):
        with pytest.raises(InputError, match="no means of particles"):
            replace(RECIPE, activation="relu", step=1.0, frame=first.path, **settings)
