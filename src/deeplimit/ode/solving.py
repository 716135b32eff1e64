"""The Neural ODE of a stage, ẋ(s) = φ(x(s), θ(s)), solved from node to node."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchdiffeq import odeint

from deeplimit.errors import RunError
from deeplimit.ode.interpolation import VectorField

MAX_STEPS = 1000  # within one interval; an ODE that needs more has no business being one
ADVICE = (
    "the Neural ODE of these layers is stiff, leaves every bound or is computed in less than "
    "float64: take a smaller step h (more layers), smaller weights, or another stage"
)


def solve(
    field: VectorField,
    x: Tensor,
    horizon: int,
    step: float,
    *,
    fractions: Sequence[float] = (0.0, 1.0),
    method: str,
    tolerance: float,
    scale: float,
) -> Tensor:
    """x(s_n + c h) for n < horizon and c in `fractions`: [horizon, len(fractions), *x.shape].

    The solver starts anew at every node, where θ has a kink or a jump, and sees one interval only,
    so that θ at its ends is the limit from inside. (One call with the nodes as `jump_t` would do
    the same, but torchdiffeq 0.2.5 loses all further nodes once a step that nothing cut short ends
    on one exactly: on a uniform grid that happens, since an accepted step is never made smaller.)

    What is solved for is x(s) − x(s_n): its rounding errors are small beside those of x. The error
    of a step, relative to the components of x(s_n) and `scale`, is held below `tolerance` in the
    root mean square of each sample.

    Args:
        field: φ and θ.
        x: x(0), [samples, …].
        horizon: the number of intervals.
        step: h.
        fractions: from 0 to 1, where in each interval the solution is wanted.
        method: an adaptive method of torchdiffeq.
        tolerance: of a step's error.
        scale: the size of a component of a state.

    Raises:
        RunError: the solver does not get to the end.
    """
    within = torch.tensor(fractions, dtype=x.dtype, device=x.device)
    options = {"first_step": 1.0, "step_t": within[-1:], "max_num_steps": MAX_STEPS, "norm": _norm}
    found = []
    for n in range(horizon):

        def velocity(t: Tensor, z: Tensor, n: int = n, x: Tensor = x) -> Tensor:
            return field(field.controls.at(n, float(t)), x + z) * step

        try:
            moved = odeint(
                velocity,
                torch.zeros_like(x),
                within,
                rtol=0.0,
                atol=tolerance * (scale + x.abs()),
                method=method,
                options=options,
            )
        except AssertionError as error:
            where = f"between layers {n} and {n + 1} at tolerance {tolerance:.0e}"
            raise stopped(method, where, error) from error
        found.append(x + moved)
        x = x + moved[-1]
    return torch.stack(found)


def stopped(method: str, where: str, error: object) -> RunError:
    """What an assertion of torchdiffeq means: a step of 0, NaN, or too many steps."""
    reason = str(error).partition(":")[0].partition(" (")[0]
    return RunError(f"{method} stopped {where} ({reason}); {ADVICE}")


def _norm(error: Tensor) -> Tensor:
    """The worst sample's root mean square."""
    return error.flatten(1).square().mean(1).sqrt().amax()
