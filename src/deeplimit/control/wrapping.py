"""Wrappers that average gradients over processes: they belong around the objective."""

import gc
import sys
from collections.abc import Callable
from typing import cast

import torch
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from deeplimit.errors import InputError

SHARDED = ("FSDPModule", "FullyShardedDataParallel")


def _wrappers() -> tuple[type, ...]:
    """The classes of wrappers; of sharded ones where somebody has imported them."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    found = [vars(fsdp)[name] for name in SHARDED] if fsdp else []
    return (DistributedDataParallel, DataParallel, *found)


def check_bare(model: object) -> None:
    """Raises InputError for a model that is wrapped, or has a part that is."""
    if not isinstance(model, nn.Module):
        return
    kinds = _wrappers()
    wrapped = next((m for m in model.modules() if isinstance(m, kinds)), None)
    if wrapped is not None:
        raise InputError(
            f"the model is wrapped in {type(wrapped).__name__} already; give StageCost the "
            "bare model, then wrap the StageCost"
        )


class AroundWatch:
    """Notices forward passes with gradients that go around the wrapper of what is trained.

    A DistributedDataParallel averages the gradients of those passes that came through it. Where its
    module is called past it, by an objective beside it, every process trains on by itself. A module
    is not told that it is wrapped, so wrappers are looked for among all objects, which takes as
    long as a garbage collection: at the passes 1, 2, 4, 8, …
    """

    def __init__(self) -> None:
        self._passes = 0

    def look(self, objective: nn.Module) -> None:
        """Refuses a forward pass past a wrapper of a module that is trained; called in each."""
        if not (torch.is_grad_enabled() and dist.is_available() and dist.is_initialized()):
            return
        active: Callable[[], nn.Module | None] = DistributedDataParallel._get_active_ddp_module  # noqa: SLF001
        came_through = active() is not None
        if came_through or dist.get_world_size() == 1:
            return
        passes = self._passes + 1
        if passes & (passes - 1) == 0 and _around(objective) is not None:
            gc.collect()  # it may be one that nobody uses any more
            wrapper = _around(objective)
            if wrapper is not None:
                name, processes = type(objective).__name__, dist.get_world_size()
                raise InputError(
                    f"{type(wrapper.module).__name__} is wrapped in DistributedDataParallel, and "
                    f"this {name} goes around the wrapper: gradients of the {processes} processes "
                    f"would not be averaged; wrap the {name} instead and call what wraps it (give "
                    "it to a Trainer as its model)"
                )
        self._passes = passes


def _around(objective: nn.Module) -> DistributedDataParallel | None:
    """A wrapper of a module of the objective's that is trained; None if there is none."""
    trained = {
        m for m in objective.modules() if any(p.requires_grad for p in m.parameters(recurse=False))
    }
    for found in gc.get_objects():
        # By the type: asked for its class, a proxy might do anything.
        if not issubclass(type(found), DistributedDataParallel) or "module" not in found._modules:
            continue
        alone = dist.get_world_size(found.process_group) == 1
        if alone or found._use_python_reducer:  # noqa: SLF001
            continue
        if not trained.isdisjoint(found.module.modules()):
            return cast(DistributedDataParallel, found)
    return None
