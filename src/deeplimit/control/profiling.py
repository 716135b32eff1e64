"""Profiling a network layer by layer over a loader, in one pass."""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deeplimit._anatomy import Anatomy, anatomy
from deeplimit._anatomy.evaluation import evaluating
from deeplimit.control.batches import blame_inputs
from deeplimit.control.losses import (
    ClassLoss,
    ConstantAnswer,
    Loss,
    SampleLoss,
    check_callable,
    sample_loss,
)
from deeplimit.control.token_losses import CountedTokens, drop_ignored
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
    model = structure.model
    sums: dict[str, Tensor] = {}
    constant, classes = ConstantAnswer(of), 0
    with evaluating(model):
        for x, y in of.batches(structure, loader, NEED, shift=shift):
            classes = _measure(structure, x, y, of, sums, constant, updates=updates)
        least = constant.losses()
    return _profile(sums, of, classes, least, updates=updates)


def _measure(
    structure: Anatomy,
    x: Any,
    y: Any,
    of: SampleLoss,
    sums: dict[str, Tensor],
    constant: ConstantAnswer,
    *,
    updates: bool,
) -> int:
    """Adds a batch to the sums; returns the number of classes."""
    states, output = structure.states(x)
    y = y if structure.tokens else of.fitted(output, y)
    constant.add(output, y)
    kept = states if updates else []
    if isinstance(of, ClassLoss) and structure.tokens:
        batch = _of_tokens(structure, x, y, of, states, output, kept)
    else:
        batch = _of_samples(structure, x, y, of, states, output, kept)
    blame_inputs(x, batch["loss"])
    for name, value in batch.items():
        sums[name] = sums[name] + value if name in sums else value
    return output.shape[-1] if of.of_classes else 0


def _profile(
    sums: Mapping[str, Tensor],
    of: SampleLoss,
    classes: int,
    constant: Tensor | None,
    *,
    updates: bool,
) -> TurnpikeProfile:
    """The profile from sums over samples."""
    n = int(sums["count"])
    softness, minimum = math.nan, math.nan
    if isinstance(of, ClassLoss):
        softness, minimum = of.softness_and_minimum(classes)

    def mean(name: str, count: Any = n) -> tuple[float, ...]:
        return tuple((sums[name] / count).tolist()) if name in sums else ()

    def error(name: str) -> tuple[float, ...]:
        if name not in sums:
            return ()
        spread = sums[f"{name} squared"] / n - (sums[f"{name} gap"] / n) ** 2
        return tuple((spread.clamp(min=0) / n).sqrt().tolist())

    per_class = sums["class distance"] / sums["of class"] if "of class" in sums else torch.zeros(0)
    return TurnpikeProfile(
        samples=n,
        classes=classes,
        softness=softness,
        minimum=minimum,
        loss=mean("loss"),
        accuracy=mean("accuracy"),
        distance=mean("distance"),
        class_distance=tuple(tuple(row) for row in per_class.tolist()),
        relative_update=mean("update", sums["updated"]),
        loss_error=error("loss"),
        accuracy_error=error("accuracy"),
        influence=mean("influence", sums["updated"]) if updates else None,
        constant=None if constant is None else float(constant.mean()),
    )


def _of_samples(
    structure: Anatomy,
    x: Any,
    y: Any,
    of: SampleLoss,
    states: list[Tensor],
    output: Tensor,
    kept: list[Tensor],
) -> dict[str, Tensor]:
    """Sums over the samples of a batch; of states `kept` what the layers do to them."""
    padding = _padding(x, states)
    if isinstance(of, ClassLoss):
        *states, padding, output, y = drop_ignored(y, *states, padding, output)
        kept = states if kept else []
    below = states[:-1]
    if structure.tokens:  # layer by layer: the outputs of all of them may not fit
        outputs: Iterable[Tensor] = (structure.logits([s], 0, x=x)[0] for s in below)
    else:
        outputs = structure.logits(below, x=x) if below else ()
    rows = [_figures(of, z, y) for z in chain(outputs, [output])]
    figures = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    sums = _summed(figures) | _changes(structure, x, kept, partial(_flat, padding))
    if of.soft is not None:
        own = F.one_hot(y, of.soft.classes).double()
        sums["class distance"] = (figures["distance"] @ own).cpu()
        sums["of class"] = own.sum(0).cpu()
    return sums


def _of_tokens(
    structure: Anatomy,
    x: Any,
    y: Tensor,
    of: ClassLoss,
    states: list[Tensor],
    output: Tensor,
    kept: list[Tensor],
) -> dict[str, Tensor]:
    """The same of the tokens that count."""
    counted = CountedTokens(y, output.shape[-1])
    names: list[str] = []

    def measure(z: Tensor, targets: Tensor) -> list[Tensor]:
        figures = _figures(of, z, targets)
        names[:] = figures
        return list(figures.values())

    values = counted.measured(structure, x, states[:-1], output, measure)
    figures = dict(zip(names, values, strict=True))
    return _summed(figures) | _changes(structure, x, kept, counted.of)


def _figures(of: SampleLoss, z: Tensor, y: Any) -> dict[str, Tensor]:
    """What is measured of each sample."""
    figures = {"loss": of.each(z, y)}
    if of.of_classes:
        figures["accuracy"] = (z.argmax(-1) == y).double()
    if of.soft is not None:
        figures["distance"] = of.soft.distance(z.double(), y)
    return figures


def _summed(figures: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sums over samples of figures [N + 1, S], and of their gaps to those of layer N."""
    sums = {"count": torch.tensor(figures["loss"].shape[1])}
    for name, values in figures.items():
        gap = values - values[-1]
        sums[name] = values.sum(1).cpu()
        sums[f"{name} gap"], sums[f"{name} squared"] = gap.sum(1).cpu(), gap.square().sum(1).cpu()
    return sums


def _padding(x: Any, states: list[Tensor]) -> Tensor:
    """Where states [B, L, d] are of padding, [B, L]: not of a sample, whatever a layer does there.

    Without an attention mask no token is; of states of another form [B, 0].
    """
    mask: Tensor | None = x.get("attention_mask") if isinstance(x, Mapping) else None
    shape = states[0].shape[:2]
    if mask is None or mask.shape != shape or any(s.shape[:2] != shape for s in states):
        return torch.zeros(len(states[0]), 0, dtype=torch.bool, device=states[0].device)
    return mask == 0


def _flat(padding: Tensor, state: Tensor) -> Tensor:
    if padding.shape[1]:
        state = state.masked_fill(padding[..., None], 0)
    return state.flatten(1)


def _changes(
    structure: Anatomy, x: Any, states: list[Tensor], rows: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """Relative update and influence, summed over samples with x_n ≠ 0, and their number, per layer.

    Σ_i ‖x_{n+1} − x_n‖ / ‖x_n‖ and Σ_i (1 − cos), the latter as half the squared distance of the
    two directions: exactly zero for a layer that does nothing, and exact near zero. `rows` makes
    samples [S, …] of a state.
    """
    updates, influences, counts = [], [], []
    for n in range(len(states) - 1):
        before = rows(structure.carried(n, states[n], x)).double()
        after = rows(states[n + 1]).double()
        size = torch.linalg.vector_norm(before, dim=1)
        ratio = torch.linalg.vector_norm(after - before, dim=1) / size
        turned = (F.normalize(after, dim=1) - F.normalize(before, dim=1)).square().sum(1) / 2
        # A state that becomes zero has no direction left: orthogonal to what it was.
        turned = turned.where(after.any(1), 1.0)
        updates.append(ratio.where(size != 0, 0.0).sum())
        influences.append(turned.where(size != 0, 0.0).sum())
        counts.append((size != 0).sum())
    none = torch.zeros(0, dtype=torch.float64)
    return {
        name: torch.stack(values).cpu() if values else none
        for name, values in (("update", updates), ("influence", influences), ("updated", counts))
    }
