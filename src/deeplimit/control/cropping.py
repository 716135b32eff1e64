"""Cutting the layers that do nothing, and showing that nothing was lost."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import index
from statistics import median
from typing import Any, SupportsIndex

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from deeplimit._anatomy import Anatomy, anatomy, check_rebuilt
from deeplimit._anatomy.anatomy import layer_numbers
from deeplimit._anatomy.checks import fitted, shown
from deeplimit._anatomy.evaluation import Inputs, device_of, evaluating, first_samples
from deeplimit.control.alignment import aligned_batches
from deeplimit.control.bridge import bridge as build_bridge
from deeplimit.control.crop_report import CropReport
from deeplimit.control.cut_choice import CutChoice
from deeplimit.control.fading import FadedForward
from deeplimit.control.finite import blame_inputs
from deeplimit.control.paired_answers import PairedAnswers
from deeplimit.control.soft_cross_entropy import SoftCrossEntropy, check_loss
from deeplimit.control.token_losses import CountedTokens, labelled
from deeplimit.control.tolerance import check_tolerance
from deeplimit.control.turnpike import ACCURACY_TOLERANCE, TurnpikeProfile
from deeplimit.control.verdict import FEW
from deeplimit.errors import InputError, several

LATENCY_ROUNDS = 7
NEED = "a crop is verified on at least one sample that counts"


def removal(profile: TurnpikeProfile, accuracy: float = ACCURACY_TOLERANCE) -> range:
    """The layers that a profile says can go.

    The tail from `profile.depth_within(accuracy)` on. If no depth but the full one will do because
    the states leave the tube again at the end (a leaving arc, exit < N), the layers from entry to
    exit: n_in … n_out − 1. A profile of fewer than 11 samples says nothing: no layer.
    """
    depth, horizon = profile.depth_within(accuracy), profile.horizon
    if profile.samples < FEW:
        return range(horizon, horizon)
    entry, last = profile.entry(), profile.exit()
    if depth == horizon and entry is not None and last is not None and last < horizon:
        return range(entry, last)
    return range(depth, horizon)


def check_profile(profile: object, horizon: int) -> None:
    """Raises InputError if it is no profile of a network with so many layers."""
    if not isinstance(profile, TurnpikeProfile):
        raise InputError(
            f"{shown(profile)} given as the profile; expected what turnpike_profile(model, loader, "
            "loss) returns"
        )
    if profile.horizon != horizon:
        raise InputError(
            f"the profile is of a network with {several(profile.horizon, 'layer')}, the model has "
            f"{horizon}; "
            "profile this model"
        )


def crop(
    model: nn.Module | Anatomy,
    depth: SupportsIndex | TurnpikeProfile | CutChoice | None = None,
    *,
    remove: Iterable[SupportsIndex] | None = None,
    bridge: Iterable[Any] | None = None,
) -> nn.Module:
    """A smaller model of the same kind, independent of the first.

    `crop(model, 5)` keeps the first 5 layers: in evaluation mode its output is, to the last bit,
    the model's own intermediate output at that depth. `crop(model, profile)` takes out what
    `removal(profile)` names, `crop(model, choice)` what `choose_cut` chose, and
    `crop(model, remove=range(5, 18))` those layers, from the middle if need be: the output then
    changes by what they did. With `bridge`, batches (x, y) or x of calibration data, what each run
    of removed layers did is fitted by least squares and folded into the weights before it, as far
    as that helps on samples held out (`control.bridge.bridge`); `bridge_of(cropped)` tells what was
    fitted. Class and configuration stay.

    Raises:
        InputError: a depth outside 0 … N, a profile or a choice of another horizon, a layer that
            does not exist or that the model cannot do without, neither or both of depth and remove,
            or a model whose class, built from the new configuration, is another (`check_rebuilt`);
            `bridge` where nothing can be bridged, or of data that are not finite.
    """
    structure = anatomy(model)
    horizon = structure.horizon
    if (depth is None) == (remove is None):
        raise InputError("give crop a depth, a profile, or remove=…; exactly one of them")
    if isinstance(depth, CutChoice):
        if sum(depth.layers_before) != horizon:
            raise InputError(
                f"the choice is of a network with {several(sum(depth.layers_before), 'layer')}, "
                f"the model has {horizon}; choose for this model"
            )
        remove = depth.removed
    elif isinstance(depth, TurnpikeProfile):
        check_profile(depth, horizon)
        remove = removal(depth)
    elif depth is not None:
        try:
            kept = index(depth)
        except TypeError:
            kept = -1
        if not 0 <= kept <= horizon:
            raise InputError(
                f"depth {depth} given; the model has {several(horizon, 'layer')}: 0 … {horizon}"
            )
        remove = range(kept, horizon)
    gone = layer_numbers(() if remove is None else remove)
    smaller = structure.without(gone)
    for module in smaller.modules():  # of a model that is fading: the crop does not
        standing = vars(module).get("forward")
        if isinstance(standing, FadedForward):
            standing.remove()
    if bridge is not None:
        build_bridge(structure, smaller, gone, bridge)
    check_rebuilt(structure, smaller)
    return smaller


@torch.no_grad()
def verify_crop(
    model: nn.Module | Anatomy,
    cropped: nn.Module,
    loader: Iterable[tuple[Inputs, Tensor]],
    loss: SoftCrossEntropy | None = None,
    *,
    tolerance: float = ACCURACY_TOLERANCE,
    shift: bool = False,
) -> CropReport:
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
) -> CropReport:
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
            parts = iter([labelled(y, z, w)])
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
    return CropReport(
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
