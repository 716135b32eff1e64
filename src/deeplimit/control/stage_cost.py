"""Training as optimal control: the terminal cost and a stage cost at every layer."""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

from deeplimit._anatomy import Anatomy, anatomy
from deeplimit._anatomy.anatomy import Head
from deeplimit._anatomy.checks import IGNORED, check_count, check_number
from deeplimit._anatomy.evaluation import Inputs, RunningStatistics
from deeplimit.control.batches import aligned, blame_inputs
from deeplimit.control.control_cost import (
    ControlCost,
    KineticEnergy,
    ProximalStep,
    check_kind,
    ends_of_stages,
    every_group,
    squared_norms,
)
from deeplimit.control.losses import Loss, OtherLoss
from deeplimit.control.soft_cross_entropy import CountedTokens, SoftCrossEntropy, widened
from deeplimit.control.wrapping import AroundWatch, check_bare
from deeplimit.errors import InputError, several


class StageCost(nn.Module):
    """The objective of the optimal control problem of a residual network, for one batch:

        Σ_{n=0}^{N−1} [ γ_n·mean_i ℓ(z_n^i, y^i) + (r/2)‖θ_n‖² ] + mean_i ℓ(z_N^i, y^i)

    z_n are the logits of the state at layer n, through the remaining projection shortcuts and the
    model's own head. γ_n and r are *per layer*: with γ_n ≥ γ > 0 and h fixed too, the number of
    layers outside a tube around the minimisers is bounded whatever N (the turnpike). Sources:
    [PF24] arXiv 2405.19013, [PHFF25] arXiv 2506.21453.

    `cost, logits = stage_cost(x, y)`; cost is a scalar ready for `backward()`, logits are z_N, the
    model's own output:

        >>> stage_cost = StageCost(model, SoftCrossEntropy(4), weight=0.1)
        >>> cost, logits = stage_cost(*loader[0])
        >>> cost.backward()

    The states of all layers meet the head in one stacked call, in which batch
    norms use the running statistics from before this batch and leave them alone. Under the adjoint
    each step computes the loss of its own state instead, inside its replay, so that no state is
    kept for it.

    Of a model with logits for every token, [B, L, C], the samples i are the tokens whose target is
    not −100; targets are aligned with the logits: for the next token the caller shifts them, or
    says `shift=True` where y are the inputs themselves. States then meet the head in chunks of
    tokens, of one layer or of several small ones, whose logits are made again in the backward pass
    unless there is one chunk in all: besides the model's own logits and what their loss takes, a
    few arrays of one chunk (2²⁵ numbers) are in memory at a time, whatever N.

    The weights γ_n are one number for all layers or one for each, and may be set anew between
    steps, in all processes alike: `stage_cost.weight = 0.1`. The state of a layer whose weight is 0
    does not meet the head, and costs nothing. Strict dissipativity needs one γ > 0 below all γ_n,
    whatever N; of weights that change during the training those at its end. Otherwise the bound
    holds of the layers with γ_n ≥ γ alone: at cost K above the minimum at most K/(γ α(δ)) of them
    are outside the tube of radius δ (α as in `dissipativity`). With losses at some exits only it
    says nothing of the layers between, with weights that rise from 0 nothing of the first ones.

    With `layers=k` a step takes the loss of k of the layers n < N with a weight alone, of M ≤ N.
    They are drawn anew in each pass with gradients, every set of k as likely as any other, and
    their sum is weighted by M/k, so that cost and gradient have the means of those of all layers.
    With g_n the gradient of γ_n·mean_i ℓ(z_n^i, y^i), the draw adds to that of the step the
    variance

        (M²/k) (1 − k/M) Σ_n ‖g_n − ḡ‖² / (M − 1),    ḡ = mean_n g_n,

    which is small where the layers' gradients are alike (W. G. Cochran, Sampling Techniques, 1977,
    theorem 2.2). Under the adjoint the other layers charge nothing, and of tokens the states of the
    drawn layers alone meet the head. Without gradients all layers count. All processes draw the
    same layers, as one process would: none waits for another whose layers are others.

    This module is what goes into Fabric, DistributedDataParallel or `fully_shard`; save
    `stage_cost.model.state_dict()`. `torch.compile` leaves it as it is; to have the blocks
    compiled: block.forward = torch.compile(block.forward) for each of them.

    Args:
        model: one that `anatomy` can read, or its anatomy.
        loss: ℓ, a `SoftCrossEntropy`; or a function or module ℓ(outputs, targets) that returns the
            mean over the batch: the outputs are z_n, of the form of the model's own answer
            (logits, embeddings, start and end logits side by side), the targets whatever is given
            for y. It is called once a layer, and nothing is assumed of its minimisers.
        weight: γ ≥ 0, the weight of the loss at every layer; or N of them, γ_0 … γ_{N−1}.
        control_cost: r ≥ 0, the weight of the controls. θ_n is all parameters of block n; where it
            has a norm those from its last norm on, which undoes the scale of the others. Of blocks
            whose states are of tokens, [B, L, d], it is all parameters: attention and MLP each add
            to the state.
        control_cost_kind: "squared"; or "kinetic", which puts mean_i ‖x_{n+1}^i − x_n^i‖² in place
            of ‖θ_n‖², the regularisation of optimal transport (arXiv 2505.13499): of states
            [B, L, d] the samples i are tokens; a layer that changes the shape is not charged. Or
            "group", r Σ_g ‖θ_g‖ over the last layers of the residual branches, one each in our own
            blocks, attention's and MLP's in a transformer's: layers vanish exactly (arXiv
            2606.29343). It is no part of the cost that is returned: `proximal` minimises it.
        layers: k ≥ 1: how many layers a step takes; None, or k ≥ M: all.
        shift: targets [B, L] are the inputs themselves: each predicts the next (`aligned`).

    Attributes:
        draws: the generator of the layers that are drawn, the same seed to begin with in every
            process. It is not in the state_dict: who goes on with a training puts
            `draws.get_state()` into the checkpoint, or seeds it anew at every epoch.

    Raises:
        InputError: a negative or non-finite weight, weights not as many as the layers, k = 0, no
            loss, a model without anatomy, or one that is wrapped already (gradients of the
            intermediate states would silently not be synchronised). In a step: targets that are no
            classes, or of tokens not aligned; a cost that is not finite since the inputs are not
            (on the CPU; elsewhere it would wait for the device); gradients that no
            DistributedDataParallel would average though one is there; with `layers`, a pass inside
            a backward pass.
    """

    def __init__(
        self,
        model: nn.Module | Anatomy,
        loss: Loss,
        weight: float | Iterable[float] | Tensor = 0.1,
        *,
        control_cost: float = 0.0,
        control_cost_kind: ControlCost = "squared",
        layers: int | None = None,
        shift: bool = False,
    ):
        super().__init__()
        self.control_cost = _check_weight("control cost r", control_cost)
        check_kind(control_cost_kind)
        self.control_cost_kind: ControlCost = control_cost_kind
        check_bare(model.model if isinstance(model, Anatomy) else model)
        self.anatomy: Anatomy = anatomy(model)
        self.loss: SoftCrossEntropy | OtherLoss = (
            loss if isinstance(loss, SoftCrossEntropy) else OtherLoss(loss, self.anatomy.tokens)
        )
        self.model = self.anatomy.model
        self.weight = weight
        # The names in each group that no proximal step has been seen to charge yet.
        self._groups = every_group(self.anatomy) if control_cost_kind == "group" else []
        self._uncharged = list(self._groups)
        self.layers = None if layers is None else check_count("layers", layers, 1)
        self.draws = torch.Generator()
        self.draws.manual_seed(0)
        self.shift = shift
        self._watch = AroundWatch()
        self._looked = False

    @property
    def weight(self) -> float | tuple[float, ...]:
        """γ, or γ_0 … γ_{N−1}; what is set is checked as what is given at first."""
        return self._weight

    @weight.setter
    def weight(self, value: float | Iterable[float] | Tensor) -> None:
        self._weight: float | tuple[float, ...]
        if not isinstance(value, Iterable) or (isinstance(value, Tensor) and value.numel() == 1):
            self._weight = _check_weight("weight γ", value)
            return
        horizon = self.anatomy.horizon
        self._weight = tuple(_check_weight(f"weight γ_{n}", w) for n, w in enumerate(value))
        if len(self._weight) != horizon:
            raise InputError(
                f"{several(len(self._weight), 'weight')} γ given; expected a number, or one for "
                f"each of the {several(horizon, 'layer')}"
            )

    def forward(self, x: Inputs, y: Any) -> tuple[Tensor, Tensor]:
        """(cost, logits) of a batch of inputs x [B, …] and targets y [B], or [B, L] of tokens.

        Of another loss than the soft cross-entropy y is whatever it takes.
        """
        if torch.compiler.is_compiling():
            # As it is: it sees its model's states by hooks that are new in every step.
            as_it_is: Callable[..., tuple[Tensor, Tensor]] = torch.compiler.disable(  # type: ignore[no-untyped-call,unused-ignore]
                self.forward
            )
            return as_it_is(x, y)
        if self._uncharged and self.training and torch.is_grad_enabled():
            self._check_charged()
        self._watch.look(self)
        at_no_cost = isinstance(y, Tensor) and y.device.type == "cpu"
        look = at_no_cost or not self._looked
        targets = aligned if isinstance(self.loss, SoftCrossEntropy) else self.loss.targets
        y = targets(self.anatomy, x, y, shift=self.shift, look=look)
        self._looked = True
        cost, logits = self._cost(x, y)
        if at_no_cost:
            blame_inputs(x, cost)
        return cost, logits

    def _cost(self, x: Inputs, y: Any) -> tuple[Tensor, Tensor]:
        """(cost, logits) of a batch whose targets are aligned."""
        # Looked up before the model runs: under FSDP2 the parameters are then still the sharded
        # ones, whose gradients are the optimiser's.
        squared = self.control_cost and self.control_cost_kind == "squared"
        controls = self.anatomy.controls if squared else []
        logits, running = self._run(x, y)
        cost = self.loss.mean(widened(logits), y)
        if running is not None:
            cost = cost + running
        if controls:
            # Counted after the model ran, so that its backward comes first: FSDP2 reduces gradients
            # on a stream of its own, onto what is there; added later it would race with that.
            cost = cost + self.control_cost / 2 * squared_norms([controls]).sum()
        return cost, logits

    def _run(self, x: Inputs, y: Any) -> tuple[Tensor, Tensor | None]:
        """The model's logits, and Σ_{n<N} of γ_n times the loss and r/2 times the kinetic energy.

        None in its place where neither has a weight.
        """
        structure, energy = self.anatomy, None
        if self.control_cost and self.control_cost_kind == "kinetic" and structure.horizon:
            energy = KineticEnergy(structure, x, y, self.control_cost / 2)
        layers = self._drawn()
        if not layers and energy is None:
            return structure.run(x), None
        every = self._weights()
        # All layers' from the sum over the drawn ones.
        share = sum(w > 0 for w in every) / max(len(layers), 1)
        weights = {n: share * every[n] for n in layers}
        if structure.replayed and torch.is_grad_enabled():
            mean = self._mean_loss(y)
            charged = {
                n: partial(_charge, mean, weights.get(n, 0.0), energy)
                for n in (layers if energy is None else range(structure.horizon))
            }
            with structure.collect_stage_costs(charged, x) as costs:
                logits = structure.run(x)
            return logits, torch.stack(costs).sum()
        # Before the model runs, as under the adjoint, where the first layers' costs are computed
        # before the later projections' statistics move.
        statistics = RunningStatistics(self.model.modules())
        with ends_of_stages(structure, energy) as ends:
            states, logits = structure.states(x)
        running = []
        if energy is not None:
            moves = enumerate(pairwise(states))
            running += [energy(before, ends.get(n, after)) for n, (before, after) in moves]
        if weights:
            losses = self._losses({n: states[n] for n in weights}, statistics, x, y)
            running.append((losses.new_tensor(list(weights.values())) * losses).sum())
        return logits, torch.stack(running).sum()

    def _losses(
        self, states: dict[int, Tensor], statistics: RunningStatistics, x: Inputs, y: Any
    ) -> Tensor:
        """mean_i ℓ(z_n^i, y^i) of each of these layers n, whose states meet the head together."""
        structure, loss = self.anatomy, self.loss
        each: Tensor
        if structure.tokens:

            def head(tokens: Tensor) -> Tensor:  # in the backward pass too with these statistics
                return structure.logits([tokens], 0, statistics, x)[0]

            each = self._mean_loss(y, kept=True)(head, *states.values())
            return each
        z = widened(structure.logits(list(states.values()), list(states), statistics, x))
        if isinstance(loss, SoftCrossEntropy):
            values: Tensor = loss(z, y.expand(len(z), *y.shape))
            each = values.flatten(1).sum(1) / (y != IGNORED).sum().clamp(min=1)
            return each
        return torch.stack([loss.mean(own, y) for own in z])

    def proximal(self, optimizer: Optimizer) -> RemovableHandle:
        """Takes the proximal step of a group control cost after each step of an optimiser.

            θ_g ← θ_g·max(0, 1 − η r/‖θ_g‖)

        is the proximal map of η r Σ_g ‖θ_g‖, η the learning rate of the optimiser's step: block
        soft thresholding. With SGD both steps together are proximal gradient descent on the
        objective, whose zeros are exact: a layer stays 0 while the gradient there is no longer than
        r, and comes back when it is. With AdamW, whose steps have another metric, it is decoupled
        as its weight decay is. Steps of gradients that are accumulated are steps of the optimiser,
        and of sharded parameters norms are of the whole. Of several optimisers give each: a group
        is charged by the one that holds all of it, and each that trains has to be.

            >>> grouped = StageCost(
            ...     model, SoftCrossEntropy(4), control_cost=9.0, control_cost_kind="group"
            ... )
            >>> hook = grouped.proximal(torch.optim.SGD(grouped.parameters(), lr=1e-3))
            >>> cost, logits = grouped(*loader[0])

        Returns:
            A handle; `remove()` ends it.

        Raises:
            InputError: another kind of control cost; an optimiser without a learning rate, or that
                holds no control of the model.
        """
        if self.control_cost_kind != "group":
            raise InputError(
                f"the control cost is {self.control_cost_kind}, which has no proximal step; give "
                "control_cost_kind='group', or leave proximal out"
            )
        named = dict(self.model.named_parameters())
        groups = [[named[name] for name in names] for names in self._groups]
        step = ProximalStep(optimizer, groups, self.control_cost)
        held = {p for settings in optimizer.param_groups for p in settings["params"]}
        self._uncharged = [
            names for names in self._uncharged if not held.issuperset(named[n] for n in names)
        ]
        return optimizer.register_step_post_hook(step)

    def _check_charged(self) -> None:
        """Raises InputError where a group trains that no proximal step charges."""
        named = dict(self.model.named_parameters())
        for names in self._uncharged:
            if all(named[name].requires_grad for name in names):
                raise InputError(
                    "a group cost is minimised by a step of its own, and no optimiser that it was "
                    f"told of holds {' and '.join(names)}: call stage_cost.proximal(optimizer) "
                    "once for each optimiser, when it is made"
                )

    def _weights(self) -> Sequence[float]:
        """γ_0 … γ_{N−1}."""
        one = self._weight
        return one if isinstance(one, tuple) else (one,) * self.anatomy.horizon

    def _drawn(self) -> Sequence[int]:
        """The layers n < N whose loss this pass takes."""
        every = [n for n, weight in enumerate(self._weights()) if weight]
        if self.layers is None or not torch.is_grad_enabled():
            return every
        if torch._C._current_graph_task_id() != -1:  # noqa: SLF001
            raise InputError(
                "a StageCost with layers runs again in a backward pass, as in a checkpoint, where "
                "it would draw other layers; put the checkpoints into the model"
            )
        drawn = torch.randperm(len(every), generator=self.draws)[: self.layers]
        return [every[i] for i in drawn.sort().values.tolist()]

    def _mean_loss(self, y: Any, *, kept: bool = False) -> Callable[..., Tensor]:
        """(head, x, …) ↦ mean_i ℓ(head(x)^i, y^i) of each of the states x."""
        loss = self.loss
        if self.anatomy.tokens and isinstance(loss, SoftCrossEntropy):
            return partial(CountedTokens(y, loss.classes).mean_loss, loss, kept=kept)

        def mean(head: Head, x: Tensor) -> Tensor:
            return loss.mean(widened(head(x)), y)

        def each(head: Head, *states: Tensor) -> Tensor:
            # Logits are made again in the backward pass: those of all layers do not fit.
            return torch.stack([checkpoint(mean, head, x, use_reentrant=False) for x in states])

        return each if self.anatomy.tokens else mean

    def extra_repr(self) -> str:
        """γ, r and its kind, and k where there is one."""
        kind = "" if self.control_cost_kind == "squared" else f" ({self.control_cost_kind})"
        some = "" if self.layers is None else f", layers={self.layers}"
        one = self.weight
        weight = f"{one:g}" if isinstance(one, float) else f"({', '.join(f'{w:g}' for w in one)})"
        return f"weight={weight}, control_cost={self.control_cost:g}{kind}{some}"


def _check_weight(name: str, value: Any) -> float:
    return check_number(name, value, "a number ≥ 0", lambda v: 0 <= v < math.inf)


def _charge(
    mean: Callable[..., Tensor],
    weight: float,
    energy: KineticEnergy | None,
    head: Head,
    x: Tensor,
    left: Tensor,
) -> Tensor:
    """The cost of a layer: its weight times the loss of its state, and its kinetic energy."""
    parts = [weight * mean(head, x).sum()] if weight else []
    parts += [energy(x, left)] if energy is not None else []
    return torch.stack(parts).sum()
