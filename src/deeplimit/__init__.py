"""Residual networks seen through their infinite-depth, infinite-width limit."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from deeplimit.errors import InputError, RunError

if TYPE_CHECKING:
    from deeplimit.control import (
        SoftCrossEntropy,
        StageCost,
        crop,
        dissipativity,
        turnpike_profile,
        verify_crop,
    )
    from deeplimit.network import Euler, Heun, ResidualChain, anatomy

__version__ = "0.1.0"

__all__ = [
    "Euler",
    "Heun",
    "InputError",
    "ResidualChain",
    "RunError",
    "SoftCrossEntropy",
    "StageCost",
    "anatomy",
    "crop",
    "dissipativity",
    "turnpike_profile",
    "verify_crop",
]

_NETWORK = {"Euler", "Heun", "ResidualChain", "anatomy"}


def __getattr__(name: str) -> Any:
    """Imports a public name on first use: `deeplimit --help` need not wait for torch."""
    if name not in __all__:
        raise AttributeError(f"module 'deeplimit' has no attribute {name!r}")
    room = "network" if name in _NETWORK else "control"
    return getattr(import_module(f"deeplimit.{room}"), name)
