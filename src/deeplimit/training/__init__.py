"""Training: typed recipes, the loop, processes, checkpoints, the run folder."""

from deeplimit.training.analysis import crop_run, profile_run
from deeplimit.training.building import build_model, load_data, loss_of
from deeplimit.training.defaults import recipe_for
from deeplimit.training.fit import resume, train
from deeplimit.training.recipe import Recipe
from deeplimit.training.results import Cut, Profiles, Reference, RunResults
from deeplimit.training.run_folder import RunFolder

__all__ = [
    "Cut",
    "Profiles",
    "Recipe",
    "Reference",
    "RunFolder",
    "RunResults",
    "build_model",
    "crop_run",
    "load_data",
    "loss_of",
    "profile_run",
    "recipe_for",
    "resume",
    "train",
]
