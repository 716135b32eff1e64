"""The distance of a network from its Neural ODE, and bounds on it ([SAP22], arXiv 2205.14612)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from deeplimit._anatomy import Anatomy, Stack, anatomy
from deeplimit._anatomy.chain import Euler
from deeplimit._anatomy.evaluation import Inputs
from deeplimit.errors import InputError, RunError
from deeplimit.ode.field import (
    Derivatives,
    Interpolation,
    VectorField,
    longest_stage,
    record,
    stages,
)
from deeplimit.ode.solvers import ADVICE, solve_by_layer
from deeplimit.records import Record
from deeplimit.tables import number, table

TOLERANCE, FINEST = 1e-3, 1e-10  # of dopri5's steps: where N of them start, where it gives up
FINER = 1e-2  # times it is dopri8's
SHARE = 0.01  # of the gap, below which the solver's error must be
ROUNDING = 1e-12  # of the largest state: no solver gets below it in float64
SEGMENT = (0.0, 0.5, 1.0)
# Gauss-Lobatto on [0, 1]: both ends and two points between; exact up to degree 5.
FRACTIONS = (0.0, (1 - 5**-0.5) / 2, (1 + 5**-0.5) / 2, 1.0)
WEIGHTS = (1 / 12, 5 / 12, 5 / 12, 1 / 12)


@dataclass(frozen=True, kw_only=True)
class DiscretizationGap(Record):
    """A stage x_{n+1} = x_n + h φ(x_n, θ_n) beside ẋ(s) = φ(x(s), θ(s)), x(0) = x_0, s_n = n h.

    Attributes:
        stage: the number of the stage in the model.
        horizon: N, its number of layers.
        step: h; 1 for models that have none.
        scheme: "euler" or "heun".
        interpolation: how θ(s) runs from θ_n to θ_{n+1}: "linear" or "constant".
        samples: number of samples.
        gap: max ‖x_n − x(s_n)‖ over the samples, n = 0 … N; Euclidean norm of the whole state.
        mean_gap: its mean over the samples.
        state_norm: mean ‖x(s_n)‖.
        bound: h (e^{L s_n} − 1)/(2L) · sup ‖x″‖, n = 0 … N, with L and sup the largest of
            `lipschitz` and `acceleration`. None for Heun or when not asked for, like all below.
            Infinite where it leaves float64.
        integral_bound: B_0 = 0, B_{n+1} = (1 + hL_n) B_n + ∫ (s_{n+1} − s) ‖x″(s)‖ ds over layer
            n's interval, for each sample with its own ‖x″‖ and L_n; the largest.
        lipschitz: the largest ‖∂_xφ(·, θ_n)‖ over the samples and points of the segment from x_n to
            x(s_n), n < N.
        lipschitz_residual: the largest ‖JᵀJv − σ²v‖/σ² of the singular vectors found.
        segment_points: how many points of a segment.
        acceleration: the largest ‖x″‖ = ‖∂_sφ + ∂_xφ·φ‖ over the samples and four points of each
            interval, its ends included, n < N; ∂_sφ at an end is the one inside.
        solver: what solved the Neural ODE.
        solver_error: max ‖difference‖ of two solutions, an estimate of the error of the worse one;
            the better one is used.
    """

    stage: int
    horizon: int
    step: float
    scheme: str
    interpolation: str
    samples: int
    gap: tuple[float, ...]
    mean_gap: tuple[float, ...]
    state_norm: tuple[float, ...]
    bound: tuple[float, ...] | None = None
    integral_bound: tuple[float, ...] | None = None
    lipschitz: tuple[float, ...] | None = None
    lipschitz_residual: float | None = None
    segment_points: int = len(SEGMENT)
    acceleration: tuple[float, ...] | None = None
    solver: str
    solver_error: float

    @property
    def summary(self) -> str:
        """The gap and the bounds at the last layer, and what they are of, in a line."""
        bounds = zip(("bound", "integral form"), (self.bound, self.integral_bound), strict=True)
        figures = [f"gap {max(self.gap):.3g} of states of {max(self.state_norm):.3g}"]
        figures += [f"{name} {values[-1]:.3g}" for name, values in bounds if values]
        return (
            f"stage {self.stage}, {self.horizon} layers, h = {self.step:.3g}, {self.scheme}, "
            f"{self.interpolation} controls: {', '.join(figures)} (solved to "
            f"{self.solver_error:.1g})"
        )

    def __str__(self) -> str:
        """The summary, and a row for each state; of many states some."""
        names = ("gap", "mean_gap", "state_norm", "bound", "integral_bound")
        columns = {name: getattr(self, name) for name in names if getattr(self, name)}
        each = enumerate(zip(*columns.values(), strict=True))
        rows = [(str(n), *(number(v, 3) for v in values)) for n, values in each]
        return f"{self.summary}\n{table(('state', *columns), rows)}"


@torch.no_grad()
def discretization_gap(
    model: nn.Module | Anatomy,
    x: Inputs,
    *,
    interpolation: Interpolation = "linear",
    stage: int | None = None,
    bound: bool = True,
    seed: int = 0,
    tell: Callable[[str], None] = lambda _: None,
) -> DiscretizationGap:
    """Measures how far a stage's states are from the Neural ODE through its controls, and bounds.

    θ(s) is piecewise linear through θ_n at s_n = n h, constant on Euler's last interval, which has
    one node only; or piecewise constant, θ_n on [s_n, s_{n+1}). A batch norm's running statistics
    are interpolated with the parameters. A foreign block that returns x + F(x) has φ = F, h = 1.

    For controls smooth in depth and h = T/N the gap is O(1/N) for Euler, as are its bounds, and
    O(1/N²) for Heun. `bound` is formula (3) of [SAP22], a sum of the local errors
    ∫ (s_{n+1} − s) x″(s) ds, each carried on by factors 1 + hL_n ≤ e^{hL}. `integral_bound` is that
    sum before ‖x″‖ and L_n are replaced by their largest values: at most `bound`, and attained by
    φ = λx, λ > 0, for every N.

        >>> found = discretization_gap(chain, x)
        >>> 0 < max(found.gap) <= found.integral_bound[-1] <= found.bound[-1]
        True

    Source: [SAP22] arXiv 2205.14612; `integral_bound` and the solver's control are ours.

    L and the suprema are the largest values at finitely many points (`segment_points`, four of each
    interval): what is called a bound is one as far as these are representative, and no proof.
    Everything runs in float64 and evaluation mode on a copy of the model. The Neural ODE is solved
    with adaptive steps that start anew at each node, twice: by dopri5, and by dopri8 at a hundredth
    of its tolerance, until the two differ by less than 1 % of the largest gap, or by rounding.

    Args:
        model: a chain, one of our classifiers, or any model that `anatomy` reads; its anatomy.
        x: a batch of its inputs; for a chain initial states.
        interpolation: "linear" or "constant".
        stage: which stage; the longest if None.
        bound: whether to compute the bounds too (Euler).
        seed: of the vectors that the search for ‖∂_xφ‖ starts from.
        tell: is told what is computed next; a large model takes minutes.

    Raises:
        InputError: no stage of two alike layers, or not this one; blocks that differ in more than
            their parameters; training mode where it makes a difference; the model does not run on
            x; states that are not finite; an unknown interpolation; a bound of blocks for which
            torch has no forward-mode derivative.
        RunError: the solver does not get to the end, or not to the accuracy.
    """
    if interpolation not in get_args(Interpolation):
        expected = ", ".join(get_args(Interpolation))
        raise InputError(f"the interpolation is {interpolation!r}; expected one of {expected}")
    read = anatomy(model)
    with sdpa_kernel(SDPBackend.MATH):  # the others have no forward-mode derivative
        field, states = record(read, x, _chosen(read, stage), linear=interpolation == "linear")
        own = field.stage

        def say(message: str) -> None:
            tell(f"stage {own.index}, {message}")

        nodes, path, error, solver = _solve(field, states, say)
        gaps = _norms(states - nodes)
        bounds: dict[str, Any] = {}
        if bound and isinstance(own.scheme, Euler):
            try:
                bounds = _bounds(field, states, nodes, path, seed, say)
            except NotImplementedError as missing:
                reason = str(missing).partition("\n")[0]
                raise InputError(
                    f"no bound for blocks of class {type(own.blocks[0]).__name__}: {reason} Give "
                    "bound=False for the gap alone"
                ) from missing
    return DiscretizationGap(
        stage=own.index,
        horizon=own.horizon,
        step=own.step,
        scheme=type(own.scheme).__name__.lower(),
        interpolation=interpolation,
        samples=states.shape[1],
        gap=_numbers(gaps.amax(1)),
        mean_gap=_numbers(gaps.mean(1)),
        state_norm=_numbers(_norms(nodes).mean(1)),
        solver=solver,
        solver_error=error,
        **bounds,
    )


def _chosen(read: Anatomy, index: int | None) -> Stack:
    if index is None:
        return longest_stage(read)
    every = {stage.index: stage for stage in stages(read)}
    if index not in every:
        raise InputError(
            f"stage {index!r} given; the stages of {type(read.model).__name__} with two alike "
            f"layers or more are {', '.join(map(str, every))}"
        )
    return every[index]


def _solve(
    field: VectorField, states: Tensor, tell: Callable[[str], None]
) -> tuple[Tensor, Tensor, float, str]:
    """x(s_n) [N + 1, samples, …]; x(s_n + c h) for c in FRACTIONS; the error; what solved it."""
    x = states[0]
    run = partial(solve_by_layer, field, x, scale=float(states.square().mean().sqrt()) or 1.0)
    tolerance = TOLERANCE / field.horizon
    while True:
        tell(f"the Neural ODE through {field.horizon} layers at tolerance {tolerance:.0e}")
        path = run(fractions=FRACTIONS, solver="dopri5", tolerance=tolerance)
        fine = run(solver="dopri8", tolerance=FINER * tolerance)
        nodes = torch.cat([x[None], fine[:, -1]])
        error = float(_norms(path[:, -1] - nodes[1:]).max())
        gap = float(_norms(states - nodes).max())
        allowed = max(SHARE * gap, ROUNDING * float(_norms(nodes).max()))
        if error <= allowed:
            solver = f"dopri8 at {FINER * tolerance:.0e}, checked by dopri5 at {tolerance:.0e}"
            return nodes, path, error, solver
        if tolerance <= FINEST:
            raise RunError(
                f"dopri5 and dopri8 differ by {error:.1e} at tolerance {tolerance:.0e}, with a gap "
                f"of {gap:.1e}; {ADVICE}"
            )
        # The error goes with the tolerance; where that is not so yet, no more than a thousandth.
        tolerance = max(FINEST, tolerance * min(max(allowed / (3 * error), 1e-3), 0.1))


def _bounds(
    field: VectorField,
    states: Tensor,
    nodes: Tensor,
    path: Tensor,
    seed: int,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """The figures of a `DiscretizationGap` that are None where no bounds are asked for."""
    h, horizon = field.step, field.horizon
    tell("the bounds: second derivatives of the states")
    derivatives = Derivatives(field, states[0])
    places = [(n, c) for n in range(horizon) for c in FRACTIONS]
    bend = derivatives.accelerations(places, path.flatten(0, 1)).view(horizon, len(FRACTIONS), -1)
    segments = torch.stack([torch.lerp(states, nodes, c)[:-1] for c in SEGMENT], 1)
    places = [(n, 0.0) for n in range(horizon) for _ in SEGMENT]

    def told(done: int) -> None:
        tell(f"the bounds: Lipschitz constants, layer {done // len(SEGMENT) + 1} of {horizon}")

    norms, residuals = derivatives.jacobian_norms(places, segments.flatten(0, 1), seed, told)
    norms = norms.view(horizon, len(SEGMENT), -1)
    lipschitz, worst = float(norms.max()), float(bend.max())
    weights, left = bend.new_tensor(WEIGHTS), 1 - bend.new_tensor(FRACTIONS)
    local = h**2 * torch.einsum("c,ncb->nb", weights * left, bend)
    total = [torch.zeros_like(local[0])]
    for rate, error in zip(norms.amax(1), local, strict=True):
        total.append((1 + h * rate) * total[-1] + error)
    times = h * torch.arange(horizon + 1, dtype=bend.dtype)
    growth = (lipschitz * times).expm1() / lipschitz if lipschitz else times
    return {
        "bound": _numbers(h / 2 * growth * worst),
        "integral_bound": _numbers(torch.stack(total).amax(1)),
        "lipschitz": _numbers(norms.amax((1, 2))),
        "lipschitz_residual": float(residuals.max()),
        "acceleration": _numbers(bend.amax((1, 2))),
    }


def _norms(states: Tensor) -> Tensor:
    """‖x‖ of each sample's whole state: [n, samples, …] → [n, samples]."""
    norms: Tensor = torch.linalg.vector_norm(states.flatten(2), dim=2)
    return norms


def _numbers(values: Tensor) -> tuple[float, ...]:
    return tuple(values.tolist())
