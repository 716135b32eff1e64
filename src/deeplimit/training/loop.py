"""The loop: an epoch of steps, its evaluation, its checkpoint."""

import copy
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from deeplimit._anatomy.checks import IGNORED
from deeplimit._anatomy.evaluation import Inputs
from deeplimit.control import Fading, turnpike_profile
from deeplimit.control.soft_cross_entropy import check_loss
from deeplimit.errors import InputError
from deeplimit.training.building import (
    Fade,
    Start,
    build_objective,
    evaluation_batches,
    training_batches,
)
from deeplimit.training.checkpoint import Checkpoint, capture, restore, save_checkpoint
from deeplimit.training.determinism import seed_draws, seed_epoch
from deeplimit.training.processes import first_process_does, over_processes
from deeplimit.training.progress import Observer, Row
from deeplimit.training.recipe import Recipe
from deeplimit.training.run_folder import write_metrics
from deeplimit.training.watching import DriftWatch, check_validation, loss_not_finite

Batch = tuple[Inputs, Tensor]


MOMENTUM = 0.9  # of sgd; the one-cycle schedule moves it between 0.85 and 0.95


class Training:
    """All that changes while a network is trained, in one process of possibly several.

    Args:
        fabric: of this process.
        start: what is trained.
        folder: where checkpoints and metrics go; nowhere without it.

    Attributes:
        objective: the stage cost around the network that is trained; under fsdp its parameters are
            divided among the processes.
        network: in the first process, a whole copy of the network on its device, as of the last
            epoch's end: what is evaluated, checkpointed and saved. It lives in 32 bits.
        learning: what the optimiser moves: the network, or with a teacher that learns both.
        drift: what watches the rebuilt states under the adjoint.
        rows: metrics of the epochs done.
        steps: optimisation steps done.
    """

    def __init__(self, fabric: Fabric, start: Start, folder: Path | None):
        self.fabric, self.folder = fabric, folder
        recipe, data = self.recipe, self.data = start.recipe, start.data
        self.rows: list[Row] = []
        self.steps = 0
        self.steps_per_epoch = len(self._batches(epoch=0))
        self.network = start.model
        model = copy.deepcopy(start.model).train()
        self.fade = start.fade or Fade((), 1.0)
        # Before the adjoint, which then rebuilds the states of a faded block too.
        self._fadings = [Fading(m, self.fade.layers) for m in (self.network, model)]
        self.objective = build_objective(recipe, data, model, start.teaching)
        self.drift = None
        if recipe.gradient == "adjoint":
            self.drift = DriftWatch(fabric, self.objective.model)
        self.module: Any = fabric.setup_module(self.objective)
        # Only now: under fsdp the parameters have become other objects.
        learns = start.teaching is not None and start.teaching.learns
        self.learning = self.objective if learns else self.objective.model
        self.optimizer = build_optimizer(recipe, self.learning)
        self.schedule = OneCycleLR(
            self.optimizer,
            max_lr=recipe.learning_rate,
            total_steps=recipe.epochs * self.steps_per_epoch,
        )
        self.stepper: Any = fabric.setup_optimizers(self.optimizer)
        if fabric.is_global_zero:
            self.network.to(fabric.device)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Goes back to where a checkpoint was taken."""
        planned = checkpoint.scheduler.get("total_steps")
        if planned != self.schedule.total_steps:
            raise InputError(
                f"the checkpoint is of a training of {planned} steps, the recipe and its data now "
                f"make {self.schedule.total_steps}; put epochs, batch_size, devices and data back, "
                "or go on from the finished network: deeplimit train DATA --model RUN"
            )
        restore(checkpoint, self.learning, self.optimizer, self.schedule)
        self.network.load_state_dict(self._of_network(checkpoint.model))
        self.rows, self.steps = list(checkpoint.rows), checkpoint.step

    def end(self) -> nn.Module:
        """The network, whole again where layers were faded out."""
        for fading in self._fadings:
            fading.end()
        return self.network

    def run_epoch(self, observer: Observer, check: Callable[[], None]) -> None:
        """One pass over the training data, evaluated, with a checkpoint.

        Args:
            observer: told of every step and of the epoch.
            check: called after every step and at the end; may raise to stop.

        Raises:
            RunError: a loss that is not finite, or a disk that is full; the last good checkpoint is
                still there.
        """
        began = time.perf_counter()
        epoch = len(self.rows)
        seed_epoch(self.recipe.seed, epoch, self.fabric.global_rank)
        seed_draws(self.objective.draws, self.recipe.seed, epoch)
        self.module.train()
        sums = torch.zeros(3, dtype=torch.float64, device=self.fabric.device)
        if self.drift is not None:
            self.drift.largest = 0.0

        def figures() -> tuple[float, float]:
            loss, hits, count = sums.tolist()
            return loss / count, hits / count

        for batch in self._batches(epoch):
            sums += self._step(self.fabric.to_device(batch), observer)
            observer.step(figures)
            check()
        sums = over_processes(self.fabric, sums, "sum")
        weights, optimizer = capture(self.learning, self.optimizer)

        def judge() -> Row:
            """Evaluates the gathered weights and writes them down."""
            self.network.load_state_dict(self._of_network(weights))
            loss, accuracy = figures()
            trained: Row = {"epoch": float(epoch + 1), "loss": loss, "accuracy": accuracy}
            row = trained | self._validate() | {"seconds": time.perf_counter() - began}
            row["drift"] = None if self.drift is None else self.drift.largest
            rows = [*self.rows, row]
            state = self.schedule.state_dict()
            checkpoint = Checkpoint(weights, optimizer, state, self.steps, rows)
            if self.folder is not None:
                save_checkpoint(self.folder, checkpoint)
                write_metrics(self.folder, rows)
            return row

        row = first_process_does(self.fabric, judge)
        self.rows.append(row)
        observer.epoch(row)
        check()

    def _step(self, batch: Batch, observer: Observer) -> Tensor:
        """One optimisation step; sums of loss, hits and samples in this process's part."""
        step = self.fade.step(self.steps / (self.recipe.epochs * self.steps_per_epoch))
        for fading in self._fadings:
            fading.set_step(step)
        self.stepper.zero_grad(set_to_none=True)
        cost, logits = self.module(*batch)
        self.fabric.backward(cost)
        self.steps += 1
        # While the parameters are still those that made the cost, and in all processes together.
        if not math.isfinite(over_processes(self.fabric, cost.detach(), "mean").item()):
            structure, done = self.objective.anatomy, len(self.rows)
            raise loss_not_finite(self.fabric, self.module, structure, batch, self.steps, done)
        if self.drift is not None:
            self.drift.look(observer)
        self.stepper.step()
        self.schedule.step()
        with torch.no_grad():
            losses = self.objective.loss(logits, batch[1]).double()
            hits = (logits.argmax(-1) == batch[1]).double()
            count = (batch[1] != IGNORED).double().sum()
            return torch.stack([losses.sum(), hits.sum(), count])

    def _of_network(self, weights: dict[str, Any]) -> dict[str, Any]:
        """Without those of a teacher that learns."""
        if self.learning is self.objective.model:
            return weights
        own = "model."
        return {k.removeprefix(own): v for k, v in weights.items() if k.startswith(own)}

    def _validate(self) -> Row:
        """The metrics of the whole network on validation data."""
        loader = evaluation_batches(self.data.validation)
        profile = turnpike_profile(
            self.network, loader, check_loss(self.objective.loss), updates=False
        )
        check_validation(profile, len(self.rows))
        entry = profile.entry()
        return {
            "validation_loss": profile.loss[-1],
            "validation_accuracy": profile.accuracy[-1],
            "entry": None if entry is None else float(entry),
            "learning_rate": float(self.schedule.get_last_lr()[0]),
        }

    def _batches(self, epoch: int) -> Any:
        rank, world = self.fabric.global_rank, self.fabric.world_size
        return training_batches(self.recipe, self.data, epoch, rank, world)


def build_optimizer(recipe: Recipe, model: nn.Module) -> Optimizer:
    """The recipe's optimiser, with nothing done yet."""
    settings: dict[str, Any] = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay}
    if recipe.optimizer == "sgd":
        return SGD(model.parameters(), momentum=MOMENTUM, nesterov=True, **settings)
    return AdamW(model.parameters(), fused=True, **settings)
