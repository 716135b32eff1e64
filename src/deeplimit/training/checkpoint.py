"""Checkpoints: everything that a stopped run needs to go on to the same result.

checkpoint/epoch-00012.pt holds the run after 12 epochs, checkpoint/latest names the newest. A file
is written aside and renamed, then `latest` moves, and only then is the last but one deleted: at
every moment a whole checkpoint is there, and from the second epoch on two.

There is no random state in it: an epoch's randomness is a function of (seed, epoch, process).
"""

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from deeplimit.errors import InputError
from deeplimit.files import write_text, write_whole
from deeplimit.network.weights import read_pickled
from deeplimit.reading import one_line
from deeplimit.records import coerce
from deeplimit.training.progress import Row

FORMAT = 1
FOLDER, LATEST = "checkpoint", "latest"
NAME = re.compile(r"epoch-\d{5,}\.pt")
WHOLE_ON_CPU = StateDictOptions(full_state_dict=True, cpu_offload=True)


@dataclass(frozen=True)
class Checkpoint:
    """A run after some epochs: the states of network, optimiser and schedule, steps, metrics.

    The network's is whole whatever the strategy, with keys of the bare network; the optimiser's is
    by parameter names. Where the adjoint's states are planned, there is the plan too.
    """

    model: dict[str, Any]
    optimizer: dict[str, Any]
    scheduler: dict[str, Any]
    step: int
    rows: list[Row]
    plan: dict[str, Any] | None = None

    @property
    def epochs(self) -> int:
        """Epochs done."""
        return len(self.rows)


def capture(model: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """State of network and optimiser on the CPU, gathered from all processes, which all call it.

    In the first process they are whole, in the others empty.
    """
    return (
        get_model_state_dict(model, options=WHOLE_ON_CPU),
        get_optimizer_state_dict(model, optimizer, options=WHOLE_ON_CPU),
    )


def restore(
    checkpoint: Checkpoint, model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler
) -> None:
    """Puts a checkpoint's state into network, optimiser and schedule, in every process.

    Raises:
        InputError: it is the checkpoint of another network.
    """
    whole = StateDictOptions(full_state_dict=True)
    try:
        _divide(optimizer, model, checkpoint.optimizer["param_groups"])
        # A copy: under fsdp torch puts the divided tensors into what it is given.
        set_model_state_dict(model, dict(checkpoint.model), options=whole)
        # Not strict: of a parameter that never had a gradient an optimiser keeps nothing. That
        # the network is the same the line before has seen.
        known = StateDictOptions(full_state_dict=True, strict=False)
        set_optimizer_state_dict(model, optimizer, checkpoint.optimizer, options=known)
        planned = scheduler.state_dict()
        for name, value in checkpoint.scheduler.items():
            if type(value) is not type(planned[name]):
                raise TypeError(f"{name} of the schedule is {value!r:.40}")
        scheduler.load_state_dict(checkpoint.scheduler)
    except Exception as error:  # whatever a state that is another network's leads to
        what = f"the checkpoint is not of the network in recipe.toml ({one_line(error)})"
        raise InputError(f"{what}; give the run its own recipe back") from error


def _divide(optimizer: Optimizer, model: nn.Module, saved: Sequence[dict[str, Any]]) -> None:
    """Divides an optimiser's one group as it was when the checkpoint was taken."""
    if len(saved) == len(optimizer.param_groups):
        return  # else the network was refined: rates differ with what a parameter is for
    named = dict(model.named_parameters())
    (group,) = optimizer.param_groups
    optimizer.param_groups[:] = [
        {**group, "params": [named[name] for name in part["params"]]} for part in saved
    ]


def save_checkpoint(run: Path, checkpoint: Checkpoint) -> None:
    """Writes a checkpoint into a run folder; keeps the one before it, deletes older ones.

    Raises:
        RunError: the disk is full or cannot be written to; the last good checkpoint is still there.
    """
    folder = run / FOLDER
    with contextlib.suppress(OSError):  # the write below says why
        folder.mkdir(exist_ok=True)
    path = folder / f"epoch-{checkpoint.epochs:05d}.pt"
    content = {"format": FORMAT, **vars(checkpoint)}
    write_whole(path, lambda file: torch.save(content, file))
    write_text(folder / LATEST, path.name + "\n")
    for needless in (*_newest_first(folder)[2:], *folder.glob(".epoch-*")):
        with contextlib.suppress(OSError):  # a file too many does no harm
            needless.unlink()


def load_checkpoint(run: Path) -> Checkpoint | None:
    """The newest whole checkpoint of a run; None if the run was stopped before its first one.

    Raises:
        InputError: there are checkpoints, but none is whole, or they are of another version.
    """
    problems = []
    for path in _newest_first(run / FOLDER):
        checkpoint, problem = _tried(path)
        if checkpoint is not None:
            return checkpoint
        problems.append(f"{path.name}: {problem}")
    if problems or (run / FOLDER / LATEST).exists():
        why = "; ".join(problems) or "none of the files is left"
        raise InputError(
            f"{run / FOLDER}: no whole checkpoint ({why}); the run cannot go on: train again from "
            f"{run / 'recipe.toml'}"
        )
    return None


def checkpoint_problems(run: Path) -> dict[Path, str]:
    """Says in a line why each of a run's checkpoints cannot be read; nothing where it can."""
    return {path: _tried(path)[1] for path in sorted(_newest_first(run / FOLDER))}


def _tried(path: Path) -> tuple[Checkpoint | None, str]:
    """A checkpoint, or what is wrong with it."""
    try:
        content = read_pickled(path, "damaged", "go on from the one before")
        if content.pop("format") != FORMAT:
            raise InputError("it is of another version of deeplimit")
        checkpoint = Checkpoint(**content)
        kinds = {"model": dict, "optimizer": dict, "scheduler": dict, "step": int}
        for name, kind in kinds.items():
            coerce(kind, getattr(checkpoint, name), name)
        rows = coerce(tuple[dict[str, float | None], ...], checkpoint.rows, "rows")
        return replace(checkpoint, rows=list(rows)), ""
    except Exception as error:  # torch.load raises whatever the damaged bytes lead it to
        return None, one_line(error)


def _newest_first(folder: Path) -> list[Path]:
    """The checkpoints, the one that `latest` names first; newer ones, if any, come last."""
    if not folder.is_dir():
        return []
    paths = sorted((p for p in folder.iterdir() if NAME.fullmatch(p.name)), reverse=True)
    with contextlib.suppress(OSError, UnicodeDecodeError):
        latest = (folder / LATEST).read_text().strip()
        paths.sort(key=lambda path: path.name > latest)
    return paths
