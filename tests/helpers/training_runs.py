"""Small recipes and whole runs that the tests of this room share."""

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from deeplimit.training import recipe_for
from deeplimit.training.checkpoint import Checkpoint, load_checkpoint

SMALL = replace(
    recipe_for("spirals"),
    depth=(4,),
    hidden=8,
    step=0.5,
    epochs=3,
    batch_size=50,
    control_cost=0.05,
    device="cpu",
)


def checkpoint_of(run: Path) -> Checkpoint:
    checkpoint = load_checkpoint(run)
    assert checkpoint is not None
    return checkpoint


def largest_difference(a: Checkpoint, b: Checkpoint) -> float:
    """Of all parameters, buffers and optimiser states."""
    assert a.model.keys() == b.model.keys()
    first, second = a.optimizer["state"], b.optimizer["state"]
    assert first.keys() == second.keys()
    pairs = [(a.model[k], b.model[k]) for k in a.model]
    pairs += [(first[k][name], second[k][name]) for k in first for name in first[k]]
    return max(float((x.double() - y.double()).abs().max()) for x, y in pairs)


def same_but_for_seconds(a: Checkpoint, b: Checkpoint) -> bool:
    def timeless(checkpoint: Checkpoint) -> list[dict[str, float | None]]:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in checkpoint.rows]

    return timeless(a) == timeless(b)


def one_thread() -> dict[str, str]:
    """The environment of a process that computes as a test with one thread does."""
    return os.environ | {"OMP_NUM_THREADS": "1"}


def run_script(script: Path, *args: str, torchrun: int = 0) -> subprocess.CompletedProcess[str]:
    """Runs a script, under torchrun with so many processes if asked; it must succeed."""
    launcher = [sys.executable]
    if torchrun:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={torchrun}"]
    done = subprocess.run(
        [*launcher, str(script), *args],
        env=one_thread(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


def equal_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@contextmanager
def files_at_most(size: int) -> Iterator[None]:
    """Every longer file fails to be written, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
