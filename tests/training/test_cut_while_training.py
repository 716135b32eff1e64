"""Layers that go while a network trains: against a naive loop, resumed, in several processes."""

import copy
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bare_process import BareProcess
from greys import greys, vit
from training_runs import checkpoint_of, equal_weights, largest_difference

from deeplimit import anatomy, crop
from deeplimit.control import StageCost, turnpike_profile
from deeplimit.data import iter_batches
from deeplimit.errors import InputError
from deeplimit.report.answer import shortened
from deeplimit.report.page import write_page
from deeplimit.training import (
    Recipe,
    RunFolder,
    build_model,
    complete,
    crop_run,
    heal_run,
    load_data,
    loss_of,
    refine_run,
    resume,
    train,
)
from deeplimit.training.loop import Training, depth_due
from deeplimit.training.progress import from_csv, to_csv

RECIPE = Recipe(
    data="digits",
    depth=(8,),
    width=32,
    hidden=16,
    epochs=7,
    points=3.0,
    cut_while_training=2,
    device="cpu",
)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return train(RECIPE, runs=tmp_path_factory.mktemp("runs"), quiet=True)


def layers_of(run: RunFolder) -> list[int]:
    return [int(row["layers"]) for row in run.metrics()]


def naive(recipe: Recipe, runs: Path) -> tuple[torch.nn.Module, list[int]]:
    """Its network, and the layers of each epoch: after a cut all is made anew and put back."""
    data = load_data(recipe, runs)
    model, loss = build_model(recipe, data), loss_of(recipe, data)
    steps = recipe.epochs * (len(data.train) // recipe.batch_size)

    def made(model: torch.nn.Module) -> tuple:
        objective = StageCost(model, loss, recipe.stage_cost, control_cost=recipe.control_cost)
        settings = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay}
        optimizer = torch.optim.AdamW(model.parameters(), fused=True, **settings)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, recipe.learning_rate, total_steps=steps
        )
        return objective, optimizer, schedule

    objective, optimizer, schedule = made(model)
    layers, enough = [], []
    for epoch in range(recipe.epochs):
        if (
            epoch >= 0.3 * recipe.epochs
            and len(enough) >= 2
            and max(enough[-2:]) < len(model.stages[0])
        ):
            smaller = crop(model.eval(), max(enough[-2:])).train()
            before = dict(model.named_parameters())
            objective, other, later = made(smaller)
            for name, p in smaller.named_parameters():
                other.state[p] = copy.deepcopy(optimizer.state[before[name]])
            later.load_state_dict(schedule.state_dict())
            for name in ("lr", "betas"):  # which the schedule moves
                other.param_groups[0][name] = optimizer.param_groups[0][name]
            model, optimizer, schedule, enough = smaller, other, later, []
        model.train()
        for x, y in iter_batches(data.train, recipe.batch_size, seed=recipe.seed, epoch=epoch):
            optimizer.zero_grad()
            objective(x, y)[0].backward()
            optimizer.step()
            schedule.step()
        layers.append(len(model.stages[0]))
        profile = turnpike_profile(model, iter_batches(data.validation, 256), loss)
        enough.append(max(profile.depth_within(recipe.points / 100), 1))
    return model, layers


@pytest.mark.slow
def test_it_is_the_naive_loop(unbroken: RunFolder, tmp_path: Path) -> None:
    model, layers = naive(RECIPE, tmp_path)
    assert layers_of(unbroken) == layers
    assert layers[0] == 8
    assert len(set(layers)) >= 3  # cut twice at least
    assert equal_weights(unbroken.model(), model)
    rows = unbroken.metrics()
    assert all(row["enough"] <= row["layers"] for row in rows)
    assert to_csv(rows) == (unbroken.path / "metrics.csv").read_text()


@pytest.mark.slow
def test_stopped_after_any_epoch_it_goes_on_to_the_same(
    unbroken: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    an_epoch = Training.run_epoch

    def then_stop(self: Training, *args: object) -> None:
        an_epoch(self, *args)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(Training, "run_epoch", then_stop)
    with pytest.raises(KeyboardInterrupt):
        train(RECIPE, runs=tmp_path, name="stopped", quiet=True)
    for _ in range(RECIPE.epochs - 1):
        with pytest.raises(KeyboardInterrupt):
            resume(tmp_path / "stopped", quiet=True)
    monkeypatch.undo()
    again = resume(tmp_path / "stopped", quiet=True)
    assert layers_of(again) == layers_of(unbroken)
    assert largest_difference(checkpoint_of(again.path), checkpoint_of(unbroken.path)) == 0
    assert equal_weights(again.model(), unbroken.model())


@pytest.mark.slow
def test_the_run_is_one_of_the_smaller_network(
    unbroken: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    complete(unbroken, quiet=True)
    layers = layers_of(unbroken)
    last = layers[-1]
    assert anatomy(unbroken.model()).horizon == last
    cut = unbroken.cut()
    assert cut.report.horizon_before == last
    said = shortened(unbroken.metrics())
    at = next(n for n, one in enumerate(layers) if one < 8)
    assert said.startswith(
        f"While it was trained the network was cut from 8 layers to {layers[at]}"
    )
    assert f"after epoch {at}" in said
    assert f"to {last} " in said
    write_page(unbroken.results(), page := unbroken.path / "page.html")
    assert said in page.read_text()
    deeper = refine_run(unbroken, epochs=1, quiet=True)  # the optimiser's state is carried along
    assert anatomy(deeper.model()).horizon == 2 * last
    crop_run(unbroken, last - 1)
    assert heal_run(unbroken, quiet=True).from_full.horizon_before == last > 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "changed",
    [
        {"gradient": "adjoint"},
        {"gradient": "adjoint", "bits": "auto"},
        {"optimizer": "sgd", "learning_rate": 0.2, "weight_decay": 1e-4},
        {"scheme": "heun", "stage_cost_layers": 3},
    ],
)
def test_whatever_moves_the_parameters(changed: dict, tmp_path: Path) -> None:
    recipe = replace(RECIPE, epochs=4, points=30.0, **changed)
    run = train(recipe, runs=tmp_path, quiet=True)
    layers = layers_of(run)
    assert layers[0] == 8 > layers[-1]
    losses = [row["loss"] for row in run.metrics()]
    assert losses[-1] < losses[0]
    assert anatomy(run.model()).horizon == layers[-1]


@pytest.mark.slow
def test_of_a_vision_transformer(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="the extra `hub` is not installed")
    recipe = Recipe(
        data=greys(tmp_path),
        epochs=4,
        batch_size=20,
        learning_rate=1e-2,
        points=49.0,
        cut_while_training=1,
        device="cpu",
    ).of_model(vit(tmp_path))
    run = train(recipe, runs=tmp_path / "runs", quiet=True)
    layers = layers_of(run)
    assert layers[-1] < layers[0]
    assert anatomy(run.model()).horizon == layers[-1]
    assert run.model().config.num_hidden_layers == layers[-1]
    assert (
        largest_difference(
            checkpoint_of(run.path), checkpoint_of(resume(run.path, quiet=True).path)
        )
        == 0
    )


@pytest.mark.slow
@pytest.mark.processes
def test_several_processes_cut_alike(tmp_path: Path, bare_process: BareProcess) -> None:
    recipe = replace(RECIPE, epochs=4, points=30.0, batch_size=50, precision="64-true")
    (tmp_path / "recipe.toml").write_text(recipe.to_toml())
    both = tmp_path / "both.py"
    both.write_text(
        textwrap.dedent(
            """
            import sys
            from dataclasses import replace
            from pathlib import Path
            from deeplimit.training import Recipe, resume, train
            from deeplimit.training.loop import Training

            an_epoch = Training.run_epoch

            def stopped(self, *args):
                an_epoch(self, *args)
                if self.recipe.strategy == "fsdp" and len(self.rows) == 3:
                    raise KeyboardInterrupt

            if __name__ == "__main__":
                runs, *go_on = map(Path, sys.argv[1:])
                if go_on:
                    resume(runs / "fsdp")
                else:
                    Training.run_epoch = stopped
                    recipe = Recipe.from_toml(runs / "recipe.toml")
                    try:
                        for name in ("ddp", "fsdp"):
                            train(replace(recipe, strategy=name), runs=runs, name=name)
                    except KeyboardInterrupt:
                        pass
            """
        )
    )
    said = "".join(
        bare_process.run_two(both, str(tmp_path), *go_on).stderr for go_on in ([], ["go_on"])
    )
    alone = train(recipe, runs=tmp_path, name="alone", quiet=True)
    assert len(set(layers_of(alone))) > 1
    assert said.count("the network is cut") == 2 * (len(set(layers_of(alone))) - 1)
    for name in ("ddp", "fsdp"):
        run = RunFolder.open(tmp_path / name)
        assert layers_of(run) == layers_of(alone)
        assert largest_difference(checkpoint_of(run.path), checkpoint_of(alone.path)) < 1e-12


def rows(*pairs: tuple[int, int]) -> list[dict[str, float]]:
    return [{"layers": float(layers), "enough": float(enough)} for layers, enough in pairs]


def test_when_layers_are_due() -> None:
    three = replace(RECIPE, cut_while_training=3, epochs=10)
    assert depth_due(three, rows((8, 4), (8, 3), (8, 5))) == 5
    assert depth_due(three, rows((8, 4), (8, 3))) is None  # too few
    assert depth_due(three, rows((8, 1), (8, 8), (8, 4), (8, 4))) is None  # once it needed all
    assert depth_due(three, rows((8, 8), (8, 0), (8, 0), (8, 0))) == 1  # a layer stays
    assert depth_due(three, rows((8, 4), (4, 3), (4, 3))) is None  # of another network
    assert depth_due(three, rows((8, 4), (4, 3), (4, 3), (4, 2))) == 3
    assert depth_due(three, []) is None
    late = replace(three, epochs=20)
    assert depth_due(late, rows(*[(8, 4)] * 5)) is None  # the learning rate still rises
    assert depth_due(late, rows(*[(8, 4)] * 6)) == 4
    assert depth_due(replace(three, cut_while_training=0), rows(*[(8, 4)] * 9)) is None


def test_metrics_have_the_columns_where_there_are_such_layers() -> None:
    names = "epoch,loss,accuracy,validation_loss,validation_accuracy,entry,learning_rate,seconds"
    row = dict.fromkeys([*names.split(","), "drift"], 1.0)
    cut = row | {"layers": 8.0, "enough": 3.0}
    assert to_csv([row]).splitlines()[0] == f"{names},drift"
    text = to_csv([cut, cut | {"layers": 3.0}])
    assert text.splitlines()[0] == f"{names},drift,layers,enough"
    assert text.splitlines()[2].endswith(",1.0,3,3")
    assert from_csv(text) == (cut, cut | {"layers": 3.0})
    assert shortened((row, row)) == ""
    assert shortened((cut, cut)) == ""


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"cut_while_training": -1}, "cut_while_training is -1; expected at least 0"),
        ({"control": "plain"}, "but control is plain, .* leave one of them out"),
        (
            {"kind": "convolutional", "depth": (2, 2), "width": 4, "hidden": 4, "reduction": 1},
            "has 2 stages, of which layers of any place are cut; leave it at 0",
        ),
    ],
)
def test_where_no_layer_can_go(changed: dict, says: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=says):
        train(replace(RECIPE, **changed), runs=tmp_path, quiet=True)
    assert not [*tmp_path.glob("digits*")]
