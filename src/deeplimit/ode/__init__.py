"""The limit of infinite depth: distance to the Neural ODE, smoothness, changes of depth."""

from typing import TYPE_CHECKING

from deeplimit.extras import lazy

if TYPE_CHECKING:
    from deeplimit.ode.depth import coarsen, refine, tie, untie
    from deeplimit.ode.discretization import DiscretizationGap, discretization_gap
    from deeplimit.ode.limit import (
        ControlCurves,
        DepthLimit,
        Smoothness,
        StageSmoothness,
        depth_limit,
        smoothness,
    )
    from deeplimit.ode.solvers import SolverAccuracy, solver_accuracies, with_solver

__all__ = [
    "ControlCurves",
    "DepthLimit",
    "DiscretizationGap",
    "Smoothness",
    "SolverAccuracy",
    "StageSmoothness",
    "coarsen",
    "depth_limit",
    "discretization_gap",
    "refine",
    "smoothness",
    "solver_accuracies",
    "tie",
    "untie",
    "with_solver",
]

__getattr__, __dir__ = lazy(__name__, {"solved": "with_solver"})
