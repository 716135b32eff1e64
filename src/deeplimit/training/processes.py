"""One process or several: the device, the strategy, and what only the first process does."""

import atexit
import logging
import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar, cast

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins import DoublePrecision
from lightning_fabric.strategies.model_parallel import ModelParallelStrategy
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from deeplimit.control import StageCost
from deeplimit.errors import InputError, RunError
from deeplimit.training.companions import join
from deeplimit.training.recipe import Recipe

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
        if recipe.batch_size % processes():
            raise InputError(
                f"batch_size is {recipe.batch_size}, which {processes()} processes cannot share "
                f"equally; give a multiple of {processes()}"
            )
    if recipe.device == "cuda" and not torch.cuda.is_available():
        raise InputError("device is cuda, but torch sees none here; give cpu or auto")
    if device_type(recipe) == "cuda" and recipe.devices > torch.cuda.device_count():
        raise InputError(
            f"devices is {recipe.devices}, but torch sees {torch.cuda.device_count()} CUDA "
            "device(s) here; give at most as many, or the device cpu"
        )
    return recipe


def processes() -> int:
    """How many processes torchrun started on all machines; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if torch.distributed.is_torchelastic_launched() else 1


def shared(recipe: Recipe) -> bool:
    """Whether the work goes through a strategy for several processes."""
    return recipe.strategy != "auto" or recipe.devices > 1 or processes() > 1


def device_type(recipe: Recipe) -> str:
    """Which kind of device the recipe means here: cpu or cuda."""
    if recipe.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return recipe.device


def launch(recipe: Recipe, *, unused: bool = False) -> Fabric:
    """Starts the processes that the recipe asks for, unless torchrun did.

    The command of this process is run once more for each further device: from here on several
    processes run the same program, `fabric.global_rank` tells them apart.

    Args:
        recipe: of the run.
        unused: some parameter may be without a gradient in some step, for which ddp, unless it
            knows, waits in vain.
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
        accelerator=device_type(recipe),
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


def over_processes(fabric: Fabric, tensor: Tensor, operation: str) -> Tensor:
    """The sum or the mean of a tensor over all processes, which all call it."""
    return cast(Tensor, fabric.all_reduce(tensor, reduce_op=operation))


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
