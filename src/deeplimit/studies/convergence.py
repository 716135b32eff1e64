"""Where does training converge at a rate that is known before it starts?

Networks x + (1/N) (1/M) Σ_i u_i tanh(w_i·x + b_i) follow the gradient flow of a regression on D
samples, from targets near their first outputs, a small initial risk, to targets far away. A local
Polyak–Łojasiewicz inequality ‖∇L‖² ≥ 2mL near the start guarantees L(t) ≤ e^{−2mt} L(0). [BPV24]:
such an m > 0 there is where the particles are many enough for the kernel of the features, which is
singular for M < D, and the initial risk is small enough for the flow to stay near. Source: [BPV24]
arXiv 2403.12887.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import linear_regression
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deeplimit.errors import InputError, RunError
from deeplimit.meanfield import (
    ConvergenceCertificate,
    LayerwiseMeasure,
    certify_convergence,
    feature_kernel,
    particle_flow,
)
from deeplimit.network import ResidualChain, TwoLayerResidual
from deeplimit.records import Record
from deeplimit.studies import harness
from deeplimit.studies.harness import Machine, Point, Study, Tell
from deeplimit.studies.rates import looked_at, normal

Source = Literal["kernel", "slope"]

ACTIVATION = "tanh"
STATE = 16  # numbers in the state
SIZE = 1.0  # of u, as of w·x and b
LOOKS = 40
ENOUGH = 1e-18  # of the first risk; below, what falls is rounding


@dataclass(frozen=True)
class ConvergenceTraining:
    """Holds one training, and what its certificates say.

    Attributes:
        width: M.
        distance: ρ: the root mean square distance of the targets from the first outputs.
        seed: of data and particles.
        kernel: the smallest eigenvalue of any layer's feature kernel, before training.
        kernel_m: the m that it gives; 0 where the kernel is singular.
        fitted: half the rate at which the logarithm of the risk falls in the second half of the
            records; to compare with m. None where the risk is not above rounding there.
        by_kernel: the certificate with that m; None where it is 0.
        by_slope: the certificate with m = m̂/2 at the first record.
    """

    width: int
    distance: float
    seed: int
    kernel: float
    kernel_m: float
    fitted: float | None
    by_kernel: ConvergenceCertificate | None
    by_slope: ConvergenceCertificate

    @property
    def initial(self) -> float:
        """L(μ_0)."""
        return self.by_slope.risks[0]

    def certificate(self, source: Source) -> ConvergenceCertificate | None:
        """Returns the one whose m is from there."""
        return self.by_kernel if source == "kernel" else self.by_slope


@dataclass(frozen=True)
class ConvergenceStudy(Record):
    """Holds what `study_convergence` finds; attributes not named here are its arguments.

    Attributes:
        folder: where study.json is.
        state: d.
        steps: of the flow.
        trainings: one for every width, distance and seed.
        machine: that the study was run on.
    """

    folder: str
    depth: int
    widths: tuple[int, ...]
    distances: tuple[float, ...]
    seeds: tuple[int, ...]
    state: int
    samples: int
    learning_rate: float
    steps: int
    trainings: tuple[ConvergenceTraining, ...]
    machine: Machine | None = None

    def cell(self, width: int, distance: float) -> tuple[ConvergenceTraining, ...]:
        """Returns the trainings of one width and distance, one for each seed."""
        return tuple(t for t in self.trainings if (t.width, t.distance) == (width, distance))

    def held(self, width: int, distance: float, source: Source) -> float:
        """Counts the certificates of a cell that hold, as a part of all; a missing one does not."""
        found = [t.certificate(source) for t in self.cell(width, distance)]
        return sum(c is not None and c.holds for c in found) / len(found)


def experiment(
    widths: Sequence[int],
    distances: Sequence[float],
    seeds: Sequence[int],
    depth: int,
    samples: int,
    learning_rate: float,
    time: float,
) -> Study[ConvergenceTraining, ConvergenceStudy]:
    """Returns the study of networks of every width from every initial risk, with certificates."""
    seeds, widths = harness.whole("seeds", seeds), harness.whole("widths", widths)
    depth, samples = harness.whole("depth and samples", (depth, samples))
    harness.check_once("seeds", seeds)
    steps = check_time(learning_rate, time)
    rising = "from the smallest to the largest"
    harness.check_rising("widths", widths, f"whole numbers ≥ 1, {rising}", least=1.0)
    harness.check_rising("distances", distances, f"numbers above 0, {rising}", least=math.ulp(0.0))
    if depth < 1 or not 2 <= samples <= STATE:
        raise InputError(
            f"depth {depth} and {samples} samples given; expected at least 1 layer and 2 … {STATE} "
            "samples, which are orthogonal"
        )
    harness.check_fits(depth, 2 * widths[-1] * (2 * STATE + 1))  # with their gradients

    def measure(points: Sequence[Point], _: Path, tell: Tell) -> list[ConvergenceTraining]:
        ((width, distance, seed),) = points
        tell(f"M = {width}, ρ = {distance:g}, seed {seed}")
        network = drawn(depth, width, distance, samples, seed)
        return [_trained(*network, learning_rate, steps, width=width, distance=distance, seed=seed)]

    axes = {"widths": widths, "distances": distances, "seeds": seeds}
    sizes = {"depth": depth, "state": STATE, "samples": samples}
    return Study(
        name="convergence",
        record=ConvergenceStudy,
        axes=axes,
        settings=sizes | {"learning_rate": learning_rate, "steps": steps},
        value=ConvergenceTraining,
        measure=measure,
        result=lambda found, _: {"trainings": tuple(found[p] for p in product(*axes.values()))},
    )


def _trained(
    model: nn.Module, x: Tensor, y: Tensor, learning_rate: float, steps: int, **named: Any
) -> ConvergenceTraining:
    """Trains one network, and certifies it by both ways to an m."""
    kernel, looks, least = feature_kernel(model, x), set(looked_at(steps, LOOKS)), 0.0
    recorders = [certify_convergence(model)]
    if kernel.m > 0:
        recorders.append(certify_convergence(model, m=kernel.m))

    def look(step: int, risk: Tensor) -> None:
        nonlocal least
        if step == 0:
            least = ENOUGH * float(risk)
        if step in looks and float(risk) > least:
            for recorder in recorders:
                recorder.record(step * learning_rate, float(risk))

    flow(model, x, y, learning_rate, steps, look)
    by_slope, by_kernel, *_ = *(recorder.certificate() for recorder in recorders), None
    return ConvergenceTraining(
        kernel=min(kernel.smallest),
        kernel_m=kernel.m,
        fitted=fitted_rate(by_slope.times, by_slope.risks),
        by_kernel=by_kernel,
        by_slope=by_slope,
        **named,
    )


def drawn(
    depth: int, width: int, distance: float, samples: int, seed: int
) -> tuple[nn.Module, Tensor, Tensor]:
    """Draws a network, and a regression whose targets are ρ from its outputs.

    Inputs are orthogonal, of length √d, as far apart as they can be; these and the directions of
    the targets are the seed's, whatever the width and ρ.
    """
    generator = generator_of(seed)
    rows, direction = normal(generator, 2, samples, STATE)
    x = math.sqrt(STATE) * torch.linalg.qr(rows.mT).Q.mT
    direction = direction / direction.square().sum(1).mean().sqrt()
    particles = normal(generator_of(seed, width), depth, width, 2 * STATE + 1)
    particles[:, :, :STATE] *= SIZE
    particles[:, :, STATE : 2 * STATE] /= math.sqrt(STATE)
    model = network_of(particles)
    with torch.no_grad():
        return model, x, model(x) + distance * direction


def fitted_rate(times: Sequence[float], risks: Sequence[float]) -> float | None:
    """Fits the rate r of L(t) ~ e^{−2rt}, by least squares of log L over the later half."""
    pairs = [(t, math.log(risk)) for t, risk in zip(times, risks, strict=True) if risk > 0]
    late = pairs[len(pairs) // 2 :]
    if len(late) < 2:
        return None
    return -float(linear_regression(*zip(*late, strict=True)).slope) / 2


def generator_of(*seeds: int) -> torch.Generator:
    """Makes one for these seeds together."""
    mixed = 0
    for seed in seeds:
        mixed = (mixed * 1_000_003 + seed + 1) % (2**62)
    return torch.Generator().manual_seed(mixed)


def network_of(particles: Float[Tensor, "N M p"]) -> nn.Module:
    """Makes N layers x + (1/N) (1/M) Σ_i u_i tanh(w_i·x + b_i) of these particles (u, w, b)."""
    state = (particles.shape[2] - 1) // 2
    template = ResidualChain([TwoLayerResidual(state, 1, ACTIVATION).double()], step=1.0)
    return LayerwiseMeasure(particles, frame=template).network()


def risk_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Computes 1/(2D) Σ ‖z − y‖²."""
    return torch.sum((model(x) - y).square()) / (2 * len(x))


def flow(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    learning_rate: float,
    steps: int,
    look: Callable[[int, Tensor], object] = lambda *_: None,
) -> None:
    """Takes explicit Euler steps of the gradient flow of the risk, of this length, in place.

    `look` is told the step and the risk, with the gradients there, before each step and at the end.
    """
    optimizer = particle_flow(model, learning_rate)
    for step in range(steps + 1):
        optimizer.zero_grad()
        risk = risk_of(model, x, y)
        if not bool(risk.isfinite()):
            raise RunError(
                f"the risk is not finite after {step} steps; give a smaller learning rate"
            )
        torch.autograd.backward(risk)
        look(step, risk.detach())
        if step < steps:
            optimizer.step()


def check_time(learning_rate: float, time: float) -> int:
    """Counts the steps that a time takes; raises InputError unless both are above 0."""
    harness.check_positive(learning_rate=learning_rate, time=time)
    steps = round(time / learning_rate)
    if steps < 1:
        raise InputError(f"the time is {time}, less than one step of {learning_rate}")
    return steps
