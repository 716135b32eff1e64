"""What the demo trains: one network with stage cost, and the same without it as the control."""

from dataclasses import replace
from pathlib import Path

from deeplimit.training import Recipe, RunFolder, crop_run, profile_run, recipe_for, train
from deeplimit.training.results import Reference


def demo_recipe(seed: int = 0) -> Recipe:
    """Twenty layers on scikit-learn's digits: far too deep, trained in seconds."""
    return replace(recipe_for("digits"), depth=(20,), seed=seed)


def run_demo(recipe: Recipe, *, runs: Path = Path("runs"), quiet: bool = False) -> RunFolder:
    """Trains, profiles and cuts a network; does the same to one without stage cost.

    The second run is a folder of its own, named after the first; what its cut to the first one's
    depth changes is the first one's reference.json.
    """
    folder = train(recipe, runs=runs, name="demo", quiet=quiet)
    profile_run(folder)
    depth = crop_run(folder, "auto").report.horizon_after
    control = train(
        replace(recipe, stage_cost=0.0),
        runs=runs,
        name=f"{folder.path.name}-without-stage-cost",
        quiet=quiet,
    )
    test = profile_run(control).test
    folder.write_reference(Reference(test, crop_run(control, depth).report))
    return folder
