"""Residual networks seen through their infinite-depth, infinite-width limit."""

from typing import TYPE_CHECKING

from deeplimit.errors import InputError, RunError
from deeplimit.extras import lazy

if TYPE_CHECKING:
    from deeplimit.control import (
        EarlyExit,
        SoftCrossEntropy,
        StageCost,
        at_depth,
        choose_cut,
        crop,
        dissipativity,
        every_depth,
        exit_depths,
        turnpike_profile,
        verify_crop,
    )
    from deeplimit.gradient import (
        drift,
        gradient_error,
        plan_memory,
        use_adjoint,
        use_backprop,
    )
    from deeplimit.meanfield import (
        LayerwiseMeasure,
        certify_convergence,
        cot_distance,
        cot_geodesic,
        particle_flow,
    )
    from deeplimit.network import Euler, Heun, ResidualChain, anatomy
    from deeplimit.ode import coarsen, discretization_gap, refine, smoothness, tie, untie
    from deeplimit.training import heal

__version__ = "0.2.0"

__all__ = [
    "EarlyExit",
    "Euler",
    "Heun",
    "InputError",
    "LayerwiseMeasure",
    "ResidualChain",
    "RunError",
    "SoftCrossEntropy",
    "StageCost",
    "anatomy",
    "at_depth",
    "certify_convergence",
    "choose_cut",
    "coarsen",
    "cot_distance",
    "cot_geodesic",
    "crop",
    "discretization_gap",
    "dissipativity",
    "drift",
    "every_depth",
    "exit_depths",
    "gradient_error",
    "heal",
    "particle_flow",
    "plan_memory",
    "refine",
    "smoothness",
    "tie",
    "turnpike_profile",
    "untie",
    "use_adjoint",
    "use_backprop",
    "verify_crop",
]

__getattr__, __dir__ = lazy(
    __name__,
    {"convergence_certificate": "certify_convergence", "plan_anchors": "plan_memory"},
)
