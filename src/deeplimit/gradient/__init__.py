"""How a residual network's gradient is obtained: states rebuilt backwards, and the error known."""

from deeplimit.gradient.accuracy import (
    AnchorPlan,
    GradientAccuracy,
    drift,
    gradient_error,
    plan_anchors,
)
from deeplimit.gradient.adjoint import Layout, layout, use_adjoint, use_backprop
from deeplimit.gradient.meter import AdjointError, DriftWarning

__all__ = [
    "AdjointError",
    "AnchorPlan",
    "DriftWarning",
    "GradientAccuracy",
    "Layout",
    "drift",
    "gradient_error",
    "layout",
    "plan_anchors",
    "use_adjoint",
    "use_backprop",
]
