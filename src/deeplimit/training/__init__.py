"""Training: typed recipes, the loop, processes, checkpoints, the run folder."""

from typing import TYPE_CHECKING

from deeplimit.extras import lazy

if TYPE_CHECKING:
    from deeplimit.training.analysis import complete, crop_run, profile_run
    from deeplimit.training.building import build_model, load_data, loss_of, run_data
    from deeplimit.training.example_batch import BatchRequest, Example, example
    from deeplimit.training.fit import refine_run, resume, train
    from deeplimit.training.given_model import load_model
    from deeplimit.training.healing import heal, heal_run, resume_heal, search_run
    from deeplimit.training.library_models import LoadedModel
    from deeplimit.training.recipe import Recipe, recipe_for
    from deeplimit.training.results import (
        Cut,
        Healing,
        Profiles,
        Reference,
        Refinement,
        RunResults,
    )
    from deeplimit.training.run_folder import RunFolder

__all__ = [
    "BatchRequest",
    "Cut",
    "Example",
    "Healing",
    "LoadedModel",
    "Profiles",
    "Recipe",
    "Reference",
    "Refinement",
    "RunFolder",
    "RunResults",
    "build_model",
    "complete",
    "crop_run",
    "example",
    "heal",
    "heal_run",
    "load_data",
    "load_model",
    "loss_of",
    "profile_run",
    "recipe_for",
    "refine_run",
    "resume",
    "resume_heal",
    "run_data",
    "search_run",
    "train",
]

__getattr__, __dir__ = lazy(__name__, {"Wish": "BatchRequest"})
