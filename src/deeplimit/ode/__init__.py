"""The limit of infinite depth: distance to the Neural ODE, smoothness, changes of depth."""

from deeplimit.ode.depth import coarsen, refine
from deeplimit.ode.discretization import DiscretizationGap, discretization_gap
from deeplimit.ode.limit import ControlCurves, DepthLimit, depth_limit
from deeplimit.ode.smoothness import Smoothness, StageSmoothness, smoothness
from deeplimit.ode.solved import SolverAccuracy, solved, solver_accuracies
from deeplimit.ode.tying import tie, untie

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
    "solved",
    "solver_accuracies",
    "tie",
    "untie",
]
