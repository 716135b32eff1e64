"""The limit of infinite width: networks as measures, their distance, geodesics, gradient flow."""

from typing import TYPE_CHECKING

from deeplimit.extras import lazy

if TYPE_CHECKING:
    from deeplimit.meanfield.convergence import (
        ConvergenceCertificate,
        ConvergenceRecorder,
        certify_convergence,
    )
    from deeplimit.meanfield.couplings import Plan
    from deeplimit.meanfield.flow import ParticleFlow, particle_flow, slope
    from deeplimit.meanfield.forms import Narrowed, align_streams, narrow, widen
    from deeplimit.meanfield.geodesic import Merged, cot_geodesic, merge
    from deeplimit.meanfield.kernel import FeatureKernel, feature_kernel
    from deeplimit.meanfield.measure import LayerwiseMeasure
    from deeplimit.meanfield.transport import CotDistance, cot_distance

__all__ = [
    "ConvergenceCertificate",
    "ConvergenceRecorder",
    "CotDistance",
    "FeatureKernel",
    "LayerwiseMeasure",
    "Merged",
    "Narrowed",
    "ParticleFlow",
    "Plan",
    "align_streams",
    "certify_convergence",
    "cot_distance",
    "cot_geodesic",
    "feature_kernel",
    "merge",
    "narrow",
    "particle_flow",
    "slope",
    "widen",
]

__getattr__, __dir__ = lazy(__name__, {"convergence_certificate": "certify_convergence"})
