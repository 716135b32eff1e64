"""What the demo trains: one network with stage cost, and the control of its cut."""

from dataclasses import replace
from pathlib import Path

from deeplimit.training import Recipe, RunFolder, complete, recipe_for, train


def demo_recipe(seed: int = 0) -> Recipe:
    """Twenty layers on scikit-learn's digits: far too deep, trained in seconds."""
    return replace(recipe_for("digits"), depth=(20,), control="plain", seed=seed)


def run_demo(recipe: Recipe, *, runs: Path = Path("runs"), quiet: bool = False) -> RunFolder:
    """Trains, profiles and cuts a network, and trains its control (`complete`)."""
    folder = train(recipe, runs=runs, name="demo", quiet=quiet)
    complete(folder, quiet=quiet)
    return folder
