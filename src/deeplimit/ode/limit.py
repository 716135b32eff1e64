"""All that is measured of a network against its limit of infinite depth, in one result."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deeplimit._anatomy import Anatomy, Stack, anatomy
from deeplimit._anatomy.evaluation import Inputs
from deeplimit.ode._smoothness import Smoothness, smoothness
from deeplimit.ode.discretization import DiscretizationGap, discretization_gap
from deeplimit.ode.field import Interpolation, stages
from deeplimit.ode.solvers import TOLERANCE, Solver, SolverAccuracy, solver_accuracies
from deeplimit.records import Record
from deeplimit.tables import number, table

CURVES = 6  # numbers of a parameter that are drawn
DRAWN_GROUPS = 8  # parameters of a block that are drawn, the largest ones


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
