"""Do two-layer residuals stay near a Neural ODE while they train? Measured against N.

The network x_{n+1} = x_n + h V_n σ(W_n x_n + b_n), h = 1/N, learns a regression by gradient descent
whose learning rate is η N for every layer's control: the gradients of h-scaled blocks are O(1/N),
so that the controls of networks of all depths move at one speed, and train for one time
T = η · steps. From a start that is smooth in depth the trained network stays O(1/N) from a Neural
ODE for every finite T, and so does ‖θ_{n+1} − θ_n‖, if σ is smooth (tanh, GELU); a ReLU's
derivative jumps, and neighbours whose units switch on different samples part. From independent
controls the layers learn each by itself, and what lies between two of them is no trained layer:
the gap hardly falls with N after training. Sources: [MWSB23] arXiv 2309.01213, [SAP22] arXiv
2205.14612.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deeplimit.errors import InputError
from deeplimit.network import ResidualChain, TwoLayerResidual, anatomy
from deeplimit.network.blocks import ACTIVATIONS, choose
from deeplimit.network.initialisation import check_kernel, smooth_start
from deeplimit.ode.field import VectorField, longest_stage
from deeplimit.ode.solvers import solve
from deeplimit.studies import harness, rates
from deeplimit.studies.harness import Point, Study, Tell
from deeplimit.studies.rates import ANY, Range, Theory, Watched, looked_at, normal, whole_range

WIDTH, HIDDEN, SAMPLES = 8, 16, 32
# Of V, small as the initial loss should be. With 1 a seed's curve after training is so bent that
# N = 16 is not yet near the limit: slopes of max ‖θ_{n+1} − θ_n‖ with GELU from −0.80 to −0.95.
SPREAD = 0.5
LOOKS = 4
PRECISION = 1e-3  # of a gap

Start = Literal["smooth", "independent"]
STARTS: tuple[Start, ...] = ("smooth", "independent")
MINUS_ONE: Range = (-1.15, -0.85)
HARDLY_FALLS: Range = (-0.3, None)
NO_FALL: Range = (-0.1, None)


def theory(activation: str, start: str) -> Theory:
    """Says what [MWSB23] does of smooth activations; of independent starts what was seen before."""
    if start == "smooth":
        limits = ANY if activation == "relu" else MINUS_ONE
        return whole_range(gap=limits, difference=limits)
    return {**whole_range(gap=ANY, difference=NO_FALL), ("gap", "final"): HARDLY_FALLS}


@dataclass(frozen=True, kw_only=True)
class SmoothStudy(rates.DepthStudy):
    """Holds what `study_smooth` finds.

    Attributes:
        hidden: units of each block.
        samples: of the regression.
        length_scale: ℓ.
    """

    hidden: int
    samples: int
    length_scale: float


def experiment(
    activations: Sequence[str],
    depths: Sequence[int],
    seeds: Sequence[int],
    length_scale: float,
    learning_rate: float,
    steps: int,
) -> Study[Watched, SmoothStudy]:
    """Returns the study of networks of every depth from a smooth and an independent start."""
    for name in activations:
        choose(ACTIVATIONS, name, "the activation")
    harness.check_once("activations", activations)
    depths, seeds, steps = rates.checked_flow(depths, seeds, learning_rate, steps)
    deepest = depths[-1]
    if any(deepest % depth for depth in depths):
        raise InputError(
            f"depths {' '.join(map(str, depths))} given; expected numbers that divide the largest, "
            "such as 16 32 64"
        )
    harness.check_fits(deepest, 2 * HIDDEN * (2 * WIDTH + 1))  # with their gradients
    check_kernel(deepest)
    first_chain(activations[0], "smooth", 1, 1, 0, length_scale)  # is ℓ a length?

    def measure(points: Sequence[Point], _: Path, tell: Tell) -> list[Watched]:
        ((activation, start, seed, depth),) = points
        name = f"{activation}, {start} start, seed {seed}, N = {depth}"
        tell(name)
        chain = first_chain(activation, start, depth, deepest, seed, length_scale)
        return [watch_training(chain, *regression(seed), learning_rate, steps).checked(name)]

    # All networks' controls are some of the deepest one's.
    drawn = {"deepest": deepest, "length_scale": length_scale}
    sizes = {"width": WIDTH, "hidden": HIDDEN, "samples": SAMPLES}
    trained = {"learning_rate": learning_rate, "steps": steps}
    return rates.depth_study(
        theory=theory,
        name="smooth",
        record=SmoothStudy,
        axes={"activations": activations, "starts": STARTS, "seeds": seeds, "depths": depths},
        settings=sizes | drawn | trained | {"looked_at": looked_at(steps, LOOKS)},
        measure=measure,
    )


def first_chain(
    activation: str, start: Start, horizon: int, deepest: int, seed: int, length_scale: float
) -> ResidualChain:
    """Makes the network before training, h = 1/N, in float64.

    Of the deepest network every deepest/N-th block: networks of all depths have their controls on
    one curve θ(s), s_n = n/N. The numbers of W, b and V are normal with mean 0 and standard
    deviations 1/√d, 1 and SPREAD/√hidden; drawn alone, or as one Gaussian process in depth by
    `smooth_start`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        blocks = [TwoLayerResidual(WIDTH, HIDDEN, activation).double() for _ in range(deepest)]
        for block in blocks:
            nn.init.normal_(block.inner.weight, std=WIDTH**-0.5)
            nn.init.normal_(block.inner.bias)
            nn.init.normal_(block.outer.weight, std=SPREAD * HIDDEN**-0.5)
    if start == "smooth":
        smooth_start(blocks, length_scale)
    return ResidualChain(blocks[:: deepest // horizon], step=1 / horizon)


def regression(seed: int) -> tuple[Float[Tensor, "samples d"], Float[Tensor, "samples d"]]:
    """Draws inputs x, normal, and y = x + tanh(A x) with A normal of variance 1/d."""
    generator = torch.Generator().manual_seed(seed)
    x, a = normal(generator, SAMPLES, WIDTH), normal(generator, WIDTH, WIDTH)
    return x, x + torch.tanh(x @ a.T / math.sqrt(WIDTH))


def watch_training(
    chain: ResidualChain, x: Tensor, y: Tensor, learning_rate: float, steps: int
) -> Watched:
    """Trains the chain, in place, by θ_n ← θ_n − η N ∂L/∂θ_n with L = ½ mean ‖x_N − y‖²."""
    optimizer = torch.optim.SGD(chain.parameters(), lr=learning_rate * chain.horizon)
    looks = looked_at(steps, LOOKS)
    losses, gaps, differences = [], [], []
    for step in range(steps + 1):
        loss = (chain(x) - y).square().sum(dim=1).mean() / 2
        if step in looks:
            losses.append(loss.item())
            gaps.append(neural_ode_gap(chain, x))
            differences.append(largest_difference(chain))
        if step < steps:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return Watched(tuple(losses), tuple(gaps), tuple(differences))


@torch.no_grad()
def neural_ode_gap(chain: ResidualChain, x: Float[Tensor, "samples d"]) -> float:
    """Computes the largest ‖x_n − x(s_n)‖ over n and the samples, θ(s) linear between the controls.

    On the last interval θ(s) = θ_{N−1}. By a Runge–Kutta method of fourth order, to a thousandth
    (`converged`); `deeplimit.ode.discretization_gap` controls its error within every interval,
    which takes seconds for 128 layers, with ReLU minutes.
    """
    states = torch.stack(chain.trajectory(x))
    field = VectorField(anatomy(chain).stacks[0])

    def gap(steps: int) -> Tensor:
        nodes = solve(field, x, solver="rk4", steps=chain.horizon * steps)[::steps]
        return torch.amax(torch.linalg.vector_norm(states - nodes, dim=-1), dim=(0, 1))

    return float(rates.converged(gap, PRECISION))


def largest_difference(chain: ResidualChain) -> float:
    """Computes max_n ‖θ_{n+1} − θ_n‖ over all numbers of a control together."""
    controls = longest_stage(chain).controls().values()
    squares = [theta.diff(dim=0).square().flatten(1).sum(dim=1) for theta in controls]
    return float(sum(squares[1:], squares[0]).max().sqrt())
