"""One process or several: the device, the strategy, what only the first does; same numbers."""

import atexit
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar, cast

import numpy as np
import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins import DoublePrecision
from lightning_fabric.strategies.model_parallel import ModelParallelStrategy
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from deeplimit.control import StageCost
from deeplimit.errors import InputError, RunError
from deeplimit.training.companions import join
from deeplimit.training.recipe import Recipe

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
SMALL = 2**14  # entries of a residual function's matrix that one thread multiplies in microseconds
Result = TypeVar("Result")


def place(recipe: Recipe) -> Recipe:
    """The recipe with the devices it will really run on, checked against this machine.

    Under torchrun the number of processes is torchrun's.

    Raises:
        InputError: no such device, fewer than asked for, or another number than torchrun's.
    """
    local = os.environ.get("LOCAL_WORLD_SIZE")
    if torch.distributed.is_torchelastic_launched() and local is not None:
        if recipe.devices not in (1, int(local)):
            raise InputError(
                f"devices is {recipe.devices}, torchrun started {local} processes; leave devices "
                "out under torchrun"
            )
        recipe = replace(recipe, devices=int(local))
        if recipe.batch_size % (world := processes()):
            raise InputError(
                f"batch_size is {recipe.batch_size}, which {world} processes cannot share equally; "
                f"give a multiple of {world}"
            )
    if recipe.device == "cuda" and not torch.cuda.is_available():
        raise InputError("device is cuda, but torch sees none here; give cpu or auto")
    if usable_device(recipe).type == "cuda" and recipe.devices > torch.cuda.device_count():
        raise InputError(
            f"devices is {recipe.devices}, but torch sees {torch.cuda.device_count()} CUDA "
            "device(s) here; give at most as many, or the device cpu"
        )
    return recipe


def alone_in(verb: str, recipe: Recipe) -> Recipe:
    """The recipe for a verb that works in one process; InputError where there are several."""
    if processes() > 1:
        raise InputError(f"{verb} works in one process; start it without torchrun")
    return place(replace(recipe, devices=1, strategy="auto"))


def processes() -> int:
    """Returns the number of processes of torchrun on all machines; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if torch.distributed.is_torchelastic_launched() else 1


def shared(recipe: Recipe) -> bool:
    """Says whether the work goes through a strategy for several processes."""
    return recipe.strategy != "auto" or recipe.devices > 1 or processes() > 1


def usable_device(recipe: Recipe) -> torch.device:
    """The recipe's device where this machine has it, else the CPU."""
    cuda = recipe.device != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if cuda else "cpu")


def launch(recipe: Recipe, *, unused: bool = False) -> Fabric:
    """Starts the processes that the recipe asks for, unless torchrun did.

    The command of this process is run once more for each further device: from here on several
    processes run the same program, `fabric.global_rank` tells them apart. Where some parameter may
    be `unused`, without a gradient in some step, ddp has to know, or waits in vain.
    """
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    strategy: Any = recipe.strategy
    machines = max(processes() // recipe.devices, 1)
    if strategy == "fsdp":
        strategy = ModelParallelStrategy(
            shard, data_parallel_size=recipe.devices * machines, tensor_parallel_size=1
        )
    elif unused and shared(recipe):
        strategy = "ddp_find_unused_parameters_true"
    double = recipe.precision == "64-true"  # as an object: by name it is refused under fsdp
    fabric = Fabric(
        accelerator=usable_device(recipe).type,
        devices=recipe.devices,
        num_nodes=machines,
        strategy=strategy,
        precision=None if double else recipe.precision,
        plugins=DoublePrecision() if double else None,
    )
    join(fabric)
    atexit.unregister(_leave)
    atexit.register(_leave)
    return fabric


def _leave() -> None:
    """Lets gloo's worker threads drop the last collective's tensors before the interpreter ends.

    Such a thread drops its tensor after the main thread has gone on, and needs the interpreter's
    lock for it; asked for while the interpreter ends, that aborts the process (one exit in ten).
    Destroying the process group does not help: others refer to it, and its threads live on.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        time.sleep(0.25)
        if torch.distributed.get_backend() == "nccl":
            torch.distributed.destroy_process_group()


def shard(stage_cost: StageCost, mesh: DeviceMesh) -> StageCost:
    """Divides every layer's parameters among the processes, then what is left as one group."""
    blocks = [block for layer in stage_cost.anatomy.layers for block in layer.controls]
    for block in dict.fromkeys(blocks):
        fully_shard(block, mesh=mesh["data_parallel"])
    fully_shard(stage_cost, mesh=mesh["data_parallel"])
    return stage_cost


def first_process_does(fabric: Fabric, action: Callable[[], Result]) -> Result:
    """Runs `action` in the first process; all get its result, or raise its error."""
    error: InputError | RunError | None = None
    result: Any = None
    if fabric.is_global_zero:
        try:
            result = action()
        except (InputError, RunError) as raised:
            error = raised
    if fabric.world_size > 1:
        result, error = fabric.broadcast((result, error))
    if error is not None:
        raise error
    return cast(Result, result)


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


@contextmanager
def fitting_threads(recipe: Recipe) -> Iterator[None]:
    """One thread for networks with small layers, torch's own number for others.

    Sharing such small products gains nothing on a free machine; on a busy one the threads wait for
    each other (20 times slower on two busy cores). Afterwards the number is what it was.
    """
    before = torch.get_num_threads()
    entries = recipe.width * max(recipe.hidden, 1)
    if recipe.kind == "convolutional":  # by channels; the batch says how large the product is
        entries = recipe.width * (recipe.hidden or recipe.width) * recipe.batch_size
    small = recipe.kind != "cifar-resnet" and entries <= SMALL
    torch.set_num_threads(1 if small and recipe.model is None else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
