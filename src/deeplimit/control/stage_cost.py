"""Training as optimal control: the terminal cost plus a stage cost at every layer."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deeplimit._anatomy import Anatomy, anatomy
from deeplimit._anatomy.anatomy import Head, RunningCost
from deeplimit._anatomy.checks import check_count, check_number
from deeplimit._anatomy.evaluation import Inputs, RunningStatistics
from deeplimit.control.batches import aligned, blame_inputs
from deeplimit.control.losses import Loss, as_loss
from deeplimit.control.soft_cross_entropy import SoftCrossEntropy
from deeplimit.control.token_losses import CountedTokens, widened
from deeplimit.control.wrapping import AroundWatch, check_bare
from deeplimit.errors import InputError


class StageCost(nn.Module):
    """The objective of the optimal control problem of a residual network, for one batch:

        Σ_{n=0}^{N−1} [ γ·mean_i ℓ(z_n^i, y^i) + (r/2)‖θ_n‖² ] + mean_i ℓ(z_N^i, y^i)

    z_n are the logits of the state at layer n, through the remaining projection shortcuts and the
    model's own head. γ and r are *per layer*: with h fixed too, the number of layers outside a tube
    around the minimisers is bounded whatever N (the turnpike). Sources: [PF24] arXiv 2405.19013,
    [PHFF25] arXiv 2506.21453.

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
    few arrays of one chunk (`token_losses.CHUNK` numbers) are in memory at a time, whatever N.

    With `layers=k` a step takes the loss of k of the N layers n < N alone. They are drawn anew in
    each pass with gradients, every set of k as likely as any other, and their sum is weighted by
    N/k, so that cost and gradient have the means of those of all layers. With g_n the gradient of
    mean_i ℓ(z_n^i, y^i), the draw adds to that of the step the variance

        γ² (N²/k) (1 − k/N) Σ_n ‖g_n − ḡ‖² / (N − 1),    ḡ = mean_n g_n,

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
        weight: γ ≥ 0, the weight of the loss at every layer.
        control_cost: r ≥ 0, the weight of the controls. θ_n is all parameters of block n; where it
            has a norm those from its last norm on, which undoes the scale of the others. Of blocks
            whose states are of tokens, [B, L, d], it is all parameters: attention and MLP each add
            to the state.
        layers: k ≥ 1: how many layers a step takes; None, or k ≥ N: all.
        shift: targets [B, L] are the inputs themselves: each predicts the next (`aligned`).

    Attributes:
        draws: the generator of the layers that are drawn, the same seed to begin with in every
            process. It is not in the state_dict: who goes on with a training puts
            `draws.get_state()` into the checkpoint, or seeds it anew at every epoch.

    Raises:
        InputError: a negative or non-finite weight, no layers, no loss, a model without
            anatomy, or one that is wrapped already (gradients of the intermediate states would
            silently not be synchronised). In a step: targets that are no classes, or of tokens not
            aligned; a cost that is not finite since the inputs are not (on the CPU; elsewhere it
            would wait for the device); gradients that no DistributedDataParallel would average
            though one is there; with `layers`, a pass inside a backward pass.
    """

    def __init__(
        self,
        model: nn.Module | Anatomy,
        loss: Loss,
        weight: float = 0.1,
        *,
        control_cost: float = 0.0,
        layers: int | None = None,
        shift: bool = False,
    ):
        super().__init__()
        self.weight, self.control_cost = (
            check_number(name, value, "a number ≥ 0", lambda v: 0 <= v < math.inf)
            for name, value in (("weight γ", weight), ("control cost r", control_cost))
        )
        self.loss = as_loss(loss)
        check_bare(model.model if isinstance(model, Anatomy) else model)
        self.anatomy: Anatomy = anatomy(model)
        self.model = self.anatomy.model
        self.layers = None if layers is None else check_count("layers", layers, 1)
        self.draws = torch.Generator()
        self.draws.manual_seed(0)
        self.shift = shift
        self._watch = AroundWatch()
        self._looked = False

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
        self._watch.look(self)
        at_no_cost = isinstance(y, Tensor) and y.device.type == "cpu"
        if isinstance(self.loss, SoftCrossEntropy):
            y = aligned(self.anatomy, x, y, shift=self.shift, look=at_no_cost or not self._looked)
            self._looked = True
        cost, logits = self._cost(x, y)
        if at_no_cost:
            blame_inputs(x, cost)
        return cost, logits

    def _cost(self, x: Inputs, y: Any) -> tuple[Tensor, Tensor]:
        """(cost, logits) of a batch whose targets are aligned."""
        # Looked up before the model runs: under FSDP2 the parameters are then still the sharded
        # ones, whose gradients are the optimiser's.
        controls = self.anatomy.controls if self.control_cost else []
        logits, running = self._run(x, y)
        cost = self.loss.mean(widened(logits), y)
        if running is not None:
            cost = cost + self.weight * running
        if controls:
            # Counted after the model ran, so that its backward comes first: FSDP2 reduces gradients
            # on a stream of its own, onto what is there; added later it would race with that.
            cost = cost + self.control_cost / 2 * _squared_norm(controls)
        return cost, logits

    def _run(self, x: Inputs, y: Any) -> tuple[Tensor, Tensor | None]:
        """The model's logits, and Σ_{n<N} mean_i ℓ(z_n^i, y^i) where it has a weight."""
        if not self.weight:
            return self.anatomy.run(x), None
        layers = self._drawn()
        if self.anatomy.replayed and torch.is_grad_enabled():
            with self.anatomy.collect_stage_costs(self._mean_loss(y), x, layers) as costs:
                logits = self.anatomy.run(x)
            return logits, self._estimate(torch.stack(costs).sum()) if costs else None
        # Before the model runs, as under the adjoint, where the first layers' costs are computed
        # before the later projections' statistics move.
        statistics = RunningStatistics(self.model.modules())
        states, logits = self.anatomy.states(x)
        if len(states) == 1:
            return logits, None
        states = [states[n] for n in layers]
        if self.anatomy.tokens:
            head = partial(self._head, x, statistics)
            if isinstance(self.loss, SoftCrossEntropy):
                counted = CountedTokens(y, self.loss.classes)
                total = counted.mean_loss(self.loss, head, *states, kept=True)
            else:
                mean_loss = self._mean_loss(y)
                total = torch.stack([mean_loss(head, s) for s in states]).sum()
            return logits, self._estimate(total)
        z = widened(self.anatomy.logits(states, layers, statistics, x))
        if isinstance(self.loss, SoftCrossEntropy):
            total = len(z) * self.loss.mean(z, y.expand(len(z), *y.shape))
        else:
            total = torch.stack([self.loss.mean(own, y) for own in z]).sum()
        return logits, self._estimate(total)

    def _head(self, x: Any, statistics: RunningStatistics, tokens: Tensor) -> Tensor:
        """The logits of tokens, in the backward pass too with the statistics from before."""
        return self.anatomy.logits([tokens], 0, statistics, x)[0]

    def _drawn(self) -> Sequence[int]:
        """The layers n < N whose loss this pass takes."""
        every = self.anatomy.horizon
        if self.layers is None or not torch.is_grad_enabled():
            return range(every)
        if torch._C._current_graph_task_id() != -1:  # noqa: SLF001
            raise InputError(
                "a StageCost with layers runs again in a backward pass, as in a checkpoint, where "
                "it would draw other layers; put the checkpoints into the model"
            )
        return torch.randperm(every, generator=self.draws)[: self.layers].sort().values.tolist()

    def _estimate(self, drawn: Tensor) -> Tensor:
        """Of all layers, from the sum over the drawn ones."""
        if self.layers is None or not torch.is_grad_enabled():
            return drawn
        return drawn * max(1.0, self.anatomy.horizon / self.layers)

    def _mean_loss(self, y: Any) -> RunningCost:
        """mean_i ℓ(z^i, y^i) of a state, through the head."""
        loss = self.loss
        if not self.anatomy.tokens:
            return lambda head, x: loss.mean(widened(head(x)), y)
        if isinstance(loss, SoftCrossEntropy):
            counted = CountedTokens(y, loss.classes)
            return lambda head, x: counted.mean_loss(loss, head, x)

        def cost(head: Head, x: Tensor) -> Tensor:
            # Its logits are made again in the backward pass: those of all layers do not fit.
            made = checkpoint(lambda s: loss.mean(widened(head(s)), y), x, use_reentrant=False)
            return cast(Tensor, made)

        return cost

    def extra_repr(self) -> str:
        """γ, r, and k where there is one."""
        some = "" if self.layers is None else f", layers={self.layers}"
        return f"weight={self.weight:g}, control_cost={self.control_cost:g}{some}"


def _squared_norm(controls: list[nn.Parameter]) -> Tensor:
    """Σ_n ‖θ_n‖²; of sharded controls with one sum over the processes for all."""
    square = torch.stack([theta.square().sum() for theta in controls]).sum()
    whole: Callable[[], Tensor] | None = getattr(square, "full_tensor", None)  # of a DTensor
    return square if whole is None else whole()
