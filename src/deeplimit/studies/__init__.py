"""Experiments over several runs."""

from deeplimit.studies.demo import demo_recipe, run_demo
from deeplimit.studies.gradient_cost import GradientCost, measure_gradient_cost
from deeplimit.studies.gradient_methods import MethodCost
from deeplimit.studies.horizon import HorizonRuns, HorizonStudy, horizon_recipe, study_horizon
from deeplimit.studies.linear import LinearStudy, study_linear
from deeplimit.studies.rates import Family, Rate
from deeplimit.studies.smooth import SmoothStudy, study_smooth

__all__ = [
    "Family",
    "GradientCost",
    "HorizonRuns",
    "HorizonStudy",
    "LinearStudy",
    "MethodCost",
    "Rate",
    "SmoothStudy",
    "demo_recipe",
    "horizon_recipe",
    "measure_gradient_cost",
    "run_demo",
    "study_horizon",
    "study_linear",
    "study_smooth",
]
