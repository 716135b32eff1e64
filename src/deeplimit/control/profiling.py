"""Profiling a network layer by layer over a loader, in one pass."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deeplimit._anatomy import Anatomy, anatomy
from deeplimit._anatomy.checks import IGNORED
from deeplimit._anatomy.evaluation import evaluating
from deeplimit.control.batches import blame_inputs
from deeplimit.control.losses import (
    ClassLoss,
    ConstantAnswer,
    Figures,
    Loss,
    SampleLoss,
    check_callable,
    sample_loss,
)
from deeplimit.control.token_losses import CountedTokens
from deeplimit.control.turnpike import TurnpikeProfile

NEED = "a profile needs at least one sample that counts"


@torch.no_grad()
def turnpike_profile(
    model: nn.Module | Anatomy,
    loader: Iterable[Any],
    loss: Loss,
    *,
    updates: bool = True,
    shift: bool = False,
) -> TurnpikeProfile:
    """Profiles a model layer by layer over a loader of (x, y), in one pass.

    The model runs in evaluation mode and is left in the mode it was in. One batch's states are in
    memory at a time; of logits for every token, [B, L, C], the model's own and a chunk of one
    layer's. Targets of tokens [B, L] are aligned with the logits; −100 does not count.

        >>> profile = turnpike_profile(model, loader, SoftCrossEntropy(4))
        >>> 0 <= profile.recommended_depth <= profile.horizon
        True

    Args:
        model: the network.
        loader: batches (x, y).
        loss: the loss that was trained. With a `SoftCrossEntropy` all is measured; with
            `nn.CrossEntropyLoss` there are no minimisers and no distances; of any other
            ℓ(outputs, targets) nothing but its values is known, one per sample
            (`control.losses.OtherLoss`), and there are no accuracies either. Where the loader gives
            mappings it is ℓ(outputs, batch).
        updates: whether to measure what each layer does to the states; without it
            `relative_update` is empty and `influence` None, and the profile is there sooner.
        shift: targets of tokens are the inputs themselves: each predicts the next.

    Raises:
        InputError: a loader that is empty or has no token that counts, targets that are no classes
            or not aligned, inputs that are not finite, a loss without values of single samples, or
            a model that `anatomy` cannot read.
    """
    check_callable(loss)
    of = sample_loss(loss)
    structure = anatomy(model)
    sums: Figures = {}
    constant, classes = ConstantAnswer(of), 0
    with evaluating(structure.model):
        for x, y in of.batches(structure, loader, NEED, shift=shift):
            states, output = structure.states(x)
            constant.add(output, y)
            classes = output.shape[-1] if of.of_classes else 0
            batch = _sums(structure, x, y, of, states, output)
            blame_inputs(x, batch["loss"])
            if updates and len(states) > 1:
                batch |= _changes(structure, x, states, _samples(structure, x, y, of, states))
            del states, output  # before those of the next batch are there
            for name, value in batch.items():
                sums[name] = sums[name] + value if name in sums else value
        least = constant.losses()
    n = int(sums["count"])
    softness, minimum = math.nan, math.nan
    if isinstance(of, ClassLoss):
        softness, minimum = of.softness_and_minimum(classes)

    def mean(name: str, over: str = "count") -> tuple[Any, ...]:
        found = (sums[name] / sums[over]).tolist() if name in sums else ()
        return tuple(tuple(v) if isinstance(v, list) else v for v in found)

    def error(name: str) -> tuple[float, ...]:
        if name not in sums:
            return ()
        spread = sums[f"{name} squared"] / n - (sums[f"{name} gap"] / n) ** 2
        return tuple((spread.clamp(min=0) / n).sqrt().tolist())

    return TurnpikeProfile(
        samples=n,
        classes=classes,
        softness=softness,
        minimum=minimum,
        loss=mean("loss"),
        accuracy=mean("accuracy"),
        distance=mean("distance"),
        class_distance=mean("class distance", "of class"),
        relative_update=mean("update", "updated"),
        loss_error=error("loss"),
        accuracy_error=error("accuracy"),
        influence=mean("influence", "updated") if updates else None,
        constant=None if least is None else float(least.mean()),
    )


def _sums(
    structure: Anatomy, x: Any, y: Any, of: SampleLoss, states: list[Tensor], output: Tensor
) -> Figures:
    """Sums over the samples of a batch: of figures [N + 1, S], and of their gaps to layer N's."""
    if not isinstance(of, ClassLoss):
        return _summed(of.measured(structure, x, y, [output], *states[:-1]))
    soft = of.soft

    def measure(z: Tensor, y: Tensor) -> Figures:
        return of.figures(z, y) | ({} if soft is None else {"distance": soft.distance(z, y)})

    figures = of.measured(structure, x, y, [output], *states[:-1], measure=measure)
    targets, guess = figures.pop("targets"), figures.pop("guess")
    sums = _summed(figures | {"accuracy": (guess == targets).double()})
    if soft is not None and not structure.tokens:
        own = F.one_hot(targets, soft.classes).double()
        sums |= {"class distance": figures["distance"] @ own, "of class": own.sum(0)}
    return sums


def _summed(figures: Figures) -> Figures:
    sums = {"count": torch.tensor(figures["loss"].shape[1])}
    for name, values in figures.items():
        gap = values - values[-1]
        sums |= {name: values.sum(1), f"{name} gap": gap.sum(1)}
        sums[f"{name} squared"] = gap.square().sum(1)
    return sums


def _samples(
    structure: Anatomy, x: Any, y: Any, of: SampleLoss, states: list[Tensor]
) -> Callable[[Tensor], Tensor]:
    """Makes of a state the rows [S, …] of the samples that count, zero where there is padding."""
    if of.of_classes and structure.tokens:
        return CountedTokens(y, classes=1).of
    mask: Tensor | None = x.get("attention_mask") if isinstance(x, Mapping) else None
    if mask is not None and any(s.shape[:2] != mask.shape for s in states):
        mask = None
    counts = y != IGNORED if of.of_classes else slice(None)

    def rows(state: Tensor) -> Tensor:
        state = state if mask is None else state.masked_fill((mask == 0)[..., None], 0)
        return state[counts].flatten(1)

    return rows


def _changes(
    structure: Anatomy, x: Any, states: list[Tensor], rows: Callable[[Tensor], Tensor]
) -> Figures:
    """Relative update and influence, summed over samples with x_n ≠ 0, and their number, per layer.

    Σ_i ‖x_{n+1} − x_n‖ / ‖x_n‖ and Σ_i (1 − cos), the latter as half the squared distance of the
    two directions: exactly zero for a layer that does nothing, and exact near zero.
    """
    table = []
    for n in range(len(states) - 1):
        before = rows(structure.carried(n, states[n], x)).double()
        after = rows(states[n + 1]).double()
        size = torch.linalg.vector_norm(before, dim=1)
        ratio = torch.linalg.vector_norm(after - before, dim=1) / size
        turned = (F.normalize(after, dim=1) - F.normalize(before, dim=1)).square().sum(1) / 2
        # A state that becomes zero has no direction left: orthogonal to what it was.
        turned = turned.where(after.any(1), 1.0)
        moved = size != 0
        table.append(
            torch.stack([v.where(moved, 0.0).sum() for v in (ratio, turned, moved.double())])
        )
    update, influence, updated = torch.stack(table, 1).cpu()
    return {"update": update, "influence": influence, "updated": updated}
