"""How a residual network's gradient is obtained: states rebuilt backwards, and the error known."""

from deeplimit.gradient.accuracy import GradientAccuracy, drift, gradient_error
from deeplimit.gradient.adjoint import Layout, layout, use_adjoint, use_backprop
from deeplimit.gradient.anchors import AnchorPlan, plan_anchors
from deeplimit.gradient.errors import AdjointError, DriftWarning

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
