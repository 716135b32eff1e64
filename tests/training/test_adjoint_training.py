"""Training with states rebuilt in the backward pass: against a naive loop, against backprop."""

import itertools
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from training_runs import (
    SMALL,
    checkpoint_of,
    equal_weights,
    largest_difference,
    same_but_for_seconds,
)

from deeplimit import drift, use_adjoint
from deeplimit.control import StageCost
from deeplimit.data import iter_batches
from deeplimit.errors import RunError
from deeplimit.gradient import DriftWarning
from deeplimit.gradient.stand_ins import switches
from deeplimit.network import Architecture
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
from deeplimit.training.loop import DriftWatch
from deeplimit.training.progress import Observer

pytestmark = pytest.mark.slow

ADJOINT = replace(SMALL, gradient="adjoint", step=0.1)


def naive(recipe: Recipe, runs: Path) -> tuple[torch.nn.Module, list[float]]:
    """The same training written down as plainly as it can be: the network, the drift per epoch."""
    data = load_data(recipe, runs)
    model = use_adjoint(build_model(recipe, data), evaluations=recipe.evaluations)
    objective = StageCost(
        model, loss_of(recipe, data), recipe.stage_cost, control_cost=recipe.control_cost
    )
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
    )
    steps = recipe.epochs * (len(data.train) // recipe.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=steps
    )
    drifts = []
    for epoch in range(recipe.epochs):
        largest = 0.0
        for x, y in iter_batches(data.train, recipe.batch_size, seed=recipe.seed, epoch=epoch):
            optimizer.zero_grad()
            objective(x, y)[0].backward()
            largest = max(largest, drift(model))
            optimizer.step()
            schedule.step()
        drifts.append(largest)
    return model, drifts


def test_it_is_the_naive_loop_bit_by_bit_and_so_is_the_drift(tmp_path: Path) -> None:
    folder = train(ADJOINT, runs=tmp_path, quiet=True)
    model, drifts = naive(ADJOINT, tmp_path)
    assert equal_weights(model, folder.model())
    assert [row["drift"] for row in folder.metrics()] == drifts
    assert max(drifts) > 1e-6
    assert switches(folder.model()) == []
    assert checkpoint_of(folder.path).model.keys() == folder.model().state_dict().keys()


def test_more_evaluations_come_closer_to_backprop(tmp_path: Path) -> None:
    exact = replace(ADJOINT, precision="64-true", gradient="backprop")
    plain = train(exact, runs=tmp_path, quiet=True)
    assert all(row["drift"] is None for row in plain.metrics())
    gaps = []
    for evaluations in (1, 2, 10):
        recipe = replace(exact, gradient="adjoint", evaluations=evaluations)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DriftWarning)
            folder = train(recipe, runs=tmp_path, quiet=True)
        gaps.append(largest_difference(checkpoint_of(plain.path), checkpoint_of(folder.path)))
    assert gaps[0] > 5 * gaps[1] > 0
    assert gaps[2] < 1e-9


def test_a_resumed_run_goes_on_by_the_adjoint(tmp_path: Path) -> None:
    folder = train(replace(ADJOINT, evaluations=3), runs=tmp_path, quiet=True)
    whole = checkpoint_of(folder.path)
    (folder.path / "checkpoint" / "epoch-00003.pt").unlink()
    assert RunFolder.open(folder.path).recipe.evaluations == 3
    resume(folder.path, quiet=True)
    again = checkpoint_of(folder.path)
    assert largest_difference(whole, again) == 0
    assert same_but_for_seconds(whole, again)
    assert again.rows[-1]["drift"] == whole.rows[-1]["drift"] != whole.rows[0]["drift"]


@pytest.mark.parametrize("bits", [4, "auto"])
def test_a_run_by_coded_states_is_near_the_exact_one_and_goes_on_where_it_was(
    bits: int | str, tmp_path: Path
) -> None:
    exact = replace(ADJOINT, step=1.0, gradient="backprop")
    plain = train(exact, runs=tmp_path, quiet=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DriftWarning)
        recipe = replace(exact, gradient="adjoint", bits=bits)
        folder = train(recipe, runs=tmp_path, quiet=True)
        whole = checkpoint_of(folder.path)
        for row, other in zip(folder.metrics(), plain.metrics(), strict=True):
            assert row["loss"] == pytest.approx(other["loss"], rel=0.05)
        assert largest_difference(checkpoint_of(plain.path), whole) > 0
        (folder.path / "checkpoint" / "epoch-00003.pt").unlink()
        assert RunFolder.open(folder.path).recipe.bits == bits
        resume(folder.path, quiet=True)
    again = checkpoint_of(folder.path)
    assert largest_difference(whole, again) == 0
    assert same_but_for_seconds(whole, again)
    assert again.plan == whole.plan
    if bits == "auto":
        assert whole.plan is not None
        assert whole.plan["error"] <= 1e-2
        assert any(way["bits"] or way["evaluations"] for way in whole.plan["ways"].values())


@pytest.mark.parametrize("scheme", ["euler", "heun"])
def test_batch_norms_of_two_stages_move_as_they_do_under_backprop(
    scheme: str, tmp_path: Path
) -> None:
    """Several steps: at the first one every layer is the identity, and rebuilt exactly."""
    generator = np.random.default_rng(0)
    y = np.arange(120) % 3
    x = generator.integers(0, 120, (120, 3, 8, 8))
    x[np.arange(120), y] += 60
    np.savez(tmp_path / "images.npz", x=x.astype(np.uint8), y=y)
    recipe = replace(
        recipe_for("cifar10"),
        data=f"npz:{tmp_path / 'images.npz'}",
        depth=(4, 3),
        width=4,
        hidden=4,
        step=0.05,
        scheme=scheme,
        control_cost=0.1,
        epochs=1,
        batch_size=16,
        precision="64-true",
        device="cpu",
    )
    plain = checkpoint_of(train(recipe, runs=tmp_path, quiet=True).path)
    rebuilt = replace(recipe, gradient="adjoint", evaluations=10)
    adjoint = checkpoint_of(train(rebuilt, runs=tmp_path, quiet=True).path)
    assert plain.step >= 4
    counts = [name for name in plain.model if name.endswith("num_batches_tracked")]
    assert len(counts) > 7
    assert all(torch.equal(plain.model[name], adjoint.model[name]) for name in counts)
    moved = [name for name in plain.model if name.endswith(("running_mean", "running_var"))]
    for name in moved:
        assert torch.allclose(plain.model[name], adjoint.model[name], rtol=1e-6, atol=1e-7), name
    assert largest_difference(plain, adjoint) < 1e-6
    row = adjoint.rows[0]
    assert row["drift"] is not None
    assert 1e-14 < row["drift"] < 1e-6


DRIFTING = replace(SMALL, gradient="adjoint", evaluations=1, step=1.0, learning_rate=0.05)


def test_a_drift_that_is_too_large_is_told_in_a_line_and_again_at_ten_times_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folder = train(DRIFTING, runs=tmp_path)
    lines = capsys.readouterr().err.splitlines()
    told = [line for line in lines if "rebuilt states" in line]
    found = [float(line.split()[2]) for line in told]
    assert 1 <= len(found) <= 4
    assert all(later > 9.5 * before for before, later in itertools.pairwise(found))  # two digits
    warning = told[0]
    assert warning.startswith("warning: drift 0.")
    # Of the three states that are rebuilt the first is compared, before layer 1.
    assert " at layer 1: rebuilt" in warning
    assert re.search(r"may be off by up to 0\.\d+ of its size", warning)
    assert "evaluations 2 instead of 1" in warning
    rows = folder.metrics()
    assert rows[-1]["drift"] is not None
    assert rows[-1]["drift"] > 0.01
    assert f"drift {rows[-1]['drift']:.2g}" in lines[-1]
    assert len(lines) == 1 + len(told) + DRIFTING.epochs


class Told(Observer):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def warn(self, message: str) -> None:
        self.lines.append(message)


def two_stages(kind: str) -> tuple[torch.nn.Module, list[torch.Tensor]]:
    """Two stages of three layers, and what the updates of each stage's layers are times."""
    torch.manual_seed(0)
    if kind == "ours":
        sizes: dict[str, Any] = {"width": 4, "hidden": 4, "norm": "none", "activation": "tanh"}
        ours = Architecture("convolutional", (3, 16, 16), 3, (3, 3), **sizes).build()
        return ours, [layer.conv2.weight for stage in ours.stages for layer in stage]
    transformers = pytest.importorskip("transformers")
    config = transformers.ConvNextConfig(
        num_stages=2, hidden_sizes=[4, 8], depths=[3, 3], patch_size=2, image_size=16
    )
    model = transformers.ConvNextForImageClassification(config)
    return model, [p for n, p in model.named_parameters() if n.endswith("layer_scale_parameter")]


@pytest.mark.parametrize(("stage", "layer"), [(0, 1), (1, 4)])
@pytest.mark.parametrize("kind", ["ours", "transformers"])
def test_the_layer_that_is_told_is_counted_through_the_whole_network(
    kind: str, stage: int, layer: int
) -> None:
    """A stage's first state is kept; what is rebuilt behind it, the input of its second layer, is
    compared there. In the other stage nothing happens, so nothing drifts."""
    model, factors = two_stages(kind)
    for n, factor in enumerate(factors):
        torch.nn.init.normal_(factor, std=30.0 * (n // 3 == stage))
    use_adjoint(model, evaluations=1, on_drift="ignore")
    watch, told = DriftWatch(Fabric(accelerator="cpu"), model), Told()
    for _ in range(2):
        output = model(torch.randn(2, 3, 16, 16))
        getattr(output, "logits", output).square().sum().backward()
    watch.look(told)
    assert watch.largest == drift(model) > 0.01
    (line,) = told.lines
    assert line.startswith(f"drift {drift(model):.2g} at layer {layer}: ")


def test_where_nothing_is_shown_it_is_a_warning_of_pythons(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.warns(DriftWarning) as caught:
        train(DRIFTING, runs=tmp_path, quiet=True)
    assert 1 <= len(caught) <= 4
    assert capsys.readouterr().err == ""


def test_divergence_is_stopped_at_the_step_and_the_layer(tmp_path: Path) -> None:
    recipe = Recipe(depth=(12,), width=32, hidden=32, epochs=1, device="cpu", learning_rate=1e18)
    said = []
    for gradient in ("backprop", "adjoint"):
        with pytest.raises(RunError) as stopped:
            train(replace(recipe, gradient=gradient), runs=tmp_path, quiet=True)
        said.append(str(stopped.value))
    assert said[0] == said[1]
    assert "the loss is not finite at step 2 (epoch 1): the first state that is not" in said[0]
