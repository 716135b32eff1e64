"""Residual networks seen through their infinite-depth, infinite-width limit."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from deeplimit.errors import InputError, RunError

if TYPE_CHECKING:
    from deeplimit.control import (
        SoftCrossEntropy,
        StageCost,
        choose_cut,
        crop,
        dissipativity,
        turnpike_profile,
        verify_crop,
    )
    from deeplimit.gradient import (
        drift,
        gradient_error,
        plan_anchors,
        use_adjoint,
        use_backprop,
    )
    from deeplimit.meanfield import (
        LayerwiseMeasure,
        convergence_certificate,
        cot_distance,
        cot_geodesic,
        particle_flow,
    )
    from deeplimit.network import Euler, Heun, ResidualChain, anatomy
    from deeplimit.ode import coarsen, discretization_gap, refine, smoothness, tie, untie
    from deeplimit.training import heal

__version__ = "0.1.0"

__all__ = [
    "Euler",
    "Heun",
    "InputError",
    "LayerwiseMeasure",
    "ResidualChain",
    "RunError",
    "SoftCrossEntropy",
    "StageCost",
    "anatomy",
    "choose_cut",
    "coarsen",
    "convergence_certificate",
    "cot_distance",
    "cot_geodesic",
    "crop",
    "discretization_gap",
    "dissipativity",
    "drift",
    "gradient_error",
    "heal",
    "particle_flow",
    "plan_anchors",
    "refine",
    "smoothness",
    "tie",
    "turnpike_profile",
    "untie",
    "use_adjoint",
    "use_backprop",
    "verify_crop",
]

_ROOMS = {
    "training": {"heal"},
    "meanfield": {
        "LayerwiseMeasure",
        "convergence_certificate",
        "cot_distance",
        "cot_geodesic",
        "particle_flow",
    },
    "ode": {"coarsen", "discretization_gap", "refine", "smoothness", "tie", "untie"},
    "network": {"Euler", "Heun", "ResidualChain", "anatomy"},
    "gradient": {"drift", "gradient_error", "plan_anchors", "use_adjoint", "use_backprop"},
}


def __getattr__(name: str) -> Any:
    """Imports a public name on first use: `deeplimit --help` need not wait for torch."""
    if name not in __all__:
        raise AttributeError(f"module 'deeplimit' has no attribute {name!r}")
    room = next((room for room, names in _ROOMS.items() if name in names), "control")
    return getattr(import_module(f"deeplimit.{room}"), name)
