"""How a residual network's gradient is obtained: states rebuilt backwards, and the error known."""

from typing import TYPE_CHECKING

from deeplimit.extras import lazy

if TYPE_CHECKING:
    from deeplimit.gradient.accuracy import GradientAccuracy, drift, gradient_error
    from deeplimit.gradient.adjoint import Layout, layout, use_adjoint, use_backprop
    from deeplimit.gradient.meter import AdjointError, DriftWarning, Way
    from deeplimit.gradient.planning import MemoryPlan, plan_memory

__all__ = [
    "AdjointError",
    "DriftWarning",
    "GradientAccuracy",
    "Layout",
    "MemoryPlan",
    "Way",
    "drift",
    "gradient_error",
    "layout",
    "plan_memory",
    "use_adjoint",
    "use_backprop",
]

__getattr__, __dir__ = lazy(__name__, {"plan_anchors": "plan_memory", "AnchorPlan": "MemoryPlan"})
