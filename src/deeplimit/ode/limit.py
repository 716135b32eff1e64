"""The limit of infinite depth: smoothness of the controls; all that is measured in one result."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from deeplimit._anatomy import Anatomy, Stack, anatomy
from deeplimit._anatomy.evaluation import Inputs
from deeplimit.errors import InputError, several
from deeplimit.network.blocks import parameter_groups
from deeplimit.ode.discretization import DiscretizationGap, discretization_gap
from deeplimit.ode.field import Interpolation, stages, with_values
from deeplimit.ode.solvers import TOLERANCE, Solver, SolverAccuracy, solver_accuracies
from deeplimit.records import Record
from deeplimit.tables import number, table

Kind = Literal["smooth", "between", "rough"]

# From benchmarks/smoothness_calibration.py: up to SMOOTH leaving out every second control moves a
# chain's output no more than it moves the smoothest chains', so that what is seen is Euler's error;
# from ROUGH on by more than half. There (1/√2) neighbours differ by their own size, ‖θ_{n+1} − θ_n‖
# being √2 roughness ‖θ‖, and have a correlation of one half.
SMOOTH, ROUGH = 0.25, 0.7
CURVES = 6  # numbers of a parameter that are drawn
DRAWN_GROUPS = 8  # parameters of a block that are drawn, the largest ones

MEANING: dict[Kind, str] = {
    "smooth": (
        "ODE-like ({figures}): the adjoint has its full order, Heun's too; refine and coarsen "
        "change the output by O(1/N); crop layers at rest, coarsen the others"
    ),
    "between": (
        "Neither ODE-like nor independent in depth ({figures}): measure the adjoint's gradient "
        "error, and compare the outputs before and after refine, coarsen or crop"
    ),
    "rough": (
        "Not ODE-like ({figures}): Euler's adjoint keeps its order, Heun's loses two; refine "
        "changes what the network computes, coarsen often too; crop layers of least influence"
    ),
}


@dataclass(frozen=True)
class StageSmoothness(Record):
    """Smoothness of one stage of N layers; `smoothness` has the formulas.

    Attributes:
        stage: the stage's number in the model.
        first: the number of its first layer, counted through all stages of the model.
        horizon: N.
        groups: by parameter's name within a block, the speed v_n^g for each pair of neighbouring
            controls: N − 1 of them (N with Heun's scheme, which has N + 1 controls).
        overall: the speed v_n of all parameters together.
        roughness: √(mean_n v_n²)/(√2 N): 1 for independent controls, O(1/N) for a curve in depth.
        kind: "smooth", "between" or "rough".
    """

    stage: int
    first: int
    horizon: int
    groups: dict[str, tuple[float, ...]]
    overall: tuple[float, ...]
    roughness: float
    kind: Kind

    def __str__(self) -> str:
        """The kind, and a row for each parameter: the root mean square of its speeds."""
        rows = [(name, number(_rms(speeds), 3)) for name, speeds in self.groups.items()]
        what = f"stage {self.stage}, {several(self.horizon, 'layer')}: {self.kind}"
        return f"{what}, roughness {self.roughness:.3f}\n{table(('parameter', 'speed'), rows)}"


@dataclass(frozen=True)
class Smoothness(Record):
    """Smoothness of a model's stages.

    Attributes:
        stages: of two layers or more whose blocks are alike.
        verdict: one line: ODE-like or not, and what that means for adjoint, refine and crop.
    """

    stages: tuple[StageSmoothness, ...]
    verdict: str

    @property
    def kind(self) -> Kind:
        """The roughest stage's kind."""
        return _kind(max(stage.roughness for stage in self.stages))

    def __str__(self) -> str:
        """The verdict, and a line for each stage."""
        rows = [(str(s.stage), str(s.horizon), f"{s.roughness:.3f}", s.kind) for s in self.stages]
        return f"{self.verdict}\n{table(('stage', 'layers', 'roughness', ''), rows)}"


def smoothness(model: nn.Module | Anatomy) -> Smoothness:
    """Measures whether the controls of a model's layers are points of one curve in depth.

    For each stage of N layers and each parameter group g, a parameter's name within a block,

        v_n^g = N ‖θ_{n+1}^g − θ_n^g‖ / √(mean_k ‖θ_k^g‖²),

    the speed of θ over the whole depth in units of its own size: relative to its root mean square
    over the stage's controls, since single ones may be zero; 0 for a group that is zero throughout.
    The groups together:  v_n² = Σ_g p_g (v_n^g)² / Σ_g p_g,  p_g the count of numbers in a group,
    over groups that are not zero throughout. Each group is measured by its own size and weighs by
    its count, so that norms' scales of one, large numbers but few, do not hide rough weights.

        roughness = √(mean_n v_n²) / (√2 N)

    does not change with a factor common to all controls, nor with the direction of depth. It is 1
    for independent draws of mean 0, 0 for identical layers, up to √2 for controls of alternating
    sign; for a Gaussian process in depth of length scale ℓ (`smooth_start`) it is
    √(1 − exp(−1/(2N²ℓ²))), about 1/(√2 Nℓ): the controls change by their own size within about
    1/(√2 roughness) layers. The verdict is that of the roughest stage: smooth up to 0.25 (a length
    scale of at least 2.8 layers), rough from 0.7 on (of at most 0.86 layers), in between neither.

    What it does not see: the size of the steps (`discretization_gap` does), and functions that are
    alike with unlike θ, such as layers whose neurons are permuted. θ are the parameters; running
    statistics of norms are not among them.

        >>> found = smoothness(chain)
        >>> found.kind, round(found.stages[0].roughness, 2), len(found.stages[0].overall)
        ('between', 0.33, 3)

    Source: [SAP22] arXiv 2205.14612, [MWSB23] arXiv 2309.01213, where ‖θ_{n+1} − θ_n‖ = O(1/N) is
    what makes a network tend to an ODE; measures and limits are ours.

    Raises:
        InputError: a model without a stage of two alike layers or more, parameters on the meta
            device, or parameters that are not finite.
    """
    module = with_values(model)
    with_parameters = (s for s in stages(model) if any(True for _ in s.blocks[0].parameters()))
    measured = tuple(map(_of_stage, with_parameters))
    if not measured:
        raise InputError(
            f"the layers of this {type(module).__name__} have no parameters; their controls have "
            "no smoothness"
        )
    worst = max(measured, key=lambda stage: stage.roughness)
    where = f" in stage {worst.stage}, the roughest" if len(measured) > 1 else ""
    figures = f"roughness {worst.roughness:.2f}{where}"
    return Smoothness(measured, MEANING[worst.kind].format(figures=figures))


@torch.no_grad()
def _of_stage(stage: Stack) -> StageSmoothness:
    horizon = stage.horizon
    groups: dict[str, tuple[float, ...]] = {}
    squares, numbers = [0.0] * (len(stage.blocks) - 1), 0
    for name, thetas in parameter_groups(stage.blocks).items():
        speeds = groups[name] = _speeds(thetas, horizon)
        if any(theta.any() for theta in thetas):
            numbers += thetas[0].numel()
            squares = [s + thetas[0].numel() * v**2 for s, v in zip(squares, speeds, strict=True)]
    overall = tuple(math.sqrt(s / max(numbers, 1)) for s in squares)
    roughness = _rms(overall) / (math.sqrt(2) * horizon)
    return StageSmoothness(
        stage.index, stage.first, horizon, groups, overall, roughness, _kind(roughness)
    )


def _speeds(thetas: Sequence[Tensor], horizon: int) -> tuple[float, ...]:
    """N ‖θ_{n+1} − θ_n‖ / √(mean_k ‖θ_k‖²); two parameters in float64 at a time, not the model."""
    norm = torch.linalg.vector_norm
    size = _rms([float(norm(theta.double())) for theta in thetas])
    changes = (float(norm(b.double() - a.double())) for a, b in pairwise(thetas))
    return tuple(horizon * change / size if size else 0.0 for change in changes)


def _rms(values: Sequence[float]) -> float:
    return math.sqrt(sum(v**2 for v in values) / len(values))


def _kind(roughness: float) -> Kind:
    if roughness <= SMOOTH:
        return "smooth"
    return "rough" if roughness >= ROUGH else "between"


@dataclass(frozen=True)
class ControlCurves(Record):
    """Some of the numbers in θ_n as curves in n.

    Attributes:
        stage: the stage's number in the model.
        groups: by parameter's name within a block, curves [numbers][n].
    """

    stage: int
    groups: dict[str, tuple[tuple[float, ...], ...]]

    def __str__(self) -> str:
        """A row for each parameter: its first number at the ends of the stage."""
        ends = ((name, curves[0]) for name, curves in self.groups.items())
        rows = [(name, number(c[0]), number(c[-1])) for name, c in ends]
        return f"stage {self.stage}\n{table(('one number of', 'first', 'last'), rows)}"


@dataclass(frozen=True)
class DepthLimit(Record):
    """A network and its Neural ODE.

    Attributes:
        smoothness: of the controls, in every stage.
        gaps: the distance to the Neural ODE, stage by stage.
        curves: some of the controls' numbers, stage by stage.
        solvers: accuracy with other solvers and numbers of steps; none without labelled data.
    """

    smoothness: Smoothness
    gaps: tuple[DiscretizationGap, ...]
    curves: tuple[ControlCurves, ...]
    solvers: tuple[SolverAccuracy, ...] = ()

    def __str__(self) -> str:
        """The smoothness, and a line for each gap and each solver."""
        gaps = (gap.summary for gap in self.gaps)
        return "\n".join([str(self.smoothness), *gaps, *map(str, self.solvers)])


def depth_limit(
    model: nn.Module | Anatomy,
    x: Inputs,
    *,
    interpolation: Interpolation = "linear",
    bound: bool = True,
    loader: Iterable[tuple[Inputs, Tensor]] | None = None,
    solvers: Sequence[tuple[Solver, int | None]] = (),
    tolerance: float = TOLERANCE,
    seed: int = 0,
    tell: Callable[[str], None] = lambda _: None,
) -> DepthLimit:
    """Measures smoothness, gap, bounds and curves of all stages of a model.

        >>> found = depth_limit(chain, x)
        >>> found.smoothness.kind, len(found.gaps), found.curves[0].stage
        ('between', 1, 0)

    Source: [SAP22] arXiv 2205.14612; see `smoothness`, `discretization_gap`, `solver_accuracies`.

    Args:
        model: as for `discretization_gap`.
        x: a batch of its inputs.
        interpolation: of the controls, "linear" or "constant".
        bound: whether to compute the bounds on the distance too.
        loader: labelled batches for `solvers`.
        solvers: as for `solver_accuracies`.
        tolerance: likewise.
        seed: of what is drawn at random.
        tell: is told what is measured next.

    Raises:
        InputError, RunError: as `smoothness`, `discretization_gap` and `solver_accuracies`.
    """
    tell("smoothness in depth")
    smooth = smoothness(model)
    read = anatomy(model)
    found = stages(read)
    options: dict[str, Any] = {"interpolation": interpolation, "bound": bound, "seed": seed}
    gaps = tuple(
        discretization_gap(read, x, stage=stage.index, tell=tell, **options) for stage in found
    )
    accuracies: tuple[SolverAccuracy, ...] = ()
    if loader is not None and solvers:
        tell("accuracy with other solvers")
        accuracies = solver_accuracies(read, loader, solvers, tolerance=tolerance)
    return DepthLimit(smooth, gaps, tuple(map(_curves, found)), accuracies)


def _curves(stage: Stack) -> ControlCurves:
    """Numbers at equal distances in the largest parameters, all zero ones left out."""
    drawn: dict[str, tuple[tuple[float, ...], ...]] = {}
    controls = sorted(stage.controls().items(), key=lambda item: -item[1].numel())
    for name, thetas in controls:
        flat = thetas.flatten(1).double()
        flat = flat[:, flat.any(0)]
        if len(drawn) == DRAWN_GROUPS or flat.shape[1] == 0:
            continue
        count = min(CURVES, flat.shape[1])
        # Off the borders: the first number of a matrix is often one of an image's dark corners.
        places = ((torch.arange(count) + 0.5) * flat.shape[1] / count).long()
        drawn[name] = tuple(tuple(row) for row in flat[:, places].T.tolist())
    return ControlCurves(stage.index, drawn)
