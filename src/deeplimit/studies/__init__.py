"""Experiments over several runs."""

from deeplimit.studies.demo import demo_recipe, run_demo
from deeplimit.studies.horizon import HorizonRuns, HorizonStudy, horizon_recipe, study_horizon

__all__ = [
    "HorizonRuns",
    "HorizonStudy",
    "demo_recipe",
    "horizon_recipe",
    "run_demo",
    "study_horizon",
]
