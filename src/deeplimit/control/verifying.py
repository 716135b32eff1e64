"""A network and its cut, compared on held-out data."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from deeplimit._anatomy import Anatomy, anatomy
from deeplimit._anatomy.checks import IGNORED
from deeplimit._anatomy.evaluation import device_of, evaluating
from deeplimit._anatomy.inputs import batch_of
from deeplimit.control.batches import blame_inputs, first_part
from deeplimit.control.losses import (
    ConstantAnswer,
    Figures,
    Loss,
    check_losses,
    joined,
    sample_loss,
)
from deeplimit.control.turnpike import ACCURACY_TOLERANCE
from deeplimit.control.verdict import (
    Verdict,
    check_rise,
    check_tolerance,
    judge_answers,
    judge_losses,
    mean_and_error,
)
from deeplimit.errors import InputError, several
from deeplimit.records import Record
from deeplimit.tables import number, percent, table

LATENCY_ROUNDS, LATENCY_SECONDS = 7, 0.02  # so many rounds, of at least so many seconds
NEED = "a crop is verified on at least one sample that counts"


@dataclass(frozen=True)
class Change:
    """What a cut does to the answers to S samples, with standard errors paired by sample.

    Accuracy is `lost` in the mean, and the loss has `risen`, with this `skewness` of the samples'
    rises; `swapped` says how many samples are right before only, and after only. Accuracies are
    NaN, and nothing of them is lost, where the loss knows no classes.
    """

    loss_before: float
    loss_after: float
    loss_error: float
    risen: float
    skewness: float
    accuracy_before: float = math.nan
    accuracy_after: float = math.nan
    accuracy_error: float = math.nan
    lost: float = 0.0
    swapped: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, own: Figures, cut: Figures) -> "Change":
        """The "loss" [S] of each sample before and after, and whether each answer is "right"."""
        rise = cut["loss"] - own["loss"]
        risen, error = mean_and_error(rise)
        spread = error * math.sqrt(len(rise))
        skewness = float(((rise - risen) / spread).pow(3).mean()) if spread > 0 else 0.0
        losses = (float(own["loss"].mean()), float(cut["loss"].mean()), error, risen, skewness)
        if "right" not in own:
            return cls(*losses)
        before, after = own["right"].double(), cut["right"].double()
        change = before - after
        lost, error = mean_and_error(change)
        swapped = int((change > 0).sum()), int((change < 0).sum())
        return cls(*losses, float(before.mean()), float(after.mean()), error, lost, swapped)

    @property
    def has_accuracy(self) -> bool:
        """The loss knows classes."""
        return not math.isnan(self.accuracy_before)

    def figures(self, *names: str) -> dict[str, Any]:
        """Of accuracy or loss what records hold: before, after, and the error of the change."""
        ends = ("before", "after", "error")
        return {f"{name}_{end}": getattr(self, f"{name}_{end}") for name in names for end in ends}


@dataclass(frozen=True)
class CropResult(Record):
    """A network before and after a cut, on the same held-out samples.

        >>> result = verify_crop(model, crop(model, 2), loader)
        >>> result.horizon_before - result.horizon_after
        2

    Accuracies and agreement are NaN where the loss knows no classes. Where there are logits for
    every token the samples of `samples`, accuracy, loss and agreement are tokens (exp(loss) is the
    perplexity, if the loss is the plain cross-entropy), those of multiply-adds and latency whole
    texts.

    Attributes:
        samples: number of samples compared.
        horizon_before, horizon_after: residual steps (blocks) of the network.
        accuracy_before, accuracy_after: fractions in [0, 1].
        accuracy_error: standard error of accuracy_after − accuracy_before, paired by sample.
        loss_before, loss_after: mean loss, in nats or in units of the loss.
        agreement: fraction of samples for which both predict the same class.
        parameters_before, parameters_after: numbers of parameters.
        multiply_adds_before, multiply_adds_after: for one sample.
        latency_before, latency_after: median seconds of a forward pass of `latency_batch` samples,
            the two networks timed in turns; one number where they are alike but for their weights.
        latency_batch: samples in a timed batch.
        device: where the latency was measured, as torch names it.
        verdict: what the samples say of the accuracy lost, or, without classes, of the rise of the
            loss; of tokens it rests on texts. None in a result saved before there was one.
        loss_error: standard error of loss_after − loss_before, paired by sample; None in a result
            saved before it was there.
    """

    samples: int
    horizon_before: int
    horizon_after: int
    accuracy_before: float
    accuracy_after: float
    accuracy_error: float
    loss_before: float
    loss_after: float
    agreement: float
    parameters_before: int
    parameters_after: int
    multiply_adds_before: int
    multiply_adds_after: int
    latency_before: float
    latency_after: float
    latency_batch: int
    device: str
    verdict: Verdict | None = None
    loss_error: float | None = None

    def __str__(self) -> str:
        """A row for each figure, before and after, and the verdict."""
        batch = f"latency of {several(self.latency_batch, 'sample')} on {self.device}, ms"
        rows = [
            ("layers", str(self.horizon_before), str(self.horizon_after)),
            ("accuracy", percent(self.accuracy_before), percent(self.accuracy_after)),
            ("loss", number(self.loss_before), number(self.loss_after)),
            ("parameters", f"{self.parameters_before:,}", f"{self.parameters_after:,}"),
            ("multiply-adds", f"{self.multiply_adds_before:,}", f"{self.multiply_adds_after:,}"),
            (batch, number(1000 * self.latency_before), number(1000 * self.latency_after)),
        ]
        if not self.has_accuracy:
            del rows[1]
        made = table([several(self.samples, "sample"), "before", "after"], rows)
        return made if self.verdict is None else f"{made}\n{self.verdict}"

    @property
    def has_accuracy(self) -> bool:
        """The loss knows classes."""
        return not math.isnan(self.accuracy_before)


@torch.no_grad()
def verify_crop(
    model: nn.Module | Anatomy,
    cropped: nn.Module,
    loader: Iterable[Any],
    loss: Loss | None = None,
    *,
    tolerance: float | None = None,
    shift: bool = False,
) -> CropResult:
    """Compares a model and its crop on held-out data: what the cut cost and what it saves.

        >>> result = verify_crop(model, crop(model, 2), loader, torch.nn.CrossEntropyLoss())
        >>> result.verdict.word in ("kept", "unresolved", "lost", "nothing learnt")
        True

    Args:
        model: the network before the cut; it runs in evaluation mode and is left in the mode it
            was in.
        cropped: the network after the cut, likewise; where it is on another device than the model
            a copy of it runs on the model's.
        loader: batches (x, y) that chose neither the weights nor the depth; of tokens [B, L] those
            count whose target is not −100.
        loss: the loss reported; the plain cross-entropy by default. As of `turnpike_profile`.
        tolerance: for the verdict, the fraction of accuracy that may be lost; half a point. With a
            loss that knows no classes by how much it may rise, in its units; by default 1 % of the
            range from the model's own mean loss to that of the best constant answer, or where that
            is not known of the size of the mean loss.
        shift: targets of tokens are the inputs themselves: each predicts the next.

    Raises:
        InputError: a loader that is empty or has no token that counts, networks of other outputs,
            targets that are no classes or not aligned, inputs that are not finite, a loss without
            values of single samples.
    """
    of = sample_loss(loss)
    if of.of_classes:
        tolerance = check_tolerance(ACCURACY_TOLERANCE if tolerance is None else tolerance)
    elif tolerance is not None:
        tolerance = check_rise(tolerance)
    structure = anatomy(model)
    device = device_of(structure.model)
    after = cropped if device_of(cropped) == device else copy.deepcopy(cropped).to(device)
    smaller, first, texts = structure.like(after), None, 0
    rows: list[Figures] = []
    constant = ConstantAnswer(of)
    with evaluating(structure.model), evaluating(after):
        for x, y in of.batches(structure, loader, NEED, shift=shift):
            first = x if first is None else first
            z, w = structure.run(x), smaller.run(x)
            if z.shape != w.shape:
                raise InputError(
                    f"the {'logits' if of.of_classes else 'outputs'} have shape {list(z.shape)} "
                    f"before the cut and {list(w.shape)} after it; give a network and its own crop"
                )
            blame_inputs(x, z)
            constant.add(z, y)
            rows.append(of.measured(structure, x, y, [z, w]))
            if of.of_classes and structure.tokens:
                rows[-1]["text"] = (y != IGNORED).nonzero()[:, 0].cpu() + texts
                texts += len(y)
        table = joined(rows)
        losses, right = table["loss"], table.get("right")
        check_losses(losses[0])
        # Each layer of one is as large as the other's, or they are not alike.
        alike = _forms(structure.model) == _forms(after)
        times = latencies([structure.run] if alike else [structure.run, smaller.run], first)
        one = first_part(structure, first, 1)
        products = [multiply_adds(own, one) // batch_of(one) for own in (structure, smaller)]
        best = constant.losses()
    if right is None:
        verdict, agreement = judge_losses(losses[0], losses[1], best, tolerance), math.nan
    else:
        verdict = judge_answers(right, table["targets"], tolerance or 0.0, table.get("text"))
        agreement = float((table["guess"][0] == table["guess"][1]).double().mean())
    figures = [{name: table[name][k] for name in table.keys() & {"loss", "right"}} for k in (0, 1)]
    parameters = [
        sum(p.numel() for p in network.parameters()) for network in (structure.model, after)
    ]
    return CropResult(
        samples=losses.shape[1],
        horizon_before=structure.horizon,
        horizon_after=smaller.horizon,
        agreement=agreement,
        parameters_before=parameters[0],
        parameters_after=parameters[1],
        multiply_adds_before=products[0],
        multiply_adds_after=products[1],
        latency_before=times[0],
        latency_after=times[-1],
        latency_batch=batch_of(first),
        device=str(device),
        verdict=verdict,
        **Change.of(*figures).figures("accuracy", "loss"),
    )


def multiply_adds(model: nn.Module | Anatomy, x: Any) -> int:
    """Multiply-adds of a forward pass: the products of matrices and convolutions."""
    run = anatomy(model).run
    with counting() as products:
        run(x)
    return products()


@contextmanager
def counting() -> Iterator[Callable[[], int]]:
    """Counts multiply-adds; what it yields says how many there have been so far."""
    # Fused attention is not counted everywhere; written out it is two products of matrices.
    written_out = sdpa_kernel(SDPBackend.MATH)
    with torch.no_grad(), written_out, FlopCounterMode(display=False) as counter:
        yield lambda: int(counter.get_total_flops()) // 2


def _forms(model: nn.Module) -> tuple[str, list[tuple[torch.Size, torch.dtype]]]:
    """The time a model takes depends on this: its modules, its tensors' shapes and types."""
    tensors = (*model.parameters(), *model.buffers())
    return repr(model), [(tensor.shape, tensor.dtype) for tensor in tensors]


def latencies(runs: Sequence[Callable[[Any], Tensor]], x: Any) -> list[float]:
    """Median seconds per forward pass of each, timed in turns so that all see the same machine."""
    timers = [
        Timer("run(x)", globals={"run": run, "x": x}, num_threads=torch.get_num_threads())
        for run in runs
    ]
    times: list[list[float]] = [[] for _ in runs]
    for timer in timers:
        timer.timeit(1)
    repeat = max(int(LATENCY_SECONDS / max(timers[0].timeit(1).mean, 1e-6)), 1)
    for _ in range(LATENCY_ROUNDS):
        for timer, seconds in zip(timers, times, strict=True):
            seconds.append(timer.timeit(repeat).mean)
    return [median(seconds) for seconds in times]
