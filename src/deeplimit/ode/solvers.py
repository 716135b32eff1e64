"""The Neural ODE ẋ(s) = φ(x(s), θ(s)) of a stage, solved by torchdiffeq; accuracy against cost."""

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from deeplimit._anatomy import Anatomy, anatomy, model_of
from deeplimit._anatomy.chain import ResidualChain, chains_in
from deeplimit._anatomy.checks import check_number, fitted
from deeplimit._anatomy.evaluation import Inputs, device_of, evaluating, pairs
from deeplimit.errors import InputError, RunError, several
from deeplimit.extras import need
from deeplimit.ode.field import VectorField
from deeplimit.records import Record

# Not torchdiffeq 0.2.5's explicit_adams: on ẋ = −x its error grows with the number of steps.
Fixed = Literal["euler", "midpoint", "heun2", "heun3", "rk4", "implicit_adams"]
Adaptive = Literal["bosh3", "fehlberg2", "adaptive_heun", "dopri5", "dopri8"]
Solver = Fixed | Adaptive
FIXED: tuple[str, ...] = get_args(Fixed)
ADAPTIVE: tuple[str, ...] = get_args(Adaptive)
MAX_STEPS = 10_000
MAX_STEPS_OF_LAYER = 1000  # an ODE that needs more has no business being one
TOLERANCE = 1e-3
NEED = "an accuracy needs at least one sample"
ROUNDING = 1e-9  # of an interval: a time so near to a node is the node
ADVICE = (
    "the Neural ODE of these layers is stiff, leaves every bound or is computed in less than "
    "float64: take a smaller step h (more layers), smaller weights, or another stage"
)


def solve(
    field: VectorField,
    x: Tensor,
    *,
    solver: str = "dopri5",
    steps: int | None = None,
    tolerance: float = TOLERANCE,
) -> Tensor:
    """Solves ẋ(s) = φ(x(s), θ(s)) from x(0): x(T k/steps), k = 0 … steps, T = N h.

    An adaptive method gives x(0) and x(T). It does not start anew where θ(s) has a kink, so that
    the error at the end may be hundreds of times the tolerance; `solve_by_layer` does. The states
    of a chain's Neural ODE at its nodes, by four steps of a fixed-step method in each interval:

        field = VectorField(anatomy(chain).stacks[0])
        nodes = solve(field, x, solver="rk4", steps=4 * field.horizon)[::4]
    """

    def velocity(time: Tensor, x: Tensor) -> Tensor:
        if not math.isfinite(time):  # what becomes of a step's size where the state is NaN
            raise AssertionError("the step is not a number")  # as torchdiffeq says such things
        n = min(int(float(time) + ROUNDING), field.horizon - 1)
        fraction = min(max(float(time) - n, 0.0), 1.0)
        return field.step * field(field.control(n, 0.0 if fraction < ROUNDING else fraction), x)

    times = torch.linspace(0, field.horizon, (steps or 1) + 1, dtype=torch.float64).to(x.device)
    options = {} if steps else {"max_num_steps": MAX_STEPS}
    how = {"rtol": tolerance, "atol": tolerance, "method": solver, "options": options}
    return _integrated(velocity, x, times, f"at tolerance {tolerance:.0e}", **how)


def solve_by_layer(
    field: VectorField,
    x: Tensor,
    *,
    solver: Adaptive,
    tolerance: float,
    fractions: Sequence[float] = (0.0, 1.0),
    scale: float = 1.0,
) -> Tensor:
    """Solves ẋ(s) = φ(x(s), θ(s)) from node to node: x(s_n + c h) [N, fractions, *x.shape].

    The solver starts anew at every node, where θ has a kink or a jump, and sees one interval only,
    so that θ at its ends is the limit from inside. (Of nodes as `jump_t` torchdiffeq 0.2.5 loses
    those that follow once a step ends on one exactly, as on a uniform grid.) What is solved for is
    x(s) − x(s_n), whose rounding errors are small beside those of x. The error of a step, relative
    to the components of x(s_n) [samples, …] and `scale`, their size, is held below `tolerance` in
    the root mean square of each sample.
    """
    within = torch.tensor(fractions, dtype=x.dtype, device=x.device)
    options = {"first_step": 1.0, "step_t": within[-1:], "norm": _norm}
    options |= {"max_num_steps": MAX_STEPS_OF_LAYER}
    found = []
    for n in range(field.horizon):

        def velocity(t: Tensor, z: Tensor, n: int = n, x: Tensor = x) -> Tensor:
            return field(field.control(n, float(t)), x + z) * field.step

        where = f"between layers {n} and {n + 1} at tolerance {tolerance:.0e}"
        how = {"atol": tolerance * (scale + x.abs()), "method": solver, "options": options}
        moved = _integrated(velocity, torch.zeros_like(x), within, where, rtol=0.0, **how)
        found.append(x + moved)
        x = x + moved[-1]
    return torch.stack(found)


def _integrated(
    velocity: Callable[[Tensor, Tensor], Tensor], x: Tensor, times: Tensor, where: str, **how: Any
) -> Tensor:
    """Torchdiffeq's answer; an assertion of it means a step of 0, NaN, or too many steps."""
    odeint = need("torchdiffeq", "ode").odeint
    try:
        path: Tensor = odeint(velocity, x, times, **how)
    except AssertionError as error:
        reason = str(error).partition(":")[0].partition(" (")[0]
        raise RunError(f"{how['method']} stopped {where} ({reason}); {ADVICE}") from error
    return path


def _norm(error: Tensor) -> Tensor:
    """The worst sample's root mean square."""
    return error.flatten(1).square().mean(1).sqrt().amax()


class _SolvedChain(nn.Module):
    """ẋ(s) = φ(x(s), θ(s)) in place of a chain's N steps, and how often φ was evaluated so far."""

    def __init__(self, chain: ResidualChain, solver: str, steps: int | None, tolerance: float):
        super().__init__()
        check_solver(solver, steps, tolerance)
        self.chain, self.evaluations = chain, 0
        self.how: dict[str, Any] = {"solver": solver, "steps": steps, "tolerance": tolerance}

    def forward(self, x: Tensor) -> Tensor:
        if self.chain.horizon == 0:
            return x
        field = VectorField(anatomy(self.chain).stacks[0])
        end = solve(field, x, **self.how)[-1]
        self.evaluations += field.evaluations
        return end


def check_solver(solver: str, steps: int | None, tolerance: float = TOLERANCE) -> None:
    """Looks whether a solver is one, goes with a number of steps, and can hold a tolerance."""
    if solver not in FIXED + ADAPTIVE:
        raise InputError(
            f"the solver is {solver!r}; expected one of {', '.join(FIXED)} (with a number of "
            f"steps), {', '.join(ADAPTIVE)}"
        )
    if solver in ADAPTIVE and steps is not None:
        raise InputError(f"{steps} steps given, but {solver} chooses its own; leave them out")
    if solver in FIXED and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 1):
        given = "no" if steps is None else repr(steps)
        raise InputError(f"{given} steps given; {solver} needs at least 1, a whole number")
    expected = f"a number above 0, such as {TOLERANCE:g}"
    check_number("tolerance", tolerance, expected, lambda v: 0 < v < math.inf)


def with_solver(
    model: nn.Module | Anatomy,
    solver: Solver,
    steps: int | None = None,
    *,
    tolerance: float = TOLERANCE,
) -> nn.Module:
    """Copies a chain, or a network that holds some, with a solver in place of the chains' steps.

    ẋ(s) = φ(x(s), θ(s)) from x(0) to x(T), T = N h, with θ(s) piecewise linear through the chain's
    controls, and constant on the last interval of a chain of Euler's. So with "euler" and N steps
    an Euler chain is run as it is; methods of order p have it in T/steps where their steps meet the
    nodes. It is there to be evaluated: gradients reach its input, but none of its parameters, which
    are copies, asks for one.

        >>> fewer, exact = with_solver(chain, "rk4", 2), with_solver(chain, "dopri5")
        >>> bool((fewer(x) - exact(x)).norm() < (chain(x) - exact(x)).norm())
        True

    Source: [SAP22] arXiv 2205.14612 for the Neural ODE; torchdiffeq for the methods.

    Args:
        model: the network, or its anatomy.
        solver: a method of torchdiffeq, fixed-step (with `steps`) or adaptive.
        steps: of each chain.
        tolerance: relative and absolute, of an adaptive solver's step.

    Raises:
        InputError: another kind of model, an unknown solver, or steps that do not go with it.
        RunError: an adaptive solver does not get to the end, when the copy runs.
    """
    _chains(model)
    new = copy.deepcopy(model_of(model)).requires_grad_(requires_grad=False)
    for name, chain in chains_in(new):
        own = _SolvedChain(chain, solver, steps, tolerance)
        if not name:
            return own
        new.set_submodule(name, own)
    return new


@dataclass(frozen=True)
class SolverAccuracy(Record):
    """A network's chains solved otherwise, on held-out data.

    Attributes:
        solver: a method of torchdiffeq, or "network" for the layers themselves.
        steps: steps in each chain; None for an adaptive solver.
        evaluations: of φ, in all chains together; of an adaptive solver the mean over batches.
        samples: how many.
        accuracy: the fraction that is right.
        agreement: the fraction for which the network itself says the same class.
    """

    solver: str
    steps: int | None
    evaluations: float
    samples: int
    accuracy: float
    agreement: float

    def __str__(self) -> str:
        """A line."""
        steps = "" if self.steps is None else f", {several(self.steps, 'step')}"
        return (
            f"{self.solver}{steps}: accuracy {self.accuracy:.2%} of "
            f"{several(self.samples, 'sample')}, {self.evaluations:.0f} evaluations"
        )


@torch.no_grad()
def solver_accuracies(
    model: nn.Module | Anatomy,
    loader: Iterable[tuple[Inputs, Tensor]],
    solvers: Sequence[tuple[Solver, int | None]],
    *,
    tolerance: float = TOLERANCE,
) -> tuple[SolverAccuracy, ...]:
    """Measures accuracy against cost: of the network itself, then with each of the solvers.

        >>> rows = solver_accuracies(chain, [(x, y)], [("rk4", 2), ("dopri5", None)])
        >>> [(row.solver, row.steps, row.evaluations) for row in rows][:2]
        [('network', 4, 4.0), ('rk4', 2, 8.0)]

    Source: [SAP22] arXiv 2205.14612 for the Neural ODE, which `with_solver` solves.

    Args:
        model: a trained `ResidualClassifier`, or a chain whose states are logits; its anatomy will
            do.
        loader: batches (x, y) of held-out data, the same in every pass; not a one-pass iterator.
        solvers: (solver, steps) each; steps None for an adaptive one.
        tolerance: of the adaptive solvers' steps.

    Raises:
        InputError: as `with_solver`, or a loader that gives no batch.
        RunError: an adaptive solver does not get to the end.
    """
    chains, module = _chains(model), model_of(model)
    for pair in solvers:
        check_solver(*pair, tolerance)
    if iter(loader) is loader:
        raise InputError(
            f"the loader, a {type(loader).__name__}, can be gone through only once, but every "
            "solver sees all batches; give a list of them, or a DataLoader"
        )
    with evaluating(module):
        own, targets, batches = _predictions(module, loader)

        def measured(solver: str, steps: int | None, cost: float, mine: Tensor) -> SolverAccuracy:
            right, same = ((mine == other).double().mean().item() for other in (targets, own))
            return SolverAccuracy(solver, steps, cost, len(targets), right, same)

        horizon = sum(chain.horizon for chain in chains)
        cost = float(sum(chain.scheme.nodes * chain.horizon for chain in chains))
        found = [measured("network", horizon, cost, own)]
        for solver, steps in solvers:
            other = with_solver(module, solver, steps, tolerance=tolerance)
            theirs, _, _ = _predictions(other, loader)
            spent = sum(m.evaluations for m in other.modules() if isinstance(m, _SolvedChain))
            found.append(measured(solver, steps, spent / batches, theirs))
    return tuple(found)


def _chains(model: nn.Module | Anatomy) -> list[ResidualChain]:
    module = model_of(model)
    chains = [chain for _, chain in chains_in(module)]
    if not chains:
        raise InputError(
            f"{type(module).__name__} has no chain of residual functions that a solver could run; "
            "expected a ResidualChain or one of deeplimit's classifiers"
        )
    return chains


def _predictions(
    model: nn.Module, loader: Iterable[tuple[Inputs, Tensor]]
) -> tuple[Tensor, Tensor, int]:
    """The classes said, the true ones, and the number of batches."""
    said, true = [], []
    for x, y in pairs(loader, device_of(model), NEED):
        z = model(x)
        said.append(z.argmax(-1).cpu())
        true.append(fitted(z, y).cpu())
    return torch.cat(said), torch.cat(true), len(said)
