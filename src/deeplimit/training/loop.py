"""The loop: an epoch of steps, its evaluation, its checkpoint, and what goes wrong on the way."""

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from deeplimit._anatomy import anatomy
from deeplimit._anatomy.checks import IGNORED
from deeplimit._anatomy.evaluation import Inputs
from deeplimit.control import Distillation, Fading, crop, turnpike_profile
from deeplimit.control.soft_cross_entropy import check_loss
from deeplimit.errors import InputError, RunError
from deeplimit.gradient import MemoryPlan, drift, use_adjoint
from deeplimit.gradient.accuracy import Measurement
from deeplimit.gradient.automatic import EVERY, followed
from deeplimit.gradient.codes import BITS
from deeplimit.gradient.meter import Settings
from deeplimit.gradient.planning import EXACTLY
from deeplimit.gradient.stand_ins import engines, switches
from deeplimit.records import from_plain, to_plain
from deeplimit.training import building
from deeplimit.training.checkpoint import Checkpoint, capture, restore, save_checkpoint
from deeplimit.training.processes import first_process_does, seed_draws, seed_epoch
from deeplimit.training.progress import Observer, Row
from deeplimit.training.recipe import Recipe
from deeplimit.training.run_folder import write_metrics

Batch = tuple[Inputs, Tensor]
WARM = 0.3  # of the epochs: up to there the learning rate rises, and no layer goes
MOMENTUM = 0.9  # of sgd; the one-cycle schedule moves it between 0.85 and 0.95


class Training:
    """All that changes while a network is trained, in one process of possibly several.

    Checkpoints and metrics go into the folder, if there is one.

    Attributes:
        objective: the stage cost around the network that is trained; under fsdp its parameters are
            divided among the processes.
        network: in the first process, a whole copy of the network on its device, as of the last
            epoch's end: what is evaluated, checkpointed and saved. It lives in 32 bits.
        learning: what the optimiser moves: the network, or with a teacher that learns both.
        drift: what watches the rebuilt states under the adjoint.
        rows, steps: metrics of the epochs done, and optimisation steps done.
    """

    def __init__(self, fabric: Fabric, start: building.Start, folder: Path | None):
        self.fabric: Any = fabric
        self.start, self.folder = start, folder
        recipe = self.recipe = start.recipe
        self.data = start.data
        self.rows: list[Row] = []
        self.steps = 0
        self.steps_per_epoch = len(self._batches(epoch=0))
        self.network = start.model
        model = copy.deepcopy(start.model).train()
        self.fade, self._fadings = start.fade, list[Fading]()
        if self.fade is not None:
            # Before the adjoint, which then rebuilds the states of a faded block too.
            self._fadings = [Fading(m, self.fade.layers) for m in (self.network, model)]
        self.drift = None
        self.plan: MemoryPlan | None = None
        if recipe.gradient == "adjoint":
            evaluations = None if recipe.bits else recipe.evaluations
            use_adjoint(model, evaluations=evaluations, bits=recipe.bits, on_drift="ignore")
            self.drift = DriftWatch(fabric, model)  # tells it, for all processes together
            (engine,) = engines(model)
            if engine.auto is not None:
                engine.auto.remove()  # all processes follow one plan, which is made below
        building.freeze_frame(recipe, model)
        self.objective = building.stage_cost(recipe, self.data, model, start.objective)
        self.module: Any = fabric.setup_module(self.objective)
        # Only now: under fsdp the parameters have become other objects.
        learns = isinstance(self.objective, Distillation) and self.objective.learns
        self.learning = self.objective if learns else self.objective.model
        self.optimizer = build_optimizer(recipe, self.learning)
        if recipe.control_cost_kind == "group":
            self.objective.proximal(self.optimizer)
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
        if checkpoint.plan is not None:
            self.plan = from_plain(MemoryPlan, checkpoint.plan)

    def shortened(self, depth: int) -> "Training":
        """The training of its first layers alone, from where this one is; all processes call it.

        What they have learnt stays, and so does the optimiser's state of their parameters, the
        schedule and the rows: as if the rest had never been there.
        """
        weights, optimizer = capture(self.learning, self.optimizer)
        smaller = crop(self.network, depth)
        names = smaller.state_dict().keys()

        def kept() -> Checkpoint:
            groups = [
                {**group, "params": [name for name in group["params"] if name in names]}
                for group in optimizer["param_groups"]
            ]
            state = {name: one for name, one in optimizer["state"].items() if name in names}
            return Checkpoint(
                {name: value for name, value in weights.items() if name in names},
                {"state": state, "param_groups": groups},
                self.schedule.state_dict(),
                self.steps,
                self.rows,
            )

        made = Training(self.fabric, replace(self.start, model=smaller.cpu()), self.folder)
        made.restore(first_process_does(self.fabric, kept))
        return made

    def end(self) -> nn.Module:
        """The network, whole again where layers were faded out."""
        for fading in self._fadings:
            fading.end()
        return self.network

    def run_epoch(self, observer: Observer, check: Callable[[], None]) -> None:
        """One pass over the training data, evaluated, with a checkpoint.

        The observer is told of every step and of the epoch; `check` is called after every step and
        at the end, and may raise to stop.

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

        for i, given in enumerate(self._batches(epoch)):
            batch = self.fabric.to_device(given)
            doubled = self.steps & (self.steps - 1) == 0 or self.steps % EVERY == 0
            if self.recipe.bits == "auto" and (i == 0 or doubled):
                self._follow_plan(batch, observer)
            sums += self._step(batch, observer)
            observer.step(figures)
            check()
        sums = self.fabric.all_reduce(sums, reduce_op="sum")
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
            plan = None if self.plan is None else to_plain(self.plan)
            checkpoint = Checkpoint(weights, optimizer, state, self.steps, rows, plan)
            if self.folder is not None:
                save_checkpoint(self.folder, checkpoint)
                write_metrics(self.folder, rows)
            return row

        row = first_process_does(self.fabric, judge)
        self.rows.append(row)
        observer.epoch(row)
        check()

    def _follow_plan(self, batch: Batch, observer: Observer) -> None:
        """Measures the plan of the states on a batch; makes another if it errs.

        At the start of each epoch, after 1, 2, 4, … steps, and after each EVERY. In the first
        process, by a copy where there are others, which nothing around it speaks with.
        """
        (engine,) = engines(self.objective.model)

        def measured() -> tuple[MemoryPlan | None, str]:
            alone = self.fabric.world_size == 1
            objective = self.objective if alone else copy.deepcopy(self.objective)
            with self.fabric.autocast():
                measure = Measurement(objective, lambda o, b: o(*b)[0], batch, **EXACTLY)
                if not measure.tells:
                    return self.plan, ""
                return followed(self.plan, measure, engine.settings.tolerance)

        self.plan, words = first_process_does(self.fabric, measured)
        if self.plan is None:
            return
        # What the meter's bounds say is said by measuring.
        engine.settings = replace(engine.settings, ways=self.plan.ways, measured=(0.0, math.inf))
        if words and self.fabric.is_global_zero:
            observer.warn(words)

    def _step(self, batch: Batch, observer: Observer) -> Tensor:
        """One optimisation step; sums of loss, hits and samples in this process's part."""
        every = self.recipe.epochs * self.steps_per_epoch
        if self.fade is not None:
            step = self.fade.step(self.steps / every)
            for fading in self._fadings:
                fading.set_step(step)
        if self.recipe.stage_cost_grows:
            self.objective.weight = self.recipe.stage_cost * ((self.steps + 1) / every) ** 2
        self.stepper.zero_grad(set_to_none=True)
        cost, logits = self.module(*batch)
        self.fabric.backward(cost)
        self.steps += 1
        # While the parameters are still those that made the cost, and in all processes together.
        if not math.isfinite(self.fabric.all_reduce(cost.detach(), reduce_op="mean").item()):
            raise self._loss_not_finite(batch)
        if self.drift is not None:
            self.drift.look(observer)
        self.stepper.step()
        self.schedule.step()
        with torch.no_grad():
            losses = self.objective.loss(logits, batch[1]).double()
            hits = (logits.argmax(-1) == batch[1]).double()
            count = (batch[1] != IGNORED).double().sum()
            return torch.stack([losses.sum(), hits.sum(), count])

    def _loss_not_finite(self, batch: Batch) -> RunError:
        """The error for a batch whose cost is not finite; all processes call it together.

        The parameters must still be those that the cost was computed with.
        """
        structure = self.objective.anatomy
        with torch.no_grad(), structure.recording() as states:
            self.module(*batch)
        sizes = torch.stack([state.abs().max().float() for state in states])
        sizes = sizes.where(sizes.isfinite(), math.inf)
        largest = self.fabric.all_reduce(sizes, reduce_op="max").tolist()
        layer = next((n for n, size in enumerate(largest) if math.isinf(size)), None)
        where = "the first state that is not finite is"
        if layer is None:
            layer = largest.index(max(largest))
            where = f"the states are finite, the largest number in them, {largest[layer]:.2g}, is"
        done = len(self.rows)
        return RunError(
            f"the loss is not finite at step {self.steps} (epoch {done + 1}): {where} at layer "
            f"{layer} of {structure.horizon}; {_remedy(done, self.steps)}"
        )

    def _of_network(self, weights: dict[str, Any]) -> dict[str, Any]:
        """Without those of a teacher that learns."""
        if self.learning is self.objective.model:
            return weights
        own = "model."
        return {k.removeprefix(own): v for k, v in weights.items() if k.startswith(own)}

    def _validate(self) -> Row:
        """The metrics of the whole network on validation data."""
        loader = building.evaluation_batches(self.data.validation)
        loss = check_loss(self.objective.loss)
        profile = turnpike_profile(self.network, loader, loss, updates=False)
        # A network may have become worthless without its training loss showing it.
        bad = next((n for n, loss in enumerate(profile.loss) if not math.isfinite(loss)), None)
        if bad is not None:
            done = len(self.rows)
            raise RunError(
                f"the validation loss is not finite after epoch {done + 1}: the first layer where "
                f"it is not is layer {bad} of {profile.horizon}; {_remedy(done)}"
            )
        entry = profile.entry()
        row: Row = {
            "validation_loss": profile.loss[-1],
            "validation_accuracy": profile.accuracy[-1],
            "entry": None if entry is None else float(entry),
            "learning_rate": float(self.schedule.get_last_lr()[0]),
        }
        if self.recipe.cut_while_training:
            enough = profile.depth_within(self.recipe.points / 100)
            row |= {"layers": float(profile.horizon), "enough": float(enough)}
        return row

    def _batches(self, epoch: int) -> Any:
        rank, world = self.fabric.global_rank, self.fabric.world_size
        return building.training_batches(self.recipe, self.data, epoch, rank, world)


def depth_due(recipe: Recipe, rows: Sequence[Row]) -> int | None:
    """The depth to which a network is to be cut now; None where it stays as it is.

    It is the largest that the rule found at the last so many evaluations, all of one network.
    """
    last = rows[-recipe.cut_while_training :] if recipe.cut_while_training else []
    if len(last) < max(recipe.cut_while_training, 1) or len(rows) < WARM * recipe.epochs:
        return None
    depth = max(max(int(row["enough"] or 0) for row in last), 1)
    layers = {row["layers"] for row in last}
    return depth if len(layers) == 1 and depth < (last[-1]["layers"] or 0) else None


def build_optimizer(recipe: Recipe, model: nn.Module) -> Optimizer:
    """The recipe's optimiser, with nothing done yet."""
    settings: dict[str, Any] = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay}
    if recipe.optimizer == "sgd":
        return SGD(model.parameters(), momentum=MOMENTUM, nesterov=True, **settings)
    return AdamW(model.parameters(), fused=True, **settings)


def _remedy(done: int, step: int = 0) -> str:
    kept = f"the checkpoint after epoch {done} is kept; " if done else ""
    if step == 1:  # nothing has been learnt, so the learning rate is not to blame
        return "look for huge numbers in the data, or give smaller costs or a smaller step"
    return f"{kept}train with a smaller learning rate"


def _more(settings: Settings) -> str:
    """What makes states more exact."""
    if settings.bits == "auto":
        return "bits 8"
    if settings.bits:
        return "bits auto" if settings.bits == BITS[-1] else f"bits {2 * settings.bits} or auto"
    e = settings.evaluations
    return f"evaluations {e + 1} instead of {e}"


class DriftWatch:
    """Looks at the drift of every step, in all processes together; says so when it is too large,
    and again when it is ten times larger.

    The engines themselves are to keep silent: each would speak for its own process.

    Attributes:
        largest: the largest drift since it was last put back to 0.
    """

    def __init__(self, fabric: Fabric, model: nn.Module):
        self.fabric: Any = fabric
        self.model = model
        self.largest = 0.0
        self._told = 0.0
        blocks = [switch.step.name for switch in switches(model)]
        names = {module: name for name, module in model.named_modules()}
        layers = [names[layer.controls[0]] for layer in anatomy(model).layers]
        # Layers by their numbers in the whole network, then what else is rebuilt, by its name.
        self._places = [*layers, *(name for name in blocks if name not in layers)]
        self._words = [f"layer {n}" for n in range(len(layers))] + self._places[len(layers) :]

    def look(self, observer: Observer) -> None:
        """After a backward pass; all processes call it together."""
        drifts = torch.zeros(len(self._places), dtype=torch.float64, device=self.fabric.device)
        engine, mine = engines(self.model)[0], drift(self.model)
        at = engine.meter.drift_at
        drifts[self._places.index(at) if at else 0] = math.inf if math.isnan(mine) else mine
        drifts = self.fabric.all_reduce(drifts, reduce_op="max")
        found, place = float(drifts.max()), self._words[int(drifts.argmax())]
        self.largest = max(self.largest, found)
        settings, bound = engine.settings, engine.meter.error_bound(found)
        if settings.bits:  # of codes the drift alone tells little
            expected = torch.tensor(engine.meter.expected(settings), device=self.fabric.device)
            bound = float(self.fabric.all_reduce(expected, reduce_op="max"))
        if bound <= settings.tolerance or found < 10 * self._told:
            return
        self._told = found
        if self.fabric.is_global_zero:
            observer.warn(
                f"drift {found:.2g} at {place}: rebuilt states are off by that part of a "
                f"layer's update, so the gradient may be off by up to {bound:.2g} of its size. "
                f"Train with {_more(settings)}, a smaller step, or the gradient backprop"
            )
