"""Rates in depth: how a quantity falls with N, and what the theory says of its slope."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean, linear_regression
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from deeplimit.errors import InputError, RunError
from deeplimit.records import Record
from deeplimit.studies import harness
from deeplimit.studies.harness import Machine, Numbers, Point, Study

Quantity = Literal["gap", "difference"]
Moment = Literal["initial", "final", "worst"]
Range = tuple[float | None, float | None]
Theory = Mapping[tuple[Quantity, Moment], Range]
Fit = TypeVar("Fit", bound="Slopes")

ANY: Range = (None, None)
QUANTITIES: tuple[Quantity, ...] = ("gap", "difference")
MOMENTS: dict[Moment, Callable[[tuple[float, ...]], float]] = {
    "initial": lambda seen: seen[0],
    "final": lambda seen: seen[-1],
    "worst": max,
}


@dataclass(frozen=True, kw_only=True)
class Slopes:
    """A quantity against the size of the network.

    Attributes:
        values: [seeds][sizes].
        slopes: of log value against log size by least squares, one for each seed.
        slope: that of the geometric mean over the seeds, which is the mean of the slopes.
        low, high: what the theory says of the slope; None where it sets no limit.
    """

    values: tuple[tuple[float, ...], ...]
    slopes: tuple[float, ...]
    slope: float
    low: float | None
    high: float | None

    @classmethod
    def fitted(
        cls: type[Fit], at: Numbers, values: Sequence[Sequence[float]], theory: Range, /, **own: Any
    ) -> Fit:
        """Fits values [seeds][sizes] against the sizes; what else it has is its own."""
        x, rows = [*map(math.log, at)], tuple(map(tuple, values))
        slopes = tuple(float(linear_regression(x, [*map(math.log, row)]).slope) for row in rows)
        own |= {"slope": fmean(slopes), "low": theory[0], "high": theory[1]}
        return cls(values=rows, slopes=slopes, **own)

    def allow(self, *slopes: float) -> bool | None:
        """Returns True if slopes are as the theory says; None where it says nothing."""
        if self.low is None and self.high is None:
            return None
        low = -math.inf if self.low is None else self.low
        high = math.inf if self.high is None else self.high
        return all(low <= slope <= high for slope in slopes)


@dataclass(frozen=True, kw_only=True)
class Rate(Slopes):
    """One quantity at one moment of training, against N.

    Attributes:
        quantity: gap, max_n ‖x_n − x(s_n)‖ to the Neural ODE; or difference, max_n ‖θ_{n+1} − θ_n‖.
        moment: of training: initial, final, or the worst of those looked at.
    """

    quantity: Quantity
    moment: Moment

    @property
    def within(self) -> bool | None:
        """True if the slope of every seed is as the theory says; None where it says nothing."""
        return self.allow(*self.slopes)


@dataclass(frozen=True)
class Watched:
    """One network in training, at each of the steps looked at, the first before training.

    Attributes:
        loss, gap, difference: one number for each of those steps.
    """

    loss: tuple[float, ...]
    gap: tuple[float, ...]
    difference: tuple[float, ...]

    def checked(self, name: str) -> "Watched":
        """Returns itself; raises RunError where not all of it is finite."""
        if not all(map(math.isfinite, (*self.loss, *self.difference))):
            raise RunError(f"{name}: the training diverged; give a smaller learning rate")
        if not all(map(math.isfinite, self.gap)):
            raise RunError(
                f"{name}: the Neural ODE through the controls cannot be solved to the precision of "
                "the gap; give a smaller learning rate"
            )
        return self


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
        """Returns the one of that quantity and moment."""
        return next(r for r in self.rates if (r.quantity, r.moment) == (quantity, moment))


def whole_range(gap: Range, difference: Range) -> Theory:
    """Returns one range for each quantity, the same at every moment."""
    ranges = zip(QUANTITIES, (gap, difference), strict=True)
    return {(quantity, moment): limits for quantity, limits in ranges for moment in MOMENTS}


@dataclass(frozen=True, kw_only=True)
class DepthStudy(Record):
    """Families of networks of several depths; what is not named here is the study's argument.

    Attributes:
        folder: where study.json is.
        width: d.
        looked_at: the steps at which gap and smoothness were measured.
        families: one for each activation and start.
        machine: that the study was run on.
    """

    folder: str
    width: int
    learning_rate: float
    steps: int
    looked_at: tuple[int, ...]
    depths: tuple[int, ...]
    seeds: tuple[int, ...]
    families: tuple[Family, ...]
    machine: Machine | None = None


def depth_study(
    theory: Callable[[str, str], Theory], axes: Mapping[str, Sequence[Any]], **own: Any
) -> Study[Watched, Any]:
    """Returns a study over depths, seeds, starts, perhaps activations: a `Family` of each start.

    What else a `Study` has is its `own`; `theory` is of an activation and a start.
    """
    seeds, depths = axes["seeds"], axes["depths"]

    def families(found: Mapping[Point, Watched], _: Path) -> dict[str, object]:
        def network(**place: object) -> Watched:
            return found[tuple(place[axis] for axis in axes)]

        made = []
        for activation, start in product(axes.get("activations", ("",)), axes["starts"]):
            of = partial(network, activations=activation, starts=start)
            watched = [[of(seeds=seed, depths=depth) for depth in depths] for seed in seeds]
            first, last = (tuple(tuple(w.loss[i] for w in row) for row in watched) for i in (0, -1))
            said, fits = theory(activation, start), []
            for quantity, (moment, at) in product(QUANTITIES, MOMENTS.items()):
                values = [[at(getattr(w, quantity)) for w in row] for row in watched]
                limits = said.get((quantity, moment), ANY)
                fits.append(Rate.fitted(depths, values, limits, quantity=quantity, moment=moment))
            made.append(Family(start, activation, first, last, tuple(fits)))
        return {"families": tuple(made)}

    depth = list(axes).index("depths")
    return Study(axes=axes, value=Watched, result=families, cost=lambda p: p[depth], **own)


def looked_at(steps: int, times: int) -> tuple[int, ...]:
    """Spaces evenly over 0 … `steps` those at which a network in training is looked at."""
    return tuple(sorted({round(steps * i / times) for i in range(times + 1)}))


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    """Draws standard normal numbers in float64."""
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def converged(gap: Callable[[int], Float[Tensor, "..."]], precision: float) -> Float[Tensor, "..."]:
    """Computes a gap to an ODE's solution with 1, 2, 4, … steps of the solver in each interval.

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


def checked_flow(
    depths: Sequence[int], seeds: Sequence[int], learning_rate: float, steps: int
) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Returns depths, seeds and steps as Python's own whole numbers.

    Raises:
        InputError: depths do not rise, there is no seed or one twice, η is not above 0, no step.
    """
    depths, seeds = harness.whole("depths", depths), harness.whole("seeds", seeds)
    (steps,) = harness.whole("steps", steps)
    expected = (
        "at least two, from the smallest to the largest, each of 2 layers or more, such as 16 32 64"
    )
    harness.check_rising("depths", depths, expected, least=2.0, count=2)
    harness.check_once("seeds", seeds)
    harness.check_positive(learning_rate=learning_rate)
    if steps < 1:
        raise InputError(f"{steps} steps asked for; expected at least 1")
    return depths, seeds, steps
