"""Small networks of particles for the studies of gradient flows: drawn, trained, written down."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deeplimit.errors import InputError, RunError
from deeplimit.meanfield import LayerwiseMeasure, particle_flow
from deeplimit.network import ResidualChain, TwoLayerResidual
from deeplimit.studies.harness import check_positive

ACTIVATION = "tanh"


def generator_of(*seeds: int) -> torch.Generator:
    """Makes one for these seeds together."""
    mixed = 0
    for seed in seeds:
        mixed = (mixed * 1_000_003 + seed + 1) % (2**62)
    return torch.Generator().manual_seed(mixed)


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    """Draws standard normal numbers in float64."""
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def network_of(particles: Float[Tensor, "N M p"]) -> nn.Module:
    """Makes N layers x + (1/N) (1/M) Σ_i u_i tanh(w_i·x + b_i) of these particles (u, w, b)."""
    state = (particles.shape[2] - 1) // 2
    template = ResidualChain([TwoLayerResidual(state, 1, ACTIVATION).double()], step=1.0)
    return LayerwiseMeasure(particles, frame=template).network()


def depths_of(horizon: int) -> Float[Tensor, "N 1 1"]:
    """Returns s_n = n/N."""
    return torch.arange(horizon, dtype=torch.float64)[:, None, None] / horizon


def risk_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Computes 1/(2D) Σ ‖z − y‖²."""
    found: Tensor = (model(x) - y).square().sum() / (2 * len(x))
    return found


def flow(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    learning_rate: float,
    steps: int,
    look: Callable[[int, Tensor], object] = lambda *_: None,
) -> float:
    """Takes explicit Euler steps of the gradient flow; returns the risk after the last one.

    Args:
        model: trained in place.
        x: all inputs.
        y: what their outputs shall be.
        learning_rate: the step of the flow's time.
        steps: how many.
        look: is told the step and the risk, with the gradients there, before each step and at the
            end.

    Raises:
        RunError: a risk that is not finite.
    """
    optimizer = particle_flow(model, learning_rate)
    risk = torch.tensor(math.nan)
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
    return float(risk.detach())


def check_time(learning_rate: float, time: float) -> int:
    """Counts the steps that the time takes.

    Raises:
        InputError: a learning rate or a time that is not above 0, or less than one step.
    """
    check_positive(learning_rate=learning_rate, time=time)
    steps = round(time / learning_rate)
    if steps < 1:
        raise InputError(f"the time is {time}, less than one step of {learning_rate}")
    return steps
