"""Experiments over several runs."""

from typing import TYPE_CHECKING

from deeplimit.extras import lazy

if TYPE_CHECKING:
    from deeplimit.studies.comparison import Comparison, compare_runs
    from deeplimit.studies.consistency import ConsistencyStudy
    from deeplimit.studies.convergence import ConvergenceStudy
    from deeplimit.studies.experiments import (
        study_consistency,
        study_convergence,
        study_linear,
        study_smooth,
    )
    from deeplimit.studies.gradient_cost import GradientCost, MethodCost, measure_gradient_cost
    from deeplimit.studies.horizon import (
        HorizonRuns,
        HorizonStudy,
        demo_recipe,
        horizon_recipe,
        run_demo,
        study_horizon,
    )
    from deeplimit.studies.interpolation import Interpolation, interpolate_runs, merge_runs
    from deeplimit.studies.linear import LinearStudy
    from deeplimit.studies.rates import Family, Rate
    from deeplimit.studies.smooth import SmoothStudy
    from deeplimit.training.results import MergedRuns

__all__ = [
    "Comparison",
    "ConsistencyStudy",
    "ConvergenceStudy",
    "Family",
    "GradientCost",
    "HorizonRuns",
    "HorizonStudy",
    "Interpolation",
    "LinearStudy",
    "MergedRuns",
    "MethodCost",
    "Rate",
    "SmoothStudy",
    "compare_runs",
    "demo_recipe",
    "horizon_recipe",
    "interpolate_runs",
    "measure_gradient_cost",
    "merge_runs",
    "run_demo",
    "study_consistency",
    "study_convergence",
    "study_horizon",
    "study_linear",
    "study_smooth",
]

__getattr__, __dir__ = lazy(__name__)
