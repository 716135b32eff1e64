"""Bridging a cut: what the removed layers did, fitted and folded into what stands before them."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any, Literal, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from deeplimit._anatomy import Anatomy
from deeplimit._anatomy.block_call import End, left
from deeplimit._anatomy.branches import find_end
from deeplimit._anatomy.checks import shown
from deeplimit._anatomy.evaluation import are_inputs, begun, evaluating
from deeplimit._anatomy.injection import slack_of
from deeplimit._anatomy.inputs import batch_of, placed
from deeplimit.control.batches import blame_inputs, first_part
from deeplimit.control.least_squares import Fit, Moments, fits, fold
from deeplimit.errors import InputError, several
from deeplimit.records import Record

Kind = Literal["nothing", "scale", "channels", "linear"]
HELD = 4  # every so many-th sample is held out
MASKS = ("attention_mask", "decoder_attention_mask")


@dataclass(frozen=True)
class Gap(Record):
    """A map that stands for one run of removed layers, or nothing.

    Attributes:
        start, stop: the layers start … stop − 1 are gone.
        kind: "nothing"; "scale", one number; "channels", one number and constant per channel;
            "linear", a map of all channels. What had the least residual on the samples held out.
        place: the module that took it, by its name in the cut model.
        ridge: λ of the linear map, relative to the mean square of a channel.
        before, after: the relative residual ‖x_b − x‖ / ‖x_b‖ of the state that goes on, without
            and with what was fitted, on the samples held out.
        reason: why nothing could be fitted; else empty.
    """

    start: int
    stop: int
    kind: Kind
    place: str = ""
    ridge: float = 0.0
    before: float | None = None
    after: float | None = None
    reason: str = ""

    def __str__(self) -> str:
        """One line."""
        gone = f"{self.start}" if self.stop == self.start + 1 else f"{self.start} … {self.stop - 1}"
        name = f"layer{'s' * (self.stop > self.start + 1)} {gone}"
        if self.reason:
            return f"{name}: not bridged, {self.reason}"
        if self.kind == "nothing":
            return f"{name}: nothing is better, residual {self.before:.3g}"
        return f"{name}: {self.kind} in {self.place}, residual {self.before:.3g} → {self.after:.3g}"


@dataclass(frozen=True)
class Bridge(Record):
    """The maps fitted for the runs of removed layers.

        >>> bridge = bridge_of(crop(model, remove=[2, 3], bridge=loader))
        >>> [(gap.start, gap.stop) for gap in bridge.gaps]
        [(2, 4)]

    Attributes:
        gaps: in order.
        samples: how many were used; every fourth of them was held out.
        rows: how many states, such as tokens that are no padding.
    """

    gaps: tuple[Gap, ...]
    samples: int
    rows: int

    def __str__(self) -> str:
        """A line for each gap."""
        used = f"bridged with {several(self.samples, 'sample')}, {several(self.rows, 'state')}"
        return "\n".join([used, *map(str, self.gaps)])


_BRIDGES: WeakKeyDictionary[nn.Module, Bridge] = WeakKeyDictionary()


def bridge_of(cropped: nn.Module) -> Bridge | None:
    """Tells what was fitted for a model that `crop` returned; None where nothing was asked for.

    >>> bridge_of(crop(model, remove=[2])) is None
    True
    """
    return _BRIDGES.get(cropped)


@torch.no_grad()
def bridge(
    structure: Anatomy, smaller: nn.Module, removed: Iterable[int], loader: Iterable[Any]
) -> Bridge:
    """Folds what the removed layers did into the smaller model, in place.

    For each run of removed layers a … b − 1, with the state x_b that leaves it in the model and
    x_a = y + m that stands in its place in the smaller one, m what the block before adds last: the
    map T and constant c that minimise

        Σ ‖x_b − (y + T m + c)‖² + λ ‖T − 1‖²

    over the samples; T a number, diagonal, or any, whichever of these and of nothing leaves the
    least residual on every fourth sample, which is held out meanwhile. T and c go into the weights
    whose output m is: class and configuration stay. Where x = ReLU(y + m), x_b counts where it is
    positive; elsewhere it is enough that y + T m + c is not. Gaps are fitted in order, each in the
    model that is bridged so far. ReplaceMe, arXiv 2505.02819; Prune&Comp, arXiv 2507.18212.

    The inputs of the loader's batches, (x, y) or x, are gone through once per gap.
    """
    gone = sorted(removed)
    if not gone:
        raise InputError("bridge given, and no layer is removed; there is no gap: leave it out")
    if begun(loader) is loader:
        raise InputError(
            "the loader can be gone through only once; give a DataLoader or a list for bridge"
        )
    student = structure.like(smaller)
    gaps, samples, rows = [], 0, 0
    with evaluating(structure.model), evaluating(student.model):
        for start, stop in _runs(gone):
            place = start - 1 - sum(n < start for n in gone)
            work = _Gap(structure, student, loader, start, stop, place)
            gaps.append(work.bridged())
            samples, rows = max(samples, work.samples), max(rows, work.rows)
    if all(gap.reason for gap in gaps):
        raise InputError(f"no gap can be bridged: {'; '.join(map(str, gaps))}")
    _BRIDGES[smaller] = made = Bridge(tuple(gaps), samples, rows)
    return made


def _runs(gone: Sequence[int]) -> list[tuple[int, int]]:
    """The maximal runs of sorted layers, each from … to, exclusively."""
    starts = [n for n in gone if n - 1 not in gone]
    stops = [n + 1 for n in gone if n + 1 not in gone]
    return list(zip(starts, stops, strict=True))


def _left(structure: Anatomy, n: int, x: Any) -> Tensor:
    """The state that leaves a layer on a batch."""
    state = left(structure, n, partial(structure.run, x))
    if state is None:
        raise InputError(
            f"layer {n} of {type(structure.model).__name__} does not run on every batch; a bridge "
            "is fitted where all layers run: give other data, or cut without a bridge"
        )
    return state


def _inputs(structure: Anatomy, loader: Iterable[Any]) -> Iterator[Any]:
    """The inputs of batches (x, y) or x that hold samples, where the model is."""
    for batch in begun(loader):
        match batch:
            case Tensor() | Mapping():
                x: Any = batch
            case (x,) | (x, _) if are_inputs(x):
                pass
            case _:
                raise InputError(
                    f"the loader for bridge gives {shown(batch)}; expected batches (x, y) or x, x "
                    "a tensor, tensors by name, or a tuple"
                )
        if batch_of(x):
            blame_inputs(x)
            yield placed(structure.model, x)


@dataclass
class _Gap:
    """One run of removed layers start … stop − 1; `place` is the layer before, in the student."""

    structure: Anatomy
    student: Anatomy
    loader: Iterable[Any]
    start: int
    stop: int
    place: int
    samples: int = 0
    rows: int = 0

    def bridged(self) -> Gap:
        """The gap, and the student changed."""
        first = next(_inputs(self.structure, self.loader), None)
        if first is None:
            raise InputError("the loader for bridge gave no sample; a bridge is fitted on some")
        few = first_part(self.structure, first, 2)
        end = self._refusal(few) or find_end(self.student, self.place, few)
        if isinstance(end, str):
            return Gap(self.start, self.stop, "nothing", reason=end)
        seen, held = self._moments(end)
        before = held.residual(None)
        after, chosen = min(((held.residual(f), f) for f in fits(seen, end)), key=itemgetter(0))
        if not after < before:
            return Gap(self.start, self.stop, "nothing", end.name, 0.0, before, before)
        seen.merge(held)
        fit = next(f for f in fits(seen, end) if f.named == chosen.named)
        if not self._fold(end, fit, seen, few):
            reason = f"{end.name} does not do what its weight says"
            return Gap(self.start, self.stop, "nothing", reason=reason)
        kind = cast(Kind, fit.kind)
        return Gap(self.start, self.stop, kind, end.name, fit.ridge, before, after)

    def _refusal(self, x: Any) -> str | None:
        """Why there is nothing that could be fitted: what stands before the gap, or in it."""
        if self.start == 0:
            return "nothing stands before it"
        entered: dict[int, Tensor] = {}
        away: dict[int, Tensor] = {}
        with ExitStack() as stack, self.structure.hooked(entered.__setitem__):
            for n in range(self.start - 1, self.stop):
                hook = partial(away.__setitem__, n)
                stack.callback(self.structure.register_leaving_hook(n, hook).remove)
            self.structure.run(x)
        for n in range(self.start, self.stop):
            if not {n - 1, n} <= away.keys() or n not in entered:
                return f"no state is seen around layer {n}"
            if away[n - 1].shape != entered[n].shape or not away[n - 1].equal(entered[n]):
                return f"something stands between layers {n - 1} and {n}"
            if away[n].shape != away[n - 1].shape:
                return f"layer {n} changes the shape of the state"
        if len(away[self.stop - 1]) != batch_of(x):
            return "its states do not begin with the samples"
        return None

    def _moments(self, end: End) -> tuple[Moments, Moments]:
        """Of the samples that are fitted, and of those held out."""
        seen, held = (Moments(len(end.gain), end.gain.device) for _ in range(2))
        for x in _inputs(self.structure, self.loader):
            m, y, here = self._student_parts(end, x)
            there = _left(self.structure, self.stop - 1, x)
            target, own = end.state_rows(there), end.rows(m)
            if y is None:
                change = target - end.state_rows(here)
            else:
                sum_ = end.rows(y) + own
                change = torch.where(target > 0, target - sum_, -sum_.relu())
            if not bool(change.isfinite().all()):
                raise InputError(
                    f"states around layers {self.start} … {self.stop - 1} are not finite, to which "
                    "nothing can be fitted; the model diverges on the data for bridge"
                )
            per = len(own) // len(there)
            sample = torch.arange(len(own), device=own.device) // per + self.samples
            counts = _counting(x, there, self.structure.name)
            counts = torch.ones_like(sample) > 0 if counts is None else counts.to(own.device)
            out = sample % HELD == 1
            for moments, chosen in ((seen, counts & ~out), (held, counts & out)):
                moments.add(own[chosen], change[chosen], target[chosen])
            self.samples += len(there)
            self.rows += int(counts.sum())
        if self.samples < 2 or not (seen.count and held.count):
            raise InputError(
                f"{several(self.samples, 'sample')}, {several(self.rows, 'state')} given for "
                "bridge; expected at least two samples that count: every fourth is held out"
            )
        return seen, held

    def _student_parts(self, end: End, x: Any) -> tuple[Tensor, Tensor | None, Tensor]:
        """The last summand of the block before the gap, the other where a ReLU follows, the sum."""
        found: dict[str, Tensor] = {}
        alone = end.rest is self.student.layers[self.place].controls[0]

        def added(_: nn.Module, __: Any, output: Tensor) -> None:
            found["m"] = output.clone()

        def rest(_: nn.Module, args: Any, output: Tensor) -> None:
            found["y"] = (args[0] if alone else output).clone()

        with ExitStack() as stack:
            stack.callback(end.module.register_forward_hook(added).remove)
            if end.rest is not None:
                stack.callback(end.rest.register_forward_hook(rest).remove)
            here = _left(self.student, self.place, x)
        return found["m"], found.get("y"), here

    def _fold(self, end: End, fit: Fit, moments: Moments, x: Any) -> bool:
        """Folds it in, if the end gives then, on some samples, what it should."""
        modules = [m for m in (end.module, end.convolution) if m is not None]
        kept = [copy.deepcopy(m.state_dict()) for m in modules]
        m, _, _ = self._student_parts(end, x)
        rows = end.rows(m)
        expected = rows + (rows @ fit.a.T + fit.c) / end.gain
        # Of what is added up in the weights, which may be more than what comes of it.
        size = 1 + float(fit.a.abs().sum(1).max()) if fit.kind == "linear" else 1.0
        limit = slack_of(m.dtype) * size * float(expected.abs().max() + rows.abs().max())
        for offset in (0.0,) if end.mixes else (0.0, 1.0):
            fold(end, fit.a, fit.c, moments.covariance(), offset)
            after = end.rows(self._student_parts(end, x)[0])
            if bool((after - expected).abs().max() <= limit):
                return True
            for module, state in zip(modules, kept, strict=True):
                module.load_state_dict(state)
        return False


def _counting(x: Any, state: Tensor, name: str | None) -> Tensor | None:
    """Which states are of no padding, in a row; None where none is known to be."""
    if not isinstance(x, Mapping) or state.dim() != 3:
        return None
    masks = MASKS if "decoder" not in (name or "") else MASKS[::-1]
    found = (x[key] for key in masks if isinstance(x.get(key), Tensor))
    mask = next((mask for mask in found if mask.shape == state.shape[:2]), None)
    return None if mask is None else mask.flatten() != 0
