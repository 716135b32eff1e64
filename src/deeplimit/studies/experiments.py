"""The studies of networks made for them, as functions: what each measures is a file of its name.

Signature and docstring give the options of `deeplimit study`, too; torch comes when one is called.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typing_extensions import Doc

from deeplimit.terminal import ProgressCallback, silent

if TYPE_CHECKING:
    from deeplimit.studies.consistency import ConsistencyStudy
    from deeplimit.studies.convergence import ConvergenceStudy
    from deeplimit.studies.linear import LinearStudy
    from deeplimit.studies.smooth import SmoothStudy

Numbers = Sequence[int]
Runs = Annotated[Path, "DIR", Doc("Folder for the study's folder.")]
Depths = Annotated[Numbers, Doc("Numbers of layers N, from the smallest to the largest.")]
Seeds = Annotated[Numbers, Doc("One training of everything for each of these seeds.")]
Time = Annotated[float, Doc("How long the flow is.")]
Step = Annotated[float, Doc("Step of the flow's time.")]
LayerStep = Annotated[float, Doc("Step η of the gradient flow; a layer's own is η N.")]
Steps = Annotated[int, Doc("Steps of the gradient flow.")]

RUNS = Path("runs")


def study_consistency(
    *,
    depths: Depths = (8, 16, 32, 64),
    widths: Numbers = (64, 128, 256, 512),
    seeds: Seeds = (0, 1, 2),
    draws: int = 16,
    atoms: int = 16,
    learning_rate: Step = 0.1,
    time: Time = 2.0,
    runs: Runs = RUNS,
    tell: ProgressCallback = silent,
) -> "ConsistencyStudy":
    """Does training stop depending on width and depth as both grow?

    Trains networks of (N, M) layers and particles by gradient flow, steps scaled by N·M, for one
    time, and compares successive sizes: their distance from a start of few atoms, smooth in depth,
    and their outputs from independent samples; and how far training moves a network, with the
    scaling and without. Leaves study.json and study.html in DIR/consistency; takes minutes. For
    example:
      deeplimit study consistency
      deeplimit study consistency --depths 8 16 32 --widths 64 128 256 --seeds 0

    Args:
        widths: Numbers of particles M of each layer, one for each depth.
        draws: Independent samples of every size, over which outputs are compared.
        atoms: Atoms of the initial measure; every width is a multiple.

    Returns:
        What was found, in float64, as study.json holds it; the page is the command's. One that was
        interrupted goes on.

    >>> small = {"depths": (2, 3, 4), "widths": (4, 8, 12), "atoms": 4, "draws": 1, "time": 0.1}
    >>> study_consistency(**small, seeds=(0,), runs=runs).rate("distance", "atoms").slope < 0
    True

    Raises:
        InputError: sizes that do not rise or do not go together, no seed or one twice, settings not
            above 0.
        RunError: a risk that is not finite.
    """
    from deeplimit.studies import consistency, harness

    study = consistency.experiment(depths, widths, seeds, draws, atoms, learning_rate, time)
    return harness.run_study(study, runs, tell)


def study_convergence(
    *,
    widths: Numbers = (4, 8, 16, 32, 64, 128, 256),
    distances: Sequence[float] = (0.03, 0.1, 0.3, 1.0, 3.0),
    seeds: Seeds = (0, 1, 2),
    depth: int = 8,
    samples: int = 8,
    learning_rate: Step = 0.1,
    time: Time = 30.0,
    runs: Runs = RUNS,
    tell: ProgressCallback = silent,
) -> "ConvergenceStudy":
    """Where does training converge at a rate that is known before it starts?

    Trains networks by gradient flow on D samples, from widths below D, where the kernel of the
    features is singular, to far above, and from small initial risks to large ones, each with a
    certificate of convergence; fits the rate of the risk and draws where certificates hold. Leaves
    study.json and study.html in DIR/convergence; takes minutes. For example:
      deeplimit study convergence
      deeplimit study convergence --widths 4 128 --distances 0.1 10 --seeds 0

    Args:
        widths: Numbers of particles M, from the smallest to the largest.
        distances: How far the targets are from the first outputs, root mean square; the risk starts
            at half the square.
        depth: Number of layers N.
        samples: Number of samples D, 2 to 16.

    Returns:
        What was found, in float64, as study.json holds it; the page is the command's. One that was
        interrupted goes on.

    >>> found = study_convergence(widths=(64,), distances=(0.03,), depth=2, time=0.4, runs=runs)
    >>> found.held(64, 0.03, "slope")
    1.0

    Raises:
        InputError: widths or distances that do not rise, settings not above 0, fewer than two
            samples, no seed or one twice.
        RunError: a risk that is not finite.
    """
    from deeplimit.studies import convergence, harness

    flow = (learning_rate, time)
    study = convergence.experiment(widths, distances, seeds, depth, samples, *flow)
    return harness.run_study(study, runs, tell)


def study_linear(
    *,
    depths: Depths = (8, 16, 32, 64, 128, 256, 512),
    seeds: Seeds = (0, 1, 2),
    learning_rate: LayerStep = 0.05,
    steps: Steps = 400,
    runs: Runs = RUNS,
    tell: ProgressCallback = silent,
) -> "LinearStudy":
    """Do linear residual networks stay near a Neural ODE while they train?

    Trains x + θ_n x/N by gradient flow at every depth, from controls that are smooth in depth,
    drawn independently, and of alternating sign, and measures the gap to the Neural ODE through
    its controls and the largest ‖θ_{n+1} − θ_n‖, each against N. Both fall as 1/N from the smooth
    start only. Leaves study.json and study.html in DIR/linear; takes a minute. For example:
      deeplimit study linear
      deeplimit study linear --depths 8 16 32 64 --seeds 0

    Returns:
        What was found, in float64, as study.json holds it; the page is the command's. One that was
        interrupted goes on. Each seed draws its own controls and its own target.

    >>> found = study_linear(depths=(2, 4), seeds=(0,), steps=2, runs=runs)
    >>> [family.start for family in found.families]
    ['smooth', 'independent', 'alternating']

    Raises:
        InputError: depths that do not rise, no seed or one twice, η or steps not above 0.
        RunError: a loss that is not finite.
    """
    from deeplimit.studies import harness, linear

    study = linear.experiment(depths, seeds, learning_rate, steps)
    return harness.run_study(study, runs, tell)


def study_smooth(
    *,
    activations: Sequence[str] = ("tanh", "gelu", "relu"),
    depths: Depths = (16, 32, 64, 128),
    seeds: Seeds = (0, 1, 2),
    length_scale: float = 0.5,
    learning_rate: LayerStep = 0.1,
    steps: Steps = 200,
    runs: Runs = RUNS,
    tell: ProgressCallback = silent,
) -> "SmoothStudy":
    """Do trained two-layer residual networks stay near a Neural ODE if they start smooth in depth?

    Trains x + V σ(W x + b)/N on a small regression at every depth for one flow time, from controls
    that are a Gaussian process in depth and from independent ones, and measures the gap to the
    Neural ODE through its controls and the largest ‖θ_{n+1} − θ_n‖, each against N. Leaves
    study.json and study.html in DIR/smooth; takes minutes. For example:
      deeplimit study smooth
      deeplimit study smooth --activations tanh --depths 8 16 32 --seeds 0

    Args:
        activations: Activation functions σ: relu, gelu, tanh or silu.
        depths: Numbers of layers N, from the smallest to the largest, which all others divide.
        length_scale: Length scale ℓ of the smooth start, as a fraction of the whole depth.

    Returns:
        What was found, in float64, as study.json holds it; the page is the command's. One that was
        interrupted goes on. Each seed draws its own controls and its own regression.

    >>> found = study_smooth(activations=["tanh"], depths=(2, 4), seeds=(0,), steps=1, runs=runs)
    >>> [family.name for family in found.families]
    ['tanh, smooth', 'tanh, independent']

    Raises:
        InputError: no activation, one twice or an unknown one, depths that do not rise or do not
            divide the largest, no seed or one twice, ℓ, η or steps not above 0.
        RunError: a loss that is not finite.
    """
    from deeplimit.studies import harness, smooth

    study = smooth.experiment(activations, depths, seeds, length_scale, learning_rate, steps)
    return harness.run_study(study, runs, tell)
