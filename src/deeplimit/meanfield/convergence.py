"""The certificate of convergence: a rate fixed at the start, and whether training keeps to it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from deeplimit._anatomy import Anatomy, model_of
from deeplimit._anatomy.checks import check_number
from deeplimit.errors import InputError
from deeplimit.meanfield.flow import Coordinate, coordinates, length, slope_of
from deeplimit.meanfield.measure import LayerwiseMeasure
from deeplimit.meanfield.transport import cot_distance
from deeplimit.network.blocks import check_values
from deeplimit.records import Record
from deeplimit.tables import number, table

ABOVE = 1e-9  # the guaranteed curve, relative: rounding
ROUNDING = 100  # a mean of losses is good to so many units of the last place


@dataclass(frozen=True)
class ConvergenceCertificate(Record):
    """The record of a training against the guarantee given at its start.

    Attributes:
        times: t_k, in the flow's time: the sum of the learning rates.
        risks: L(μ_t), the risk above its infimum.
        slopes: ‖∇L‖_μ.
        rates: m̂(t) = ‖∇L‖²_μ/(2L); None where L is 0.
        distances: d(μ_0, μ_t), by layer-conditional optimal transport.
        path_lengths: of the way there, record by record, every particle its own; ≥ the distance.
        guaranteed: e^{−2m(t − t_0)} L(μ_0).
        m: the rate fixed at the start.
        budget: R = √(2L(μ_0)/m).
        broken_at: the first record that breaks it, counted from 0; None if it holds.
        broken_by: by what: "rate" (m̂ < m), "distance" (d > R), or both; where no record does
            either, "risk" (above the guaranteed curve, which the two conditions exclude for a
            gradient flow, so that the steps are none); empty if it holds.
        verdict: one line.
    """

    times: tuple[float, ...]
    risks: tuple[float, ...]
    slopes: tuple[float, ...]
    rates: tuple[float | None, ...]
    distances: tuple[float, ...]
    path_lengths: tuple[float, ...]
    guaranteed: tuple[float, ...]
    m: float
    budget: float
    broken_at: int | None
    broken_by: tuple[str, ...]
    verdict: str

    def __str__(self) -> str:
        """The verdict, and a row for each record; of many records some."""
        names = {"t": "times", "risk": "risks", "guaranteed": "guaranteed", "m̂": "rates"}
        names |= {"distance": "distances"}
        each = zip(*(getattr(self, name) for name in names.values()), strict=True)
        rows = [[number(value) for value in values] for values in each]
        return f"{self.verdict}\n{table(list(names), rows)}"

    @property
    def holds(self) -> bool:
        """True where no record breaks it."""
        return self.broken_at is None


class ConvergenceRecorder:
    """Records a training for its certificate; made by `certify_convergence`."""

    def __init__(self, model: nn.Module | Anatomy, infimum: float, m: float | None, others: float):
        self.model = model_of(model)
        self.infimum = check_number("the infimum of the risk", infimum, "a finite number")
        expected = (
            "a number above 0: a kernel that is singular guarantees no rate; leave m out for half "
            "of m̂ at the first record"
        )
        if m is not None:
            m = check_number("m", m, expected, lambda v: 0 < v < math.inf)
        self._m, self._every = m, coordinates(model, others)
        LayerwiseMeasure.of(model)  # what has no measure is refused before any training
        self._records: list[_Record] = []
        self._before: list[Tensor] = []

    def record(self, time: float, risk: float | Tensor) -> None:
        """Takes down the state of the training: after `loss.backward()`, before the step.

        Args:
            time: of the flow, larger than at the record before; with steps of lr from 0 it is
                k·lr at step k.
            risk: L + infimum, on the data whose gradient the parameters have. On a part of the data
                risk and slope are estimates, and so is the answer.

        Raises:
            InputError: a time that does not grow, a risk that is not finite or below the infimum,
                no gradients, parameters that are not finite, or a start where the risk is its
                infimum or the slope is 0, where there is nothing to certify.
        """
        expected = "a number, one for the whole batch"
        value = check_number("the risk", risk, expected, lambda _: True)
        when = check_number("time", time, "a number that grows", lambda _: True)
        last = self._records[-1] if self._records else None
        if not math.isfinite(when) or (last is not None and when <= last.time):
            after = "" if last is None else f" after {last.time:g}"
            raise InputError(f"time {when:g} given{after}; expected finite times that grow")
        excess = self._excess(value)
        check_values(self.model.named_parameters())
        slope = slope_of(self._every)
        if last is None and not (excess > 0 and slope > 0):
            raise InputError(
                f"at the start the risk is {excess:g} above its infimum, the slope {slope:g}: with "
                "one of them 0 there is nothing to certify"
            )
        measure = LayerwiseMeasure.of(self.model)
        now = [c.parameter.detach().clone() for c in self._every]
        if last is None:
            self._start, distance, path = (measure, now), 0.0, 0.0
            self._m = slope**2 / (4 * excess) if self._m is None else self._m
        else:
            start, thetas = self._start
            path = last.path + length(self._moved(self._before, now))
            # COT of the particles, and Euclidean of what belongs to none.
            others = [(c, move) for c, move in self._moved(thetas, now) if c.role != "particle"]
            distance = math.hypot(cot_distance(start, measure).distance, length(others))
        self._before = now
        self._records.append(_Record(when, excess, slope, distance, path))

    def certificate(self) -> ConvergenceCertificate:
        """The answer for what was recorded so far.

        Raises:
            InputError: nothing was.
        """
        if not self._records or self._m is None:
            raise InputError("nothing was recorded; call record(time, risk) after each backward()")
        return _certificate(self._records, self._m)

    def _moved(self, then: list[Tensor], now: list[Tensor]) -> Iterator[tuple[Coordinate, Tensor]]:
        return zip(self._every, map(torch.sub, now, then), strict=True)

    def _excess(self, risk: float) -> float:
        """The risk above its infimum; within rounding of it, 0."""
        if not math.isfinite(risk):
            raise InputError(f"the risk is {risk}; the training diverged: take a smaller lr")
        dtype = self._every[0].parameter.dtype if self._every else torch.float32
        rounding = ROUNDING * torch.finfo(dtype).eps * abs(self.infimum)
        if risk < self.infimum - rounding:
            raise InputError(
                f"the risk is {risk:g}, below the infimum given, {self.infimum:g}; give the lowest "
                "value that it can have: 0 for a squared error, H(q) for the soft cross-entropy"
            )
        excess = risk - self.infimum
        return excess if excess > rounding else 0.0


class _Record(NamedTuple):
    time: float
    risk: float
    slope: float
    distance: float
    path: float

    @property
    def rate(self) -> float | None:
        """m̂."""
        return self.slope**2 / (2 * self.risk) if self.risk > 0 else None


def certify_convergence(
    model: nn.Module | Anatomy, *, infimum: float = 0.0, m: float | None = None, others: float = 1.0
) -> ConvergenceRecorder:
    """Makes a recorder of whether the training of a network keeps a rate fixed at its start.

    Local Polyak–Łojasiewicz: if ‖∇L‖²_μ ≥ 2m·L on the COT ball B(μ_0, R), R ≥ √(2L(μ_0)/m), then
    the gradient flow stays in the ball and

        L(μ_t) ≤ e^{−2mt} L(μ_0),    L the risk above its infimum.

    m is fixed at the first record and with it the budget R = √(2L(μ_0)/m) and the curve; at every
    record m̂(t) = ‖∇L‖²_μ/(2L) ≥ m, d(μ_0, μ_t) ≤ R and the inequality itself are looked at, and
    nothing in between. The certificate holds up to the first record that violates one of them.
    (With m the least m̂ of the whole run both conditions would hold always, and prove nothing.)

        >>> optimizer, recorder = particle_flow(model, 0.01), certify_convergence(model)
        >>> for k in range(3):
        ...     optimizer.zero_grad()
        ...     risk = (model(x) - x).square().mean()
        ...     risk.backward()
        ...     recorder.record(k * 0.01, risk)
        ...     loss = optimizer.step()
        >>> recorder.certificate().holds
        True

    It speaks of the gradient flow: steps of `particle_flow` without momentum and betas, small
    enough that the risk falls, on all the data. Then d ≤ R follows from m̂ ≥ m; d > R by itself says
    that the steps were no gradient flow. A record takes as long as `cot_distance`. m̂ is a mean of
    the kernel's eigenvalues, weighted by the error in their directions, and falls even where all is
    well, fast ones first: half of m̂ at the start suits kernels whose eigenvalues are near to one
    another (samples far apart, many particles); the m of `feature_kernel` waits for the slowest.

    Where others > 0 what is trained besides the particles belongs to the flow: its gradient to the
    slope and its change to the distance, d² + Σ ‖θ_t − θ_0‖²/others, as does a bias c behind V.

    Args:
        model: the network, as for `particle_flow`.
        infimum: of the risk: 0 for a squared error, H(q) for the soft cross-entropy. A risk closer
            to it than rounding counts as it; near convergence give `loss.excess` and 0.
        m: the rate; None for m̂/2 at the first record. `feature_kernel` has one from [BPV24].
        others: as given to `particle_flow`.

    Raises:
        InputError: a network that is not a mean of particles, an infimum that is not finite, m ≤ 0,
            or parameters that are not finite.

    Source: [BPV24] arXiv 2403.12887.
    """
    return ConvergenceRecorder(model, infimum, m, others)


def _certificate(records: list[_Record], m: float) -> ConvergenceCertificate:
    first, last = records[0], records[-1]
    budget = math.sqrt(2 * first.risk / m)
    guaranteed = [math.exp(-2 * m * (r.time - first.time)) * first.risk for r in records]
    conditions = [
        {"rate": r.slope**2 < 2 * m * r.risk, "distance": r.distance > budget} for r in records
    ]
    if not any(any(c.values()) for c in conditions):
        pairs = zip(records, guaranteed, strict=True)
        conditions = [{"risk": r.risk > curve * (1 + ABOVE)} for r, curve in pairs]
    names = [tuple(name for name, violated in c.items() if violated) for c in conditions]
    broken_at = next((k for k, found in enumerate(names) if found), None)
    verdict = (
        f"holds for {len(records)} records up to t = {last.time:.3g}: m̂ stayed above m = {m:.3g}, "
        f"the distance travelled is {last.distance:.3g} of R = {budget:.3g}; risk {last.risk:.3g}, "
        f"guaranteed {guaranteed[-1]:.3g}"
    )
    if broken_at is not None:
        r = records[broken_at]
        reasons = {
            "rate": f"m̂ = {r.rate or 0:.3g} is below m = {m:.3g}",
            "distance": f"the distance travelled, {r.distance:.3g}, is above the budget R = "
            f"{budget:.3g}",
            "risk": f"the risk, {r.risk:.3g}, is above the guaranteed {guaranteed[broken_at]:.3g}: "
            "the steps are too large for a gradient flow",
        }
        why = " and ".join(reasons[name] for name in names[broken_at])
        verdict = f"broken since record {broken_at} (t = {r.time:.3g}): {why}"
    times, risks, slopes, distances, paths = zip(*records, strict=True)
    return ConvergenceCertificate(
        *(times, risks, slopes, tuple(r.rate for r in records), distances, paths),
        guaranteed=tuple(guaranteed),
        m=m,
        budget=budget,
        broken_at=broken_at,
        broken_by=() if broken_at is None else names[broken_at],
        verdict=verdict,
    )
