"""Experiments over several runs."""

from deeplimit.studies.demo import demo_recipe, run_demo
from deeplimit.studies.gradient_cost import GradientCost, measure_gradient_cost
from deeplimit.studies.gradient_methods import MethodCost
from deeplimit.studies.horizon import HorizonRuns, HorizonStudy, horizon_recipe, study_horizon

__all__ = [
    "GradientCost",
    "HorizonRuns",
    "HorizonStudy",
    "MethodCost",
    "demo_recipe",
    "horizon_recipe",
    "measure_gradient_cost",
    "run_demo",
    "study_horizon",
]
