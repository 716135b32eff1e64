"""Profile and cut of a run against the functions of the control room, called by hand."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training_runs import equal_weights

from deeplimit.control import (
    choose_cut,
    control_norms,
    crop,
    layers_to_remove,
    picture_trajectories,
    turnpike_profile,
    vanished,
    verify_crop,
)
from deeplimit.control.verifying import multiply_adds
from deeplimit.data import iter_batches
from deeplimit.errors import InputError
from deeplimit.report.answer import rule
from deeplimit.report.numbers import SPACE
from deeplimit.training import (
    Recipe,
    RunFolder,
    building,
    complete,
    crop_run,
    load_data,
    loss_of,
    models,
    profile_run,
    train,
)

pytestmark = pytest.mark.slow

RECIPE = Recipe(
    data="digits", depth=(8,), width=32, hidden=32, epochs=10, batch_size=64, device="cpu"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return train(RECIPE, runs=tmp_path_factory.mktemp("runs"), quiet=True)


def test_profiles_are_of_the_three_splits(run: RunFolder) -> None:
    data, model = load_data(RECIPE, run.path.parent), run.model()
    loss = loss_of(RECIPE, data)
    profiles = profile_run(run)
    for name in ("train", "validation", "test"):
        split, measured = getattr(data, name), getattr(profiles, name)
        by_hand = turnpike_profile(model, iter_batches(split, 100), loss)
        assert measured.samples == len(split)
        assert measured.loss == pytest.approx(by_hand.loss, rel=1e-5)
        assert measured.accuracy == by_hand.accuracy
    table, costs = profiles.test, profiles.test.costs
    assert costs is not None
    assert table.recommended_depth == profiles.validation.depth_within(RECIPE.points / 100)
    x, _ = next(iter(iter_batches(data.test, 256)))
    for k in (0, 3, 8):
        smaller = crop(model, k)
        assert costs.parameters[k] == sum(p.numel() for p in smaller.parameters())
        assert costs.multiply_adds[k] == multiply_adds(smaller, x[:1])
    assert (costs.latency_batch, costs.device, costs.least) == (256, "cpu", 0)
    stored = RunFolder.open(run.path)
    assert stored.profiles() == profiles
    assert stored.picture() == picture_trajectories(model, iter_batches(data.test, 256), loss)
    last = run.metrics()[-1]
    assert profiles.validation.loss[-1] == pytest.approx(last["validation_loss"], rel=1e-6)
    assert profiles.validation.accuracy[-1] == last["validation_accuracy"]


def test_the_automatic_cut_is_chosen_on_validation_and_measured_on_test(run: RunFolder) -> None:
    data, model = load_data(RECIPE, run.path.parent), run.model()
    loss = loss_of(RECIPE, data)
    (run.path / "profile.json").unlink(missing_ok=True)
    cut = crop_run(run, "auto")
    profiles = run.profiles()  # an unprofiled run is profiled first
    assert profiles is not None
    assert cut.tolerance == 0.005
    assert cut.removed == tuple(layers_to_remove(profiles.validation))
    by_hand = crop(model, remove=cut.removed)
    assert equal_weights(run.cropped(), by_hand)
    report = verify_crop(model, by_hand, iter_batches(data.test, 256), loss)
    assert cut.report.samples == len(data.test)
    for name in ("accuracy_before", "accuracy_after", "agreement", "loss_before", "loss_after"):
        assert getattr(cut.report, name) == pytest.approx(getattr(report, name), rel=1e-6)
    assert cut.report.loss_before == pytest.approx(profiles.test.loss[-1], rel=1e-5)
    assert run.cut() == cut


def test_the_accuracy_that_may_be_lost_is_the_users(run: RunFolder) -> None:
    profiles = run.profiles() or profile_run(run)
    depths = [8 - len(crop_run(run, "auto", accuracy=lost).removed) for lost in (0.001, 0.3)]
    assert depths == [profiles.validation.depth_within(lost) for lost in (0.001, 0.3)]
    stored = run.cut()
    assert stored is not None
    assert stored.tolerance == 0.3
    for wrong in (-0.1, 0.5, 1.5, float("nan")):
        with pytest.raises(InputError, match="expected from 0 to less than 50 points"):
            crop_run(run, "auto", accuracy=wrong)
    assert run.cut() == stored


def test_a_cut_with_a_confidence_is_walked_from_the_full_depth(run: RunFolder) -> None:
    data, model = load_data(RECIPE, run.path.parent), run.model()
    profiles = run.profiles() or profile_run(run)
    cut = crop_run(run, accuracy=0.05, confidence=0.95, data=data)
    validation = iter_batches(data.validation, 256)
    by_hand = choose_cut(model, profiles.validation, validation, accuracy=0.05, confidence=0.95)
    assert cut.choice == by_hand
    assert (cut.choice.score, cut.choice.samples) == ("tail", len(data.validation))
    assert cut.removed == tuple(range(8 - len(cut.removed), 8)) != ()
    assert "with confidence 95\xa0% whatever the network" in rule(cut, profiles)
    # The recipe's is taken where none is given; half a point cannot be told, and that is said.
    sure = replace(run, recipe=replace(RECIPE, confidence=0.95))
    few = crop_run(sure, data=data)
    assert (few.removed, few.tolerance, few.needed) == ((), 0.005, 623)
    assert "359, cannot exclude a loss of 0.5 points at 95 %" in rule(few, profiles)
    for wrong in ({"to": 3}, {"blocks": 2}):
        with pytest.raises(InputError, match=r"confidence 0.95 given, .* leave it out"):
            crop_run(run, confidence=0.95, data=data, **wrong)


def test_a_cut_to_a_depth_keeps_that_many_layers(run: RunFolder) -> None:
    data, model = load_data(RECIPE, run.path.parent), run.model()
    cut = crop_run(run, 3, data=data)
    assert (cut.removed, cut.tolerance) == ((3, 4, 5, 6, 7), None)
    assert (cut.report.horizon_before, cut.report.horizon_after) == (8, 3)
    x, _ = next(iter(iter_batches(data.test, 50)))
    states = model.stages[0].trajectory(model.stem(x))
    assert torch.equal(run.cropped()(x), model.head(states[3]))
    assert run.cut() == cut
    crop_run(run, 8, data=data)
    stored = run.cut()
    assert stored is not None
    assert stored.removed == ()


@pytest.mark.parametrize("depth", [-1, 9])
def test_a_depth_that_is_not_there_is_refused(depth: int, run: RunFolder) -> None:
    before = run.cut()
    with pytest.raises(InputError, match="the network has 8: give 0 … 8, auto"):
        crop_run(run, depth)
    assert run.cut() == before


def test_an_unfinished_run_is_refused(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, None, RECIPE)
    with pytest.raises(InputError, match="deeplimit train --resume"):
        profile_run(folder)
    with pytest.raises(InputError, match="deeplimit train --resume"):
        crop_run(folder)
    assert not (folder.path / "profile.json").exists()


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished run of a network with two stages."""
    recipe = replace(
        RECIPE, kind="convolutional", depth=(3, 3), width=4, hidden=4, reduction=1, epochs=2
    )
    return train(recipe, runs=tmp_path_factory.mktemp("runs"), quiet=True)


@pytest.mark.parametrize(
    "budget", [{}, {"accuracy": 0.3}, {"blocks": 2}, {"multiply_adds": 0.5}, {"latency": 0.7}]
)
def test_layers_of_any_stage_are_chosen_on_validation(stages: RunFolder, budget: dict) -> None:
    data, model = load_data(stages.recipe, stages.path.parent), stages.model()
    cut = crop_run(stages, data=data, **budget)
    profiles = stages.profiles()
    assert profiles is not None
    assert cut.choice is not None
    assert cut.removed == cut.choice.removed
    assert cut.tolerance == (
        None if budget.keys() - {"accuracy"} else budget.get("accuracy", 0.005)
    )
    if "latency" not in budget:  # which is measured anew
        by_hand = choose_cut(
            model,
            profiles.validation,
            iter_batches(data.validation, 256),
            **(budget or {"accuracy": 0.005}),
        )
        assert cut.choice == by_hand
    # Half of them put the layers in order.
    assert cut.choice.samples == len(data.validation) - len(data.validation) // 2
    assert cut.report.samples == len(data.test)
    kept = stages.cropped().architecture.depths
    assert cut.choice.layers_after == kept
    assert cut.choice.layers_before == (3, 3)
    assert cut.report.multiply_adds_after == cut.choice.multiply_adds_after
    assert stages.cut() == cut
    assert "Layers of any place were chosen on validation data" in rule(cut, profiles)


def test_a_layer_that_vanished_goes_first_and_without_a_tolerance(tmp_path: Path) -> None:
    recipe = replace(RECIPE, epochs=2, control_cost=0.1, control_cost_kind="group")
    run = train(recipe, runs=tmp_path, quiet=True)
    model = run.model()
    with torch.no_grad():
        model.stages[0][1].outer.weight.zero_()
    assert vanished(model) == [1]
    run = replace(run, network=model)
    profiles = profile_run(run)
    assert profiles == RunFolder.open(run.path).profiles()
    assert profiles.control_norms == control_norms(model)
    assert profiles.vanished == (1,)
    cut = crop_run(run, "auto", accuracy=0.0)  # which no loss of accuracy allows
    tail = layers_to_remove(profiles.validation, 0.0)
    assert 1 not in tail
    assert cut.removed == (1, *tail)
    data = load_data(RECIPE, tmp_path)
    x = next(iter(iter_batches(data.test, 360)))[0]
    assert torch.equal(crop(model, remove=[1])(x), model(x))
    said = "1 of 8 layers vanished, counted from 1: 2; their controls are exactly 0"
    assert said.replace(" ", "") in rule(cut, profiles).replace(" ", "").replace(SPACE, "")
    # Under a budget too, whatever the order.
    for budget in ({"blocks": 7}, {"multiply_adds": 0.9}):
        choice = choose_cut(
            model, profiles.validation, iter_batches(data.validation, 256), **budget
        )
        assert choice.removed == (1,)


def test_a_depth_and_a_budget_are_refused(run: RunFolder) -> None:
    before = run.cut()
    with pytest.raises(InputError, match="a cut to 3 layers and a budget of blocks; give one"):
        crop_run(run, 3, blocks=2)
    with pytest.raises(InputError, match="one budget"):
        crop_run(run, blocks=2, latency=0.5)
    assert run.cut() == before


def test_a_training_reads_its_data_once_and_its_network_never(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    for module, name in ((building, "load_dataset"), (models, "load_network")):
        real = getattr(module, name)

        def counted(*args: object, _real: object = real, _name: str = name, **more: object):
            read.append(_name)
            return _real(*args, **more)

        monkeypatch.setattr(module, name, counted)
    folder = train(replace(RECIPE, depth=(2,), epochs=1), runs=tmp_path, quiet=True)
    complete(folder, quiet=True)
    assert read == ["load_dataset"]
    assert folder.network is not None
    assert equal_weights(folder.model(), folder.network)  # as is on the disk
