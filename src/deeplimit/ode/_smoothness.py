"""Smoothness in depth: how far the controls of neighbouring layers are apart, group by group."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from deeplimit._anatomy import Anatomy, Stack
from deeplimit.errors import InputError, several
from deeplimit.network.blocks import parameter_groups
from deeplimit.ode.field import stages, with_values
from deeplimit.records import Record
from deeplimit.tables import number, table

Kind = Literal["smooth", "between", "rough"]

# From benchmarks/smoothness_calibration.py: up to SMOOTH leaving out every second control moves a
# chain's output no more than it moves the smoothest chains', so that what is seen is Euler's error;
# from ROUGH on by more than half. There (1/√2) neighbours differ by their own size, ‖θ_{n+1} − θ_n‖
# being √2 roughness ‖θ‖, and have a correlation of one half.
SMOOTH, ROUGH = 0.25, 0.7

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
