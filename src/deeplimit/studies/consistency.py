"""Does training with steps scaled by N·M stop depending on width and depth as both grow?

Networks x + (1/N) (1/M) Σ_i u_i tanh(w_i·x + b_i) of (N, M) particles follow the gradient flow of
one regression for one time. The theory, with d the layer-conditional distance:

    from an initial measure of few atoms, smooth in s       d between successive sizes ~ 1/N
    from samples independent across layers                  outputs differ by ~ 1/N + 1/√(NM)
    from the same samples in every layer                    outputs differ by ~ 1/N + 1/√M
    distance travelled, steps scaled by N·M                 stays
    distance travelled, steps not scaled                    ~ 1/(NM)

Distances of independent samples tell nothing: they fall as M^{−1/p} for particles of p > 4 numbers,
however the networks are trained. Source: [BPV24] arXiv 2403.12887.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deeplimit._anatomy.checks import check_count
from deeplimit.errors import InputError
from deeplimit.meanfield import LayerwiseMeasure, cot_distance
from deeplimit.records import Record
from deeplimit.studies import harness
from deeplimit.studies.convergence import check_time, flow, generator_of, network_of
from deeplimit.studies.harness import Machine, Point, Study, Tell
from deeplimit.studies.rates import Slopes, normal

STATE = 4  # numbers in the state; a particle has 2 · 4 + 1
SAMPLES, SEEN = 16, 64  # trained on; looked at
SPREAD = 0.3  # of particles around their atom, where samples are drawn
SIZE = 2.0  # of u

# start, quantity, what it is fitted against, its size for (N, M), and the theory of the slope.
THEORY = (
    ("atoms", "distance", "N", lambda n, _: float(n), (-1.2, -0.8)),
    ("independent", "output", "1/N + 1/√(NM)", lambda n, m: 1 / n + (n * m) ** -0.5, (0.75, 1.25)),
    ("tied", "output", "M", lambda _, m: float(m), (-0.7, -0.3)),  # 1/√M is above 1/N from here on
    ("independent", "travelled", "NM", lambda n, m: float(n * m), (-0.1, 0.1)),
    ("independent", "unscaled", "NM", lambda n, m: float(n * m), (-1.1, -0.9)),
)
Values = dict[str, tuple[float, ...]]  # of a seed: by quantity and start, one for each size or pair


@dataclass(frozen=True, kw_only=True)
class ConsistencyRate(Slopes):
    """One quantity against the size of the network.

    Attributes:
        start: atoms, independent, tied: how the particles were drawn.
        quantity: distance: of successive networks, d; output: of successive networks, the root mean
            square over samples and draws; travelled: d from the start of training to its end;
            unscaled: the same with steps that are not scaled by N·M.
        against: what it is fitted against, in words.
        sizes: its values, one for each column of `values`.
    """

    start: str
    quantity: str
    against: str
    sizes: tuple[float, ...]

    @property
    def within(self) -> bool | None:
        """True if the slope, the mean of all seeds', is as the theory says."""
        return self.allow(self.slope)


@dataclass(frozen=True)
class ConsistencyStudy(Record):
    """Holds what `study_consistency` finds; attributes not named here are its arguments.

    Attributes:
        folder: where study.json is.
        steps: of the flow.
        state, samples: d and D.
        rates: what was measured.
        machine: that the study was run on.
    """

    folder: str
    depths: tuple[int, ...]
    widths: tuple[int, ...]
    seeds: tuple[int, ...]
    draws: int
    atoms: int
    learning_rate: float
    steps: int
    state: int
    samples: int
    rates: tuple[ConsistencyRate, ...]
    machine: Machine | None = None

    def rate(self, quantity: str, start: str) -> ConsistencyRate:
        """Returns the one of that quantity and start."""
        return next(r for r in self.rates if (r.quantity, r.start) == (quantity, start))


@dataclass(frozen=True)
class Problem:
    """Holds what a seed draws: the atoms' curves in depth, and a regression.

    Attributes:
        seed: of all of it.
        cosine, sine: [K, p]; atom k at depth s is cosine_k cos(πs/2) + sine_k sin(πs/2).
        x, y: the data.
        seen: inputs on which outputs are compared.
    """

    seed: int
    cosine: Tensor
    sine: Tensor
    x: Tensor
    y: Tensor
    seen: Tensor

    @classmethod
    def of(cls, seed: int, atoms: int) -> "Problem":
        """Draws that of a seed."""
        generator = generator_of(seed)
        curves = normal(generator, 2, atoms, 2 * STATE + 1)
        curves[:, :, :STATE] *= SIZE
        x, y = normal(generator, 2, SAMPLES, STATE)
        return cls(seed, curves[0], curves[1], x, y, normal(generator, SEEN, STATE))

    def centres(self, horizon: int) -> Float[Tensor, "N K p"]:
        """The atoms at s_n = n/N."""
        s = torch.arange(horizon, dtype=torch.float64)[:, None, None] / horizon
        angle = math.pi / 2 * s
        return self.cosine * angle.cos() + self.sine * angle.sin()

    def particles(self, start: str, horizon: int, width: int, draw: int) -> Tensor:
        """[N, M, p] before training; atoms as they are, or normal draws around them."""
        centres = self.centres(horizon)
        count = centres.shape[1]
        if start == "atoms":
            return centres.repeat(1, width // count, 1)
        generator = generator_of(self.seed, draw, horizon, width, start == "tied")
        layers = 1 if start == "tied" else horizon
        which = torch.randint(count, (layers, width), generator=generator).expand(horizon, -1)
        noise = SPREAD * normal(generator, layers, width, centres.shape[2])
        return centres.gather(1, which[:, :, None].expand(-1, -1, centres.shape[2])) + noise

    def trained(
        self, horizon: int, width: int, steps: int, start: str, draw: int, rate: float
    ) -> nn.Module:
        """Draws a network and lets it flow."""
        model = network_of(self.particles(start, horizon, width, draw))
        flow(model, self.x, self.y, rate, steps)
        return model


def experiment(
    depths: Sequence[int],
    widths: Sequence[int],
    seeds: Sequence[int],
    draws: int,
    atoms: int,
    learning_rate: float,
    time: float,
) -> Study[Values, ConsistencyStudy]:
    """Returns the study of networks of every size, for one flow time, in float64."""
    expected = (
        "at least three sizes of 2 layers or more, a width for each depth, "
        "from the smallest to the largest"
    )
    seeds, (atoms,) = harness.whole("seeds", seeds), harness.whole("atoms", atoms)
    depths, widths = harness.whole("depths", depths), harness.whole("widths", widths)
    harness.check_once("seeds", seeds)
    harness.check_rising("depths", depths, expected, least=2.0, count=3)
    harness.check_rising("widths", widths, expected, least=1.0, count=len(depths))
    if len(widths) > len(depths):
        raise InputError(f"{len(widths)} widths given; expected {expected}")
    if atoms < 1 or any(width % atoms for width in widths):
        raise InputError(f"atoms is {atoms}; expected a number that divides every width")
    check_count("draws", draws)
    steps, sizes = check_time(learning_rate, time), list(zip(depths, widths, strict=True))
    for depth, width in sizes:
        harness.check_fits(depth, draws * width * (2 * STATE + 1))

    def measure(points: Sequence[Point], _: Path, tell: Tell) -> list[Values]:
        ((seed,),) = points
        problem, total, done = Problem.of(seed, atoms), sum(n * m for n, m in sizes), 0
        measures: list[LayerwiseMeasure] = []
        found: dict[str, list[Any]] = {f"{quantity} {start}": [] for start, quantity, *_ in THEORY}
        for n, m in sizes:
            tell(f"seed {seed}, N = {n}, M = {m}", done / total)
            trained = partial(problem.trained, n, m, steps)
            measures.append(LayerwiseMeasure.of(trained("atoms", 0, learning_rate)))
            for start in ("tied", "independent"):
                models = [trained(start, draw, learning_rate) for draw in range(draws)]
                with torch.no_grad():
                    outputs = torch.stack([model(problem.seen) for model in models])
                found[f"output {start}"].append(outputs)
            before = problem.particles("independent", n, m, 0)
            slow = trained("independent", 0, learning_rate / (n * m))
            found["travelled independent"].append(_from(before, models[0]))
            found["unscaled independent"].append(_from(before, slow))
            done += n * m
        found["distance atoms"] = [cot_distance(a, b).distance for a, b in pairwise(measures)]
        for start in ("tied", "independent"):
            found[f"output {start}"] = [
                _apart(*pair) for pair in pairwise(found[f"output {start}"])
            ]
        return [{name: tuple(values) for name, values in found.items()}]

    def rates(found: Mapping[Point, Values], _: Path) -> dict[str, object]:
        made = []
        for start, quantity, against, size, theory in THEORY:
            rows = [found[(seed,)][f"{quantity} {start}"] for seed in seeds]
            columns = tuple(size(n, m) for n, m in sizes)[: len(rows[0])]
            names = {"start": start, "quantity": quantity, "against": against, "sizes": columns}
            made.append(ConsistencyRate.fitted(columns, rows, theory, **names))
        return {"rates": tuple(made)}

    settings = {"depths": depths, "widths": widths, "draws": draws, "atoms": atoms}
    flowing = {"learning_rate": learning_rate, "steps": steps, "state": STATE, "samples": SAMPLES}
    return Study(
        name="consistency",
        record=ConsistencyStudy,
        axes={"seeds": seeds},
        settings=settings | flowing,
        value=Values,
        measure=measure,
        result=rates,
    )


def _from(before: Tensor, model: nn.Module) -> float:
    return cot_distance(LayerwiseMeasure(before, frame=model), model).distance


def _apart(a: Tensor, b: Tensor) -> float:
    """Computes the root mean square over draws and samples of the distance of two outputs."""
    return float((a - b).square().sum(-1).mean().sqrt())
