"""Same seed, same numbers: what has to be switched for that, and how many threads are worth it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from deeplimit.training.recipe import Recipe

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """Deterministic algorithms on CUDA; torch's random state and switches are put back after.

    An operation without a deterministic algorithm warns and runs. On the CPU the same number of
    threads is enough.
    """
    cuda = device.type == "cuda"
    before = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    memory = torch.utils.deterministic
    fills = memory.fill_uninitialized_memory  # type: ignore[attr-defined]
    with torch.random.fork_rng(devices=[device] if cuda else []):
        if not cuda:
            yield
            return
        os.environ.setdefault(CUBLAS, ":4096:8")
        # As slow as it is needless: nothing here reads memory that it has not written.
        memory.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.use_deterministic_algorithms(mode=True, warn_only=True)
        try:
            with torch.backends.cudnn.flags(benchmark=False, deterministic=True, allow_tf32=True):
                yield
        finally:
            torch.use_deterministic_algorithms(before, warn_only=warns)
            memory.fill_uninitialized_memory = fills  # type: ignore[attr-defined]


def seed_epoch(seed: int, epoch: int, process: int) -> None:
    """Makes what torch draws in an epoch a function of (seed, epoch, process).

    So a checkpoint needs no random state, and a resumed run draws what an unbroken one does.
    """
    torch.manual_seed(int(np.random.SeedSequence([seed, epoch, process]).generate_state(1)[0]))


def seed_draws(draws: torch.Generator, seed: int, epoch: int) -> None:
    """The same for what all processes draw alike."""
    sequence = np.random.SeedSequence([seed, epoch], spawn_key=(1,))
    draws.manual_seed(int(sequence.generate_state(1)[0]))


SMALL = 2**14  # entries of a residual function's matrix that one thread multiplies in microseconds


@contextmanager
def fitting_threads(recipe: Recipe) -> Iterator[None]:
    """One thread for networks of vectors with small layers, torch's own number for others.

    Sharing such small products gains nothing on a free machine; on a busy one the threads wait for
    each other (20 times slower on two busy cores). Afterwards the number is what it was.
    """
    before = torch.get_num_threads()
    small = recipe.kind in ("logit", "vector") and recipe.width * max(recipe.hidden, 1) <= SMALL
    torch.set_num_threads(1 if small and recipe.model is None else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
