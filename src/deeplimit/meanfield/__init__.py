"""The limit of infinite width: networks as measures, their distance, geodesics, gradient flow."""

from deeplimit.meanfield.alignment import align_streams
from deeplimit.meanfield.convergence import (
    ConvergenceCertificate,
    ConvergenceRecorder,
    convergence_certificate,
)
from deeplimit.meanfield.flow import ParticleFlow, particle_flow
from deeplimit.meanfield.geodesic import cot_geodesic
from deeplimit.meanfield.kernel import FeatureKernel, feature_kernel
from deeplimit.meanfield.measure import LayerwiseMeasure
from deeplimit.meanfield.merging import Merged, merge
from deeplimit.meanfield.slope import slope
from deeplimit.meanfield.transport import CotDistance, Plan, cot_distance
from deeplimit.meanfield.width import Narrowed, narrow, widen

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
    "convergence_certificate",
    "cot_distance",
    "cot_geodesic",
    "feature_kernel",
    "merge",
    "narrow",
    "particle_flow",
    "slope",
    "widen",
]
