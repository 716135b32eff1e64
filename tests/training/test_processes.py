"""Several processes against one, and a killed run against an unbroken one: real processes."""

import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from bare_process import BareProcess
from greys import dino, greys
from training_runs import (
    SMALL,
    checkpoint_of,
    equal_weights,
    largest_difference,
    one_thread,
    run_script,
    same_but_for_seconds,
)

from deeplimit.control import vanished
from deeplimit.training import Recipe, RunFolder, heal, load_data, resume, train

pytestmark = pytest.mark.processes

EXACT = replace(SMALL, precision="64-true", control_cost=0.3, epochs=2)
IMAGES = Recipe(
    data="npz:images.npz",
    kind="convolutional",
    depth=(3, 1),
    width=4,
    hidden=4,
    norm="none",
    reduction=2,
    scheme="heun",
    stage_cost=0.25,
    stage_cost_layers=2,
    control_cost=0.1,
    crop=1,
    flip=True,
    epochs=2,
    batch_size=40,
    precision="64-true",
    device="cpu",
)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Two stages with a projection between, Heun, augmentation, no BatchNorm."""
    generator = np.random.default_rng(0)
    y = np.arange(300) % 3
    x = generator.integers(0, 120, (300, 3, 8, 8))
    x[np.arange(300), y] += 60
    path = tmp_path_factory.mktemp("data") / "images.npz"
    np.savez(path, x=x.astype(np.uint8), y=y)
    return replace(IMAGES, data=f"npz:{path}")


def script(path: Path, body: str) -> Path:
    path.write_text(
        "import os, sys\nfrom dataclasses import replace\nfrom pathlib import Path\n"
        "from deeplimit.training import Recipe, train\n\n"
        "if __name__ == '__main__':\n" + textwrap.indent(textwrap.dedent(body), "    ")
    )
    return path


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["own", "torchrun"])
def test_two_processes_are_one(launcher: str, images: Recipe, tmp_path: Path) -> None:
    """One script, run by both processes, trains by ddp and fsdp, and by one of them with states
    rebuilt: with Fabric's launcher on vectors, with torchrun on images. Each process says what it
    returned."""
    recipe = EXACT if launcher == "own" else images
    (tmp_path / "recipe.toml").write_text(recipe.to_toml())
    devices = "devices=2, " if launcher == "own" else ""  # torchrun's number holds
    two = script(
        tmp_path / "two.py",
        f"""
        runs = Path(sys.argv[1])
        recipe = Recipe.from_toml(runs / "recipe.toml")
        for name in sys.argv[2:]:
            strategy, gradient = name.split("-")
            how = replace(recipe, {devices}strategy=strategy, gradient=gradient)
            folder = train(how, runs=runs, name=name)
            rank = os.environ.get("LOCAL_RANK")
            print(f"{{rank}} {{folder.path.name}}\\n", end="", flush=True)  # one write for a line
        """,
    )
    names = ["ddp-backprop", "fsdp-backprop"]
    names.append("ddp-adjoint" if launcher == "own" else "fsdp-adjoint")
    said = run_script(two, str(tmp_path), *names, torchrun=0 if launcher == "own" else 2)
    returned = [f"{rank} {name}" for rank in (0, 1) for name in names]
    assert sorted(said.stdout.split("\n")) == sorted(["", *returned])
    assert said.stderr.count("epoch 2/2") == 3  # one process speaks
    ones = {
        gradient: checkpoint_of(
            train(replace(recipe, gradient=gradient), runs=tmp_path, name=gradient).path
        )
        for gradient in ("backprop", "adjoint")
    }
    for name in names:
        gradient = name.split("-")[1]
        one, several = ones[gradient], checkpoint_of(tmp_path / name)
        assert largest_difference(one, several) < 1e-12
        for mine, theirs in zip(one.rows, several.rows, strict=True):
            for figure in ("loss", "accuracy", "validation_loss", "validation_accuracy", "entry"):
                assert mine[figure] == pytest.approx(theirs[figure], abs=1e-6)
            # Each process measures its own part of the batch: the largest is at least the whole's.
            assert (mine["drift"] is None) == (theirs["drift"] is None) == (gradient == "backprop")
            assert mine["drift"] is None or theirs["drift"] > 0.9 * mine["drift"] > 0
        assert RunFolder.open(tmp_path / name).recipe.devices == 2
    one = ones["backprop"]
    assert largest_difference(one, ones["adjoint"]) > 1e-9  # states were rebuilt
    free = train(replace(recipe, control_cost=0.0), runs=tmp_path, name="free", quiet=True)
    assert largest_difference(one, checkpoint_of(free.path)) > 1e-4  # the control cost did act


@pytest.mark.slow
def test_two_processes_wait_for_no_gradient_that_never_comes(
    tmp_path: Path, bare_process: BareProcess
) -> None:
    """A model with a parameter that has none, and layers that fade to nothing, by ddp."""
    pytest.importorskip("transformers", reason="the extra `hub` is not installed")
    recipe = Recipe(
        data=greys(tmp_path),
        epochs=2,
        batch_size=50,
        precision="64-true",
        device="cpu",
    ).of_model(dino(tmp_path))
    (tmp_path / "recipe.toml").write_text(recipe.to_toml())
    both = script(
        tmp_path / "both.py",
        """
        import torch
        from deeplimit.training import heal, load_data
        runs = Path(sys.argv[1])
        two = replace(Recipe.from_toml(runs / "recipe.toml"), strategy="ddp")
        made = train(two, runs=runs, name="two", quiet=True)
        data = load_data(two, runs)
        healed = heal(made.model(), data, remove=[1], fade=0.5, recipe=two, quiet=True)
        if os.environ.get("LOCAL_RANK", "0") == "0":
            torch.save(healed.state_dict(), runs / "healed.pt")
        """,
    )
    bare_process.run_two(both, str(tmp_path))
    one = train(recipe, runs=tmp_path, name="one", quiet=True)
    apart = largest_difference(checkpoint_of(one.path), checkpoint_of(tmp_path / "two"))
    assert apart < 1e-12
    data = load_data(recipe, tmp_path)
    alone = heal(one.model(), data, remove=[1], fade=0.5, recipe=recipe, quiet=True).state_dict()
    together = torch.load(tmp_path / "healed.pt")
    assert together.keys() == alone.keys()
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_two_processes_stop_together_at_a_loss_that_is_not_finite(
    tmp_path: Path, bare_process: BareProcess
) -> None:
    both = script(
        tmp_path / "both.py",
        """
        from deeplimit.errors import InputError, RunError
        recipe = Recipe(depth=(12,), learning_rate=1e18, device="cpu", strategy="fsdp")
        try:
            train(recipe, runs=sys.argv[1], quiet=True)
        except RunError as error:
            print(f"{error}\\n", end="", flush=True)
        try:
            train(recipe, runs=sys.argv[0], quiet=True)  # a file is in the way
        except InputError as error:
            print(f"{error}\\n", end="", flush=True)
        """,
    )
    lines = bare_process.run_two(both, str(tmp_path)).stdout.splitlines()
    assert len(lines) == 4
    assert len(set(lines)) == 2
    assert sum("the loss is not finite at step" in line for line in lines) == 2
    assert sum("a file is in the way" in line for line in lines) == 2


@pytest.mark.slow
def test_in_two_processes_the_control_cost_is_that_of_one(
    tmp_path: Path, bare_process: BareProcess
) -> None:
    """The norm of a group is that of the whole, also where its parameters are divided; the kinetic
    energy is charged by the adjoint."""
    group = replace(EXACT, depth=(6,), control_cost=4.0, control_cost_kind="group")
    kinetic = replace(group, control_cost_kind="kinetic", gradient="adjoint", evaluations=4)
    recipes = {"group": group, "kinetic": kinetic}
    for kind, recipe in recipes.items():
        (tmp_path / f"{kind}.toml").write_text(recipe.to_toml())
    two = script(
        tmp_path / "two.py",
        """
        for kind in ("group", "kinetic"):
            recipe = Recipe.from_toml(f"{sys.argv[1]}/{kind}.toml")
            for name in ("ddp", "fsdp"):
                train(replace(recipe, strategy=name), runs=sys.argv[1], name=f"{kind}-{name}")
        """,
    )
    bare_process.run_two(two, str(tmp_path))
    for kind, recipe in recipes.items():
        one = train(recipe, runs=tmp_path, name=kind, quiet=True)
        gone = vanished(one.model())
        assert 0 < len(gone) < 6 if kind == "group" else gone == []
        for name in ("ddp", "fsdp"):
            several = tmp_path / f"{kind}-{name}"
            assert largest_difference(checkpoint_of(one.path), checkpoint_of(several)) < 1e-12
            assert vanished(RunFolder.open(several).model()) == gone


@pytest.mark.slow
@pytest.mark.parametrize("kind", [None, "group"])
def test_killed_in_mid_epoch_it_goes_on_to_the_same_result(
    kind: str | None, tmp_path: Path
) -> None:
    recipe = Recipe(
        data="digits", depth=(4,), width=32, hidden=32, epochs=3, batch_size=8, device="cpu"
    )
    if kind is not None:
        recipe = replace(recipe, control_cost=9.5, control_cost_kind=kind)
    (tmp_path / "recipe.toml").write_text(recipe.to_toml())
    alone = script(
        tmp_path / "alone.py",
        "train(Recipe.from_toml(sys.argv[1] + '/recipe.toml'), runs=sys.argv[1], name='killed')",
    )
    process = subprocess.Popen(
        [sys.executable, str(alone), str(tmp_path)], env=one_thread(), stderr=subprocess.PIPE
    )
    killed = tmp_path / "killed"
    while not (killed / "checkpoint" / "latest").exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.1)  # an epoch has 134 steps of more than 1 ms
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert checkpoint_of(killed).epochs < recipe.epochs
    assert not (killed / "model.safetensors").exists()
    resumed = resume(killed, quiet=True)
    unbroken = train(recipe, runs=tmp_path, name="unbroken", quiet=True)
    assert largest_difference(checkpoint_of(killed), checkpoint_of(unbroken.path)) == 0
    assert same_but_for_seconds(checkpoint_of(killed), checkpoint_of(unbroken.path))
    assert resumed.metrics() == tuple(checkpoint_of(killed).rows)
    assert equal_weights(resumed.model(), unbroken.model())
    assert bool(vanished(resumed.model())) == (kind == "group")


@pytest.mark.slow
def test_under_fsdp_the_gradient_of_the_control_cost_lands_first(
    tmp_path: Path, bare_process: BareProcess
) -> None:
    """On CUDA FSDP2 reduces gradients on a stream of its own, onto what is there: the control
    cost's part must be there before, or the two race."""
    first = script(
        tmp_path / "first.py",
        """
        import torch
        from torch.distributed.device_mesh import init_device_mesh
        from deeplimit.control import SoftCrossEntropy, StageCost
        from deeplimit.network import ResidualChain, TwoLayerResidual
        from deeplimit.training.processes import shard

        torch.distributed.init_process_group("gloo")
        torch.manual_seed(0)
        chain = ResidualChain([TwoLayerResidual(2, 6, "tanh") for _ in range(3)])
        cost = StageCost(chain.double(), SoftCrossEntropy(2), weight=0.5, control_cost=0.3)
        shard(cost, init_device_mesh("cpu", (2,), mesh_dim_names=("data_parallel",)))
        seen = {}

        def landed(theta):
            seen.setdefault(theta, []).append(theta.grad.to_local().clone())

        for theta in cost.anatomy.controls:
            theta.register_post_accumulate_grad_hook(landed)
        x = torch.randn(8, 2, dtype=torch.float64)
        cost(x, torch.arange(8) % 2)[0].backward()
        for theta, parts in seen.items():
            assert torch.allclose(parts[0], 0.3 * theta.detach().to_local(), rtol=1e-14)
            assert len(parts) == 2
            assert parts[0].numel() == 0 or not torch.allclose(parts[0], parts[1])
        print(len(seen), flush=True)
        """,
    )
    # The two processes' lines may run into each other.
    assert bare_process.run_two(first).stdout.replace("\n", "") == "99"
