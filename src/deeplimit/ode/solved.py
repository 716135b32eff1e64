"""A trained chain run by another solver, with more or fewer steps: accuracy against cost."""

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchdiffeq import odeint

from deeplimit._anatomy.chain import chains_in
from deeplimit._anatomy.checks import fitted
from deeplimit._anatomy.evaluation import Inputs, device_of, evaluating, pairs
from deeplimit.errors import InputError, RunError
from deeplimit.network import ResidualChain
from deeplimit.ode.interpolation import Controls, VectorField
from deeplimit.ode.recording import Call
from deeplimit.ode.solving import stopped

# Not torchdiffeq 0.2.5's explicit_adams: on ẋ = −x its error grows with the number of steps.
FIXED = ("euler", "midpoint", "heun2", "heun3", "rk4", "implicit_adams")
ADAPTIVE = ("bosh3", "fehlberg2", "adaptive_heun", "dopri5", "dopri8")
MAX_STEPS = 10_000
TOLERANCE = 1e-3
NEED = "an accuracy needs at least one sample"
ROUNDING = 1e-9  # of an interval: a time so near to a node is the node


@dataclass(frozen=True)
class SolverAccuracy:
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


class SolvedChain(nn.Module):
    """ẋ(s) = φ(x(s), θ(s)) from x(0) to x(T), T = N h, in place of a chain's N steps.

    θ(s) is piecewise linear through the chain's controls at s_n = n h, and constant on the last
    interval of a chain of Euler's, which has one node only. So with "euler" and N steps an Euler
    chain is run as it is.

    Args:
        chain: the chain; its blocks are shared.
        solver: a fixed-step method of torchdiffeq (`FIXED`) or an adaptive one (`ADAPTIVE`).
        steps: how many steps of T/steps; for fixed-step methods.
        tolerance: relative and absolute, of an adaptive method's step; it does not start anew where
            θ(s) has a kink, so that the error at the end may be hundreds of times as large.

    Attributes:
        evaluations: how often φ was evaluated so far.

    Raises:
        InputError: an unknown solver, steps that do not go with it, a tolerance not above 0.
    """

    def __init__(
        self,
        chain: ResidualChain,
        solver: str,
        steps: int | None = None,
        tolerance: float = TOLERANCE,
    ):
        super().__init__()
        check_solver(solver, steps, tolerance)
        self.chain, self.solver, self.steps, self.tolerance = chain, solver, steps, tolerance
        self.evaluations = 0

    def forward(self, x: Tensor) -> Tensor:
        """x(T) from x(0).

        Raises:
            RunError: an adaptive solver does not get to the end.
        """
        horizon = self.chain.horizon
        if horizon == 0:
            return x
        field = VectorField(
            self.chain[0], Controls(tuple(self.chain), linear=True), Call((), {}), adds=False
        )

        def velocity(time: Tensor, x: Tensor) -> Tensor:
            self.evaluations += 1
            if not math.isfinite(time):  # what becomes of a step's size where the state is NaN
                raise self._stopped("the step is not a number")
            n, fraction = _place(float(time), horizon)
            return self.chain.step * field(field.controls.at(n, fraction), x)

        times = torch.linspace(0, horizon, (self.steps or 1) + 1, dtype=torch.float64)
        options = {} if self.steps else {"max_num_steps": MAX_STEPS}
        try:
            path = odeint(
                velocity,
                x,
                times.to(x.device),
                rtol=self.tolerance,
                atol=self.tolerance,
                method=self.solver,
                options=options,
            )
        except AssertionError as error:
            raise self._stopped(error) from error
        return path[-1]

    def _stopped(self, reason: object) -> RunError:
        return stopped(self.solver, f"at tolerance {self.tolerance:.0e}", reason)


def check_solver(solver: str, steps: int | None, tolerance: float = TOLERANCE) -> None:
    """Whether a solver is one, goes with a number of steps, and can hold a tolerance.

    Raises:
        InputError: if not.
    """
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
    if not (isinstance(tolerance, int | float) and 0 < tolerance < math.inf):
        raise InputError(
            f"tolerance is {tolerance!r}; expected a number above 0, such as {TOLERANCE:g}"
        )


def solved(
    model: nn.Module, solver: str, steps: int | None = None, tolerance: float = TOLERANCE
) -> nn.Module:
    """A copy of a chain, or of a network that holds some, whose chains a solver runs.

    It is there to be evaluated: gradients reach its input, but none of its parameters, which are
    copies, asks for one.

    Args:
        model: the network.
        solver: a method of torchdiffeq: `FIXED` or `ADAPTIVE`.
        steps: of each chain.
        tolerance: of an adaptive solver's step.

    Raises:
        InputError: another kind of model, an unknown solver, or steps that do not go with it.
    """
    _chains(model)
    model = copy.deepcopy(model).requires_grad_(False)
    for name, chain in chains_in(model):
        own = SolvedChain(chain, solver, steps, tolerance)
        if not name:
            return own
        model.set_submodule(name, own)
    return model


@torch.no_grad()
def solver_accuracies(
    model: nn.Module,
    loader: Iterable[tuple[Inputs, Tensor]],
    solvers: Sequence[tuple[str, int | None]],
    tolerance: float = TOLERANCE,
) -> tuple[SolverAccuracy, ...]:
    """Accuracy against cost: the network itself, then with each of the solvers.

    Args:
        model: a trained `ResidualClassifier`, or a chain whose states are logits.
        loader: batches (x, y) of held-out data, the same in every pass; not a one-pass iterator.
        solvers: (solver, steps) each; steps None for an adaptive one.
        tolerance: of the adaptive solvers' steps.

    Raises:
        InputError: as `solved`, or a loader that gives no batch.
        RunError: an adaptive solver does not get to the end.
    """
    chains = _chains(model)
    for pair in solvers:
        if isinstance(pair, str):
            raise InputError(f"{pair!r} given among the solvers; expected (solver, steps) each")
        check_solver(*pair, tolerance)
    if iter(loader) is loader:
        raise InputError(
            f"the loader, a {type(loader).__name__}, can be gone through only once, but every "
            "solver sees all batches; give a list of them, or a DataLoader"
        )
    with evaluating(model):
        own, targets, batches = _predictions(model, loader)
        horizon = sum(chain.horizon for chain in chains)
        cost = float(sum(chain.scheme.nodes * chain.horizon for chain in chains))
        found = [_compared("network", horizon, cost, own, own, targets)]
        for solver, steps in solvers:
            other = solved(model, solver, steps, tolerance)
            theirs, _, _ = _predictions(other, loader)
            spent = sum(m.evaluations for m in other.modules() if isinstance(m, SolvedChain))
            found.append(_compared(solver, steps, spent / batches, theirs, own, targets))
    return tuple(found)


def _chains(model: nn.Module) -> list[ResidualChain]:
    chains = [chain for _, chain in chains_in(model)] if isinstance(model, nn.Module) else []
    if not chains:
        raise InputError(
            f"{type(model).__name__} has no chain of residual functions that a solver could run; "
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


def _compared(
    solver: str, steps: int | None, evaluations: float, mine: Tensor, own: Tensor, true: Tensor
) -> SolverAccuracy:
    return SolverAccuracy(
        solver,
        steps,
        evaluations,
        len(true),
        float((mine == true).double().mean()),
        float((mine == own).double().mean()),
    )


def _place(time: float, horizon: int) -> tuple[int, float]:
    """The interval and the place in it; a node begins its interval, the end is the last one's."""
    n = min(int(time + ROUNDING), horizon - 1)
    fraction = min(max(time - n, 0.0), 1.0)
    return n, 0.0 if fraction < ROUNDING else fraction
