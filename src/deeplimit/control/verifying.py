"""A network and its cut, compared on held-out data."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from deeplimit._anatomy import Anatomy, anatomy
from deeplimit._anatomy.checks import fitted
from deeplimit._anatomy.evaluation import Inputs, device_of, evaluating, first_samples
from deeplimit.control.batches import aligned_batches, blame_inputs
from deeplimit.control.paired_answers import PairedAnswers
from deeplimit.control.soft_cross_entropy import SoftCrossEntropy, check_loss
from deeplimit.control.token_losses import CountedTokens, drop_ignored
from deeplimit.control.turnpike import ACCURACY_TOLERANCE
from deeplimit.control.verdict import Verdict, check_tolerance
from deeplimit.errors import InputError

LATENCY_ROUNDS = 7
NEED = "a crop is verified on at least one sample that counts"


@dataclass(frozen=True)
class CropResult:
    """A network before and after a cut, on the same held-out samples.

    Where there are logits for every token the samples of `samples`, accuracy, loss and agreement
    are tokens (exp(loss) is the perplexity, if the loss is the plain cross-entropy), those of
    multiply-adds and latency whole texts.

    Attributes:
        samples: number of samples compared.
        horizon_before, horizon_after: residual steps (blocks) of the network.
        accuracy_before, accuracy_after: fractions in [0, 1].
        accuracy_error: standard error of accuracy_after − accuracy_before, paired by sample.
        loss_before, loss_after: mean loss in nats.
        agreement: fraction of samples for which both predict the same class.
        parameters_before, parameters_after: numbers of parameters.
        multiply_adds_before, multiply_adds_after: for one sample.
        latency_before, latency_after: median seconds of a forward pass of `latency_batch` samples,
            the two networks timed in turns; one number where they are alike but for their weights.
        latency_batch: samples in a timed batch.
        device: where the latency was measured, as torch names it.
        verdict: what the samples say of the accuracy lost; of tokens it rests on texts. None in a
            report saved before there was one.
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


@torch.no_grad()
def verify_crop(
    model: nn.Module | Anatomy,
    cropped: nn.Module,
    loader: Iterable[tuple[Inputs, Tensor]],
    loss: SoftCrossEntropy | None = None,
    *,
    tolerance: float = ACCURACY_TOLERANCE,
    shift: bool = False,
) -> CropResult:
    """Compares a model and its crop on held-out data: what the cut cost and what it saves.

    Args:
        model: the network before the cut; it runs in evaluation mode and is left in the mode it
            was in.
        cropped: the network after the cut, likewise; where it is on another device than the model
            a copy of it runs on the model's.
        loader: batches (x, y) that chose neither the weights nor the depth; of tokens [B, L] those
            count whose target is not −100.
        loss: the loss reported; the plain cross-entropy by default.
        tolerance: the fraction of accuracy that may be lost, for the verdict; half a point.
        shift: targets of tokens are the inputs themselves: each predicts the next.

    Raises:
        InputError: a loader that is empty or has no token that counts, networks of other classes,
            targets that are no classes or not aligned, inputs that are not finite, another loss.
    """
    if loss is not None:
        check_loss(loss)
    structure = anatomy(model)
    device = device_of(structure.model)
    after = cropped if device_of(cropped) == device else copy.deepcopy(cropped).to(device)
    with evaluating(structure.model), evaluating(after):
        batches = aligned_batches(structure, loader, shift, NEED)
        tolerance = check_tolerance(tolerance)
        return _verified(structure, structure.like(after), batches, loss, tolerance)


def _verified(
    structure: Anatomy,
    cropped: Anatomy,
    loader: Iterator[tuple[Inputs, Tensor]],
    loss: SoftCrossEntropy | None,
    tolerance: float,
) -> CropResult:
    run_before, run_after = structure.run, cropped.run
    answers = PairedAnswers()
    losses = torch.zeros(2, dtype=torch.float64)
    same, batch = 0, 0
    sample: Inputs = {}
    for x, y in loader:
        if not batch:
            sample, batch = x, len(y)
        z, w = run_before(x), run_after(x)
        if z.shape != w.shape:
            raise InputError(
                f"the logits have shape {list(z.shape)} before the cut and {list(w.shape)} after "
                "it; give a network and its own crop"
            )
        blame_inputs(x, z)
        texts, y = None, fitted(z, y)
        if structure.tokens:
            counted = CountedTokens(y, z.shape[-1])
            texts = counted.index // y.shape[1]
            parts = counted.chunks(z, w)
        else:
            parts = iter([drop_ignored(y, z, w)])
        rows = [_compared(loss, *part) for part in parts]
        l0, l1, before, after, equal, targets = map(torch.cat, zip(*rows, strict=True))
        losses += torch.stack([l0.sum(), l1.sum()]).cpu()
        same += int(equal.sum())
        answers.add(before, after, targets, texts)
    count = answers.samples
    change = (answers.gained - answers.lost) / count
    squares = (answers.gained + answers.lost) / count
    alike = _forms(structure.model) == _forms(
        cropped.model
    )  # each layer of one is as large as the other's
    times = latencies([run_before] if alike else [run_before, run_after], sample)
    return CropResult(
        samples=count,
        horizon_before=structure.horizon,
        horizon_after=cropped.horizon,
        accuracy_before=answers.right / count,
        accuracy_after=(answers.right - answers.lost + answers.gained) / count,
        accuracy_error=(max(squares - change**2, 0) / count) ** 0.5,
        loss_before=float(losses[0]) / count,
        loss_after=float(losses[1]) / count,
        agreement=same / count,
        parameters_before=sum(p.numel() for p in structure.model.parameters()),
        parameters_after=sum(p.numel() for p in cropped.model.parameters()),
        multiply_adds_before=multiply_adds(structure, first_samples(sample, 1)),
        multiply_adds_after=multiply_adds(cropped, first_samples(sample, 1)),
        latency_before=times[0],
        latency_after=times[-1],
        latency_batch=batch,
        device=str(device_of(structure.model)),
        verdict=answers.verdict(tolerance),
    )


def multiply_adds(model: nn.Module | Anatomy, x: Inputs) -> int:
    """Multiply-adds of a forward pass: the products of matrices and convolutions."""
    run = anatomy(model).run
    # Fused attention is not counted everywhere; written out it is two products of matrices.
    written_out = sdpa_kernel(SDPBackend.MATH)
    with torch.no_grad(), written_out, FlopCounterMode(display=False) as counter:
        run(x)
    return counter.get_total_flops() // 2


def _compared(loss: SoftCrossEntropy | None, z: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """Of samples, for logits before (z) and after (w): losses, what is right, what is the same."""
    z, w = z.double(), w.double()
    first, second = z.argmax(-1), w.argmax(-1)
    return _loss(loss, z, y), _loss(loss, w, y), first == y, second == y, first == second, y


def _loss(loss: SoftCrossEntropy | None, logits: Tensor, y: Tensor) -> Tensor:
    if loss is None:
        return F.cross_entropy(logits, y, reduction="none")
    return loss(logits, y)


def _forms(model: nn.Module) -> tuple[str, list[tuple[torch.Size, torch.dtype]]]:
    """What the time that a model takes depends on: its modules, its tensors' shapes and types."""
    tensors = (*model.parameters(), *model.buffers())
    return repr(model), [(tensor.shape, tensor.dtype) for tensor in tensors]


def latencies(runs: Sequence[Callable[[Inputs], Tensor]], x: Inputs) -> list[float]:
    """Median seconds per forward pass of each, timed in turns so that all see the same machine."""
    timers = [
        Timer("run(x)", globals={"run": run, "x": x}, num_threads=torch.get_num_threads())
        for run in runs
    ]
    times: list[list[float]] = [[] for _ in runs]
    for timer in timers:
        timer.timeit(1)
    repeat = max(int(0.02 / max(timers[0].timeit(1).mean, 1e-6)), 1)
    for _ in range(LATENCY_ROUNDS):
        for timer, seconds in zip(timers, times, strict=True):
            seconds.append(timer.timeit(repeat).mean)
    return [median(seconds) for seconds in times]
