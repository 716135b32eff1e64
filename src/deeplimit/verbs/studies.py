"""Verbs of studies: experiments over several networks, each with theory's answer beside it."""

from dataclasses import replace
from pathlib import Path
from pkgutil import resolve_name
from typing import Annotated, Any

from typing_extensions import Doc

from deeplimit.verbs.answer import RUNS, Answer, Progress, silent

FIGURE = "study.html"
TITLES = {
    "consistency": "Does training stop depending on width and depth?",
    "convergence": "Where training converges at a rate known before it starts",
    "linear": "Linear residuals: distance to the Neural ODE against depth",
    "smooth": "Two-layer residuals: distance to the Neural ODE against depth",
}
FIGURES = {  # FILE:NAME in report/
    "consistency": "studies:consistency_figures",
    "convergence": "convergence:convergence_figures",
    "linear": "studies:rates_figures",
    "smooth": "studies:rates_figures",
}
Numbers = tuple[int, ...]
Runs = Annotated[Path, "DIR", Doc("Folder for the study's folder.")]
Depths = Annotated[Numbers, Doc("Numbers of layers N, from the smallest to the largest.")]
Seeds = Annotated[Numbers, Doc("One training of everything for each of these seeds.")]
Time = Annotated[float, Doc("How long the flow is.")]
Step = Annotated[float, Doc("Step of the flow's time.")]
LayerStep = Annotated[float, Doc("Step η of the gradient flow; a layer's own is η N.")]
Steps = Annotated[int, Doc("Steps of the gradient flow.")]


def consistency(
    *,
    depths: Depths = (8, 16, 32, 64),
    widths: Numbers = (64, 128, 256, 512),
    seeds: Seeds = (0, 1, 2),
    draws: int = 16,
    atoms: int = 16,
    learning_rate: Step = 0.1,
    time: Time = 2.0,
    runs: Runs = RUNS,
    tell: Progress = silent,
) -> Answer:
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
    """
    return _studied("consistency", locals())


def convergence(
    *,
    widths: Numbers = (4, 8, 16, 32, 64, 128, 256),
    distances: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0, 3.0),
    seeds: Seeds = (0, 1, 2),
    depth: int = 8,
    samples: int = 8,
    learning_rate: Step = 0.1,
    time: Time = 30.0,
    runs: Runs = RUNS,
    tell: Progress = silent,
) -> Answer:
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
    """
    return _studied("convergence", locals())


def horizon(
    *,
    data: Annotated[str, "DATA"] = "digits",
    data_dir: Annotated[Path | None, "DIR"] = None,
    depth: Numbers = (10,),
    seeds: Seeds = (0, 1, 2),
    stage_cost: float = 0.1,
    control_cost: float = 0.0,
    radius: float | None = None,
    epochs: int | None = None,
    runs: Runs = RUNS,
) -> Answer:
    """Does the number of layers in use stay bounded as the network gets deeper?

    Trains at N, 2N and 4N layers, to convergence, with step size, stage cost and control cost per
    layer fixed, and counts the layers outside the tube around the minimisers. With a turnpike the
    count stays where it is. Leaves the runs and study.json in DIR/horizon-DATA. For example:
      deeplimit study horizon
      deeplimit study horizon --depth 10 --seeds 0 1 2 --stage-cost 0.1

    Args:
        data: Name of the data set, as for train.
        data_dir: Folder that holds the data sets' folders; without it DEEPLIMIT_DATA says where.
        depth: The smallest of the three depths; several numbers are several stages.
        stage_cost: Weight γ of the loss at every layer.
        control_cost: Weight r of the squared norm of every layer's control.
        radius: Radius δ of the tube; by default a fifth of the distance of zero logits.
        epochs: Passes over the training data; the default reaches convergence on digits.
    """
    from deeplimit.studies import horizon_recipe, study_horizon

    recipe = horizon_recipe(data)
    recipe = replace(
        recipe,
        data_dir=data_dir,
        depth=depth,
        stage_cost=stage_cost,
        control_cost=control_cost,
        epochs=recipe.epochs if epochs is None else epochs,
    )
    return Answer(study_horizon(recipe, seeds=seeds, radius=radius, runs=runs))


def linear(
    *,
    depths: Depths = (8, 16, 32, 64, 128, 256, 512),
    seeds: Seeds = (0, 1, 2),
    learning_rate: LayerStep = 0.05,
    steps: Steps = 400,
    runs: Runs = RUNS,
    tell: Progress = silent,
) -> Answer:
    """Do linear residual networks stay near a Neural ODE while they train?

    Trains x + θ_n x/N by gradient flow at every depth, from controls that are smooth in depth,
    drawn independently, and of alternating sign, and measures the gap to the Neural ODE through
    its controls and the largest ‖θ_{n+1} − θ_n‖, each against N. Both fall as 1/N from the smooth
    start only. Leaves study.json and study.html in DIR/linear; takes a minute. For example:
      deeplimit study linear
      deeplimit study linear --depths 8 16 32 64 --seeds 0
    """
    return _studied("linear", locals())


def smooth(
    *,
    activations: tuple[str, ...] = ("tanh", "gelu", "relu"),
    depths: Depths = (16, 32, 64, 128),
    seeds: Seeds = (0, 1, 2),
    length_scale: float = 0.5,
    learning_rate: LayerStep = 0.1,
    steps: Steps = 200,
    runs: Runs = RUNS,
    tell: Progress = silent,
) -> Answer:
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
    """
    return _studied("smooth", locals())


def _studied(name: str, settings: dict[str, Any]) -> Answer:
    """Makes a study with these settings, and the page of its figures beside its study.json."""
    from deeplimit.report.page import write_figures

    study = resolve_name(f"deeplimit.studies:study_{name}")(**settings)
    figures = resolve_name(f"deeplimit.report.{FIGURES[name]}")(study)
    page = write_figures(Path(study.folder) / FIGURE, TITLES[name], figures)
    return Answer(study, (page,))
