"""Training with states rebuilt in the backward pass: against a naive loop, against backprop."""

import itertools
import re
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from training_runs import (
    SMALL,
    checkpoint_of,
    equal_weights,
    largest_difference,
    same_but_for_seconds,
)

from deeplimit import drift, use_adjoint
from deeplimit.control import StageCost
from deeplimit.data import batches
from deeplimit.errors import RunError
from deeplimit.gradient import DriftWarning
from deeplimit.gradient.adjoint import switches
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

ADJOINT = replace(SMALL, gradient="adjoint", step=0.1)


def naive(recipe: Recipe, runs: Path) -> tuple[torch.nn.Module, list[float]]:
    """The same training written down as plainly as it can be: the network, the drift per epoch."""
    data = load_data(recipe, runs)
    model = use_adjoint(build_model(recipe, data), evaluations=recipe.evaluations)
    objective = StageCost(model, loss_of(recipe, data), recipe.stage_cost, recipe.control_cost)
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
        for x, y in batches(data.train, recipe.batch_size, seed=recipe.seed, epoch=epoch):
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
    assert "layer" in warning
    assert re.search(r"may be off by up to 0\.\d+ of its size", warning)
    assert "evaluations 2 instead of 1" in warning
    rows = folder.metrics()
    assert rows[-1]["drift"] is not None
    assert rows[-1]["drift"] > 0.01
    assert f"drift {rows[-1]['drift']:.2g}" in lines[-1]
    assert len(lines) == 1 + len(told) + DRIFTING.epochs


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
