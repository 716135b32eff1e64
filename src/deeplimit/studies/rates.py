"""Rates in depth: how a quantity falls with N, and what the theory says of its slope."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean, linear_regression
from typing import Any, Literal, TypeVar, cast

import torch
from jaxtyping import Float
from torch import Tensor

from deeplimit.errors import InputError, RunError
from deeplimit.files import write_text
from deeplimit.memory import OBJECTS, require
from deeplimit.records import to_plain
from deeplimit.studies.horizon import STUDY
from deeplimit.training.new_folder import new_folder

Quantity = Literal["gap", "difference"]
Moment = Literal["initial", "final", "worst"]
Range = tuple[float | None, float | None]
Tell = Callable[[str, float], None]  # what is done now, and the fraction of all that is done

Study = TypeVar("Study")

ANY: Range = (None, None)


@dataclass(frozen=True)
class Rate:
    """One quantity at one moment of training, against N.

    Attributes:
        quantity: gap, max_n ‖x_n − x(s_n)‖ to the Neural ODE; or difference, max_n ‖θ_{n+1} − θ_n‖.
        moment: of training: initial, final, or the worst of those looked at.
        values: [seeds][depths].
        slopes: of log value against log N by least squares, one for each seed.
        slope: that of the geometric mean over the seeds, which is the mean of the slopes.
        low, high: what the theory says of the slope; None where it sets no limit.
    """

    quantity: Quantity
    moment: Moment
    values: tuple[tuple[float, ...], ...]
    slopes: tuple[float, ...]
    slope: float
    low: float | None
    high: float | None

    @property
    def within(self) -> bool | None:
        """Whether the slope of every seed is as the theory says; None where it says nothing."""
        if self.low is None and self.high is None:
            return None
        low, high = _limits((self.low, self.high))
        return all(low <= slope <= high for slope in self.slopes)


@dataclass(frozen=True)
class Family:
    """Networks that differ in depth and seed only.

    Attributes:
        start: how their controls started.
        activation: σ; empty for linear residuals.
        initial_loss, final_loss: [seeds][depths].
        rates: gap and difference at each moment.
    """

    start: str
    activation: str
    initial_loss: tuple[tuple[float, ...], ...]
    final_loss: tuple[tuple[float, ...], ...]
    rates: tuple[Rate, ...]

    @property
    def name(self) -> str:
        """`tanh, smooth`."""
        return ", ".join(filter(None, (self.activation, self.start)))

    def rate(self, quantity: Quantity, moment: Moment) -> Rate:
        """The one of that quantity and moment."""
        return next(r for r in self.rates if (r.quantity, r.moment) == (quantity, moment))


@dataclass(frozen=True)
class Watched:
    """What was seen of one network in training, at each of the steps looked at.

    Attributes:
        loss, gap, difference: one number for each of those steps, the first before training.
    """

    loss: tuple[float, ...]
    gap: tuple[float, ...]
    difference: tuple[float, ...]


def family(
    start: str,
    activation: str,
    depths: Sequence[int],
    watched: Sequence[Sequence[Watched]],
    theory: Mapping[tuple[Quantity, Moment], Range],
) -> Family:
    """Gap and difference against N, from what was seen of the networks, [seeds][depths].

    Args:
        start: as in `Family`.
        activation: as in `Family`.
        depths: N of each column.
        watched: one for each seed and depth.
        theory: what the slopes should be; anything where it has no entry.
    """
    take: dict[Moment, Callable[[tuple[float, ...]], float]] = {
        "initial": lambda seen: seen[0],
        "final": lambda seen: seen[-1],
        "worst": max,
    }
    rates = []
    quantities: tuple[Quantity, ...] = ("gap", "difference")
    for quantity in quantities:
        for moment, at in take.items():
            values = tuple(tuple(at(getattr(w, quantity)) for w in row) for row in watched)
            low, high = theory.get((quantity, moment), ANY)
            slopes = tuple(fitted_slope(depths, row) for row in values)
            rates.append(Rate(quantity, moment, values, slopes, fmean(slopes), low, high))
    first, last = (tuple(tuple(w.loss[i] for w in row) for row in watched) for i in (0, -1))
    return Family(start, activation, first, last, tuple(rates))


def fitted_slope(depths: Sequence[float] | Sequence[int], values: Sequence[float]) -> float:
    """Of log value against log N, by least squares."""
    logs = [math.log(depth) for depth in depths], [math.log(value) for value in values]
    return float(linear_regression(*logs).slope)


def whole_range(slope: Range) -> dict[tuple[Quantity, Moment], Range]:
    """The same range for both quantities at every moment."""
    return {
        (quantity, moment): slope
        for quantity in ("gap", "difference")
        for moment in ("initial", "final", "worst")
    }


def looked_at(steps: int, times: int) -> tuple[int, ...]:
    """Steps 0 … `steps`, evenly spaced, at which a network in training is looked at."""
    return tuple(sorted({round(steps * i / times) for i in range(times + 1)}))


def converged(gap: Callable[[int], Float[Tensor, "..."]], precision: float) -> Float[Tensor, "..."]:
    """A gap to an ODE's solution, with 1, 2, 4, … steps of the solver in each interval.

    Until doubling them changes it by no more than `precision`, relatively; NaN where it never does.
    """
    before = gap(1)
    for doublings in range(1, 7):
        after = gap(2**doublings)
        if not after.isfinite().all():
            break
        if ((after - before).abs() <= precision * after).all():
            return after
        before = after
    return torch.full_like(before, math.nan)


def check_depths(depths: Sequence[int]) -> None:
    """At least two, from the smallest to the largest, each of two layers or more.

    Raises:
        InputError: they are not.
    """
    rising = all(a < b for a, b in pairwise(depths))
    if len(depths) < 2 or depths[0] < 2 or not rising:
        raise InputError(
            f"depths {' '.join(map(str, depths)) or '(none)'} given; expected at least two, from "
            "the smallest to the largest, each of 2 layers or more, such as 16 32 64"
        )


def check_fits(depth: int, numbers: int, *, modules: bool = True) -> None:
    """Networks of a depth, with so many float64 in a layer of all that are held at once.

    Raises:
        InputError: they do not fit into memory.
    """
    size = depth * (8 * numbers + modules * OBJECTS)
    require(size, f"networks of {depth} layers do not fit into memory", "give smaller numbers")


def check_flow(learning_rate: float, steps: int) -> None:
    """A positive η and at least one step.

    Raises:
        InputError: they are not.
    """
    if not (math.isfinite(learning_rate) and learning_rate > 0):
        raise InputError(f"the learning rate is {learning_rate}; it must be a number above 0")
    if steps < 1:
        raise InputError(f"{steps} steps asked for; expected at least 1")


def check_finite(watched: Watched, told: str) -> Watched:
    """The same, if all of it is finite.

    Raises:
        RunError: it is not.
    """
    if not all(map(math.isfinite, (*watched.loss, *watched.difference))):
        raise RunError(f"{told}: the training diverged; give a smaller learning rate")
    if not all(map(math.isfinite, watched.gap)):
        raise RunError(
            f"{told}: the Neural ODE through the controls cannot be solved to the precision of the "
            "gap; give a smaller learning rate"
        )
    return watched


def _limits(range_: Range) -> tuple[float, float]:
    low, high = range_
    return (-math.inf if low is None else low, math.inf if high is None else high)


def keep(study: Study, runs: Path, name: str) -> Study:
    """Writes study.json into a new folder, which it names then."""

    def fill(folder: Path, path: Path) -> None:
        kept = to_plain(replace(cast(Any, study), folder=str(path)))
        write_text(folder / STUDY, json.dumps(kept, allow_nan=False) + "\n")

    return replace(cast(Any, study), folder=str(new_folder(runs, name, fill)))
