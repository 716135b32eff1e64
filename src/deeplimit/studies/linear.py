"""Do linear residuals tend to a Neural ODE while they train? Measured against N.

The network x_{n+1} = x_n + θ_n x_n/N on the inputs I computes Π = (I + θ_{N−1}/N) … (I + θ_0/N),
and is trained by L = ½‖Π − B‖², with B independent of N, by the gradient flow in explicit steps

    θ_n ← θ_n − η N ∂L/∂θ_n,      N ∂L/∂θ_n = p_{n+1} x_nᵀ,
    p_N = Π − B,   p_n = p_{n+1} + θ_nᵀ p_{n+1}/N.

From a start that is smooth in depth, with a small loss, ‖θ_{n+1} − θ_n‖ and the gap to the Neural
ODE ẋ = θ(s) x both stay O(1/N) uniformly in training time. From independent controls the first
does not fall, though the gap does (∫θ ds averages them); from θ_n = (−1)ⁿ √N I neither falls.
Source: [SAP22] arXiv 2205.14612, section 3 and figure 2.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from deeplimit.extras import need
from deeplimit.studies import harness, rates
from deeplimit.studies.harness import Point, Study, Tell
from deeplimit.studies.rates import Range, Theory, Watched, looked_at, normal, whole_range

WIDTH = 4
SPREAD = 0.5  # of the controls and of B − I: small, so that the initial loss is
LOOKS = 20
PRECISION = 1e-6  # of a gap

MINUS_ONE: Range = (-1.1, -0.9)
FLAT: Range = (-0.1, 0.1)
NO_FALL: Range = (-0.1, None)
FALLS: Range = (None, -0.5)

# [SAP22], and for the last two starts what is seen before training. The gap of the alternating
# start grows to its limit while it trains: at N = 8 … 512 with a slope of +0.14,
# outside the range, and of +0.04 from N = 64 on (benchmarks/results/linear.json).
THEORY: dict[str, Theory] = {
    "smooth": whole_range(gap=MINUS_ONE, difference=MINUS_ONE),
    "independent": whole_range(gap=FALLS, difference=NO_FALL),
    "alternating": whole_range(gap=FLAT, difference=NO_FALL),
}


@dataclass(frozen=True, kw_only=True)
class LinearStudy(rates.DepthStudy):
    """Holds what `study_linear` finds of its starts, smooth, independent and alternating."""


def experiment(
    depths: Sequence[int], seeds: Sequence[int], learning_rate: float, steps: int
) -> Study[Watched, LinearStudy]:
    """Returns the study of linear networks of every depth from three starts, in float64."""
    depths, seeds, steps = rates.checked_flow(depths, seeds, learning_rate, steps)
    # Controls, states, gradient and what becomes of the controls.
    numbers = 4 * len(THEORY) * len(seeds) * WIDTH**2
    harness.check_fits(depths[-1], numbers, modules=False)
    return rates.depth_study(
        theory=lambda _, start: THEORY[start],
        name="linear",
        record=LinearStudy,
        axes={"depths": depths, "starts": tuple(THEORY), "seeds": seeds},
        # All starts and seeds at once: the matrices are small, and the time is in the calls.
        together=("starts", "seeds"),
        settings={"width": WIDTH, "learning_rate": learning_rate, "steps": steps}
        | {"looked_at": looked_at(steps, LOOKS)},
        measure=lambda points, _, tell: _watched(points, tell, learning_rate, steps),
    )


def drawn(seed: int) -> tuple[Tensor, Tensor, Tensor, torch.Generator]:
    """Draws A and C of the smooth start and B; returns the generator for what else is drawn."""
    generator = torch.Generator().manual_seed(seed)
    scale = SPREAD / math.sqrt(WIDTH)
    a, c, b = scale * normal(generator, 3, WIDTH, WIDTH)
    return a, c, torch.eye(WIDTH, dtype=torch.float64) + b, generator


def first_controls(start: str, horizon: int, seed: int) -> Float[Tensor, "N d d"]:
    """θ_0 … θ_{N−1} before training.

    smooth: A + C cos(π n/N), half an oscillation, the same curve for every N. independent: each
    number drawn alone. Both with standard deviations of SPREAD/√d. alternating: (−1)ⁿ √N I.
    """
    a, c, _, generator = drawn(seed)
    n = torch.arange(horizon, dtype=torch.float64)[:, None, None]
    if start == "smooth":
        return a + c * torch.cos(math.pi * n / horizon)
    if start == "independent":
        return SPREAD / math.sqrt(WIDTH) * normal(generator, horizon, WIDTH, WIDTH)
    return (-1.0) ** n * math.sqrt(horizon) * torch.eye(WIDTH, dtype=torch.float64)


def states(controls: Float[Tensor, "... N d d"]) -> Float[Tensor, "... N+1 d d"]:
    """x_0 = I, x_1, …, x_N = Π of networks side by side."""
    horizon = controls.shape[-3]
    x = torch.eye(controls.shape[-1], dtype=controls.dtype).expand_as(controls[..., 0, :, :])
    found = [x]
    for theta in controls.unbind(dim=-3):
        x = x + theta @ x / horizon
        found.append(x)
    return torch.stack(found, dim=-3)


def scaled_gradient(
    controls: Float[Tensor, "... N d d"], x: Float[Tensor, "... N+1 d d"], target: Tensor
) -> Float[Tensor, "... N d d"]:
    """N ∂L/∂θ_n = p_{n+1} x_nᵀ of L = ½‖x_N − B‖², from the states."""
    horizon = controls.shape[-3]
    p = x[..., -1, :, :] - target
    costates = [p]
    for theta in reversed(controls.unbind(dim=-3)[1:]):
        p = p + theta.mT @ p / horizon
        costates.append(p)
    return torch.stack(costates[::-1], dim=-3) @ x[..., :-1, :, :].mT


def linear_gap(
    controls: Float[Tensor, "... N d d"], x: Float[Tensor, "... N+1 d d"]
) -> Float[Tensor, "..."]:
    """Largest ‖x_n − x(s_n)‖ over n and the columns of I, for θ(s) linear between the controls.

    On the last interval θ(s) = θ_{N−1}. Since ẋ = θ(s) x is linear, x(s_{n+1}) = P_n x(s_n) with
    a propagator P_n that does not depend on x: those of all intervals, networks and seeds are one
    call of the solver, by a Runge–Kutta method of fourth order, to a millionth (`converged`).
    `deeplimit.ode.discretization_gap` solves N intervals one after the other, which takes seconds.
    """

    def gap(steps: int) -> Tensor:
        y = x[..., 0, :, :]
        largest = torch.zeros(controls.shape[:-3], dtype=controls.dtype)
        for n, propagator in enumerate(_propagators(controls, steps).unbind(dim=-3), start=1):
            y = propagator @ y
            columns = torch.linalg.vector_norm(x[..., n, :, :] - y, dim=-2)
            largest = torch.maximum(largest, columns.amax(dim=-1))
        return largest

    return rates.converged(gap, PRECISION)


def _propagators(controls: Float[Tensor, "... N d d"], steps: int) -> Float[Tensor, "... N d d"]:
    """P_n of every interval, with that many steps of the solver."""
    horizon = controls.shape[-3]
    after = torch.cat([controls[..., 1:, :, :], controls[..., -1:, :, :]], dim=-3)

    def velocity(s: Tensor, p: Tensor) -> Tensor:
        return torch.lerp(controls, after, s) @ p / horizon

    unit = torch.eye(controls.shape[-1], dtype=controls.dtype).expand_as(controls).contiguous()
    times = torch.linspace(0, 1, steps + 1, dtype=controls.dtype)
    found: Tensor = need("torchdiffeq", "ode").odeint(velocity, unit, times, method="rk4")
    return found[-1]


def largest_difference(controls: Float[Tensor, "... N d d"]) -> Float[Tensor, "..."]:
    """Computes max_n ‖θ_{n+1} − θ_n‖."""
    return torch.amax(torch.linalg.matrix_norm(controls.diff(dim=-3)), dim=-1)


def _watched(points: Sequence[Point], tell: Tell, eta: float, steps: int) -> list[Watched]:
    """Trains all networks (N, start, seed) of one depth."""
    horizon = points[0][0]
    controls = torch.stack([first_controls(start, horizon, seed) for _, start, seed in points])
    targets = torch.stack([drawn(seed)[2] for _, _, seed in points])
    seen, looks = [], looked_at(steps, LOOKS)
    for step in range(steps + 1):
        x = states(controls)
        if step in looks:
            tell(f"N = {horizon}", step / steps)
            loss = (x[:, -1] - targets).square().sum(dim=(-2, -1)) / 2
            figures = loss, linear_gap(controls, x), largest_difference(controls)
            seen.append(torch.stack(figures))
        if step < steps:
            controls = controls - eta * scaled_gradient(controls, x, targets)
    every = torch.stack(seen, dim=-1).movedim(0, 1)  # [networks, 3, looks]
    return [
        Watched(*map(tuple, one)).checked(f"{start} start, N = {horizon}")
        for one, (_, start, _) in zip(every.tolist(), points, strict=True)
    ]
