"""Verbs of studies: experiments over several networks, each with theory's answer beside it."""

from dataclasses import replace
from pathlib import Path
from pkgutil import resolve_name
from typing import Annotated, Any

from deeplimit.studies.experiments import RUNS, Runs, Seeds
from deeplimit.verbs.answer import Answer

FIGURE = "study.html"
PAGES = {  # a study's figures, FILE:NAME in report/, and their heading
    "consistency": (
        "studies:consistency_figures",
        "Does training stop depending on width and depth?",
    ),
    "convergence": (
        "convergence:convergence_figures",
        "Where training converges at a rate known before it starts",
    ),
    "linear": (
        "studies:rates_figures",
        "Linear residuals: distance to the Neural ODE against depth",
    ),
    "smooth": (
        "studies:rates_figures",
        "Two-layer residuals: distance to the Neural ODE against depth",
    ),
}


def horizon(
    *,
    data: Annotated[str, "DATA"] = "digits",
    data_dir: Annotated[Path | None, "DIR"] = None,
    depth: tuple[int, ...] = (10,),
    seeds: Seeds = (0, 1, 2),
    stage_cost: float = 0.1,
    control_cost: float = 0.0,
    radius: float | None = None,
    epochs: int | None = None,
    runs: Runs = RUNS,
) -> Answer:
    """Does the number of layers in use stay bounded as the network gets deeper?

    Trains at N, 2N and 4N layers, to convergence, with step size, stage cost and control cost per
    layer fixed, and counts the layers outside the tube around the minimisers. With a turnpike the
    count stays where it is. Leaves the runs and study.json in DIR/horizon-DATA. For example:
      deeplimit study horizon
      deeplimit study horizon --depth 10 --seeds 0 1 2 --stage-cost 0.1

    Args:
        data: Name of the data set, as for train.
        data_dir: Folder that holds the data sets' folders; without it DEEPLIMIT_DATA says where.
        depth: The smallest of the three depths; several numbers are several stages.
        stage_cost: Weight γ of the loss at every layer.
        control_cost: Weight r of the squared norm of every layer's control.
        radius: Radius δ of the tube; by default a fifth of the distance of zero logits.
        epochs: Passes over the training data; the default reaches convergence on digits.
    """
    from deeplimit.studies import horizon_recipe, study_horizon

    recipe = horizon_recipe(data)
    recipe = replace(
        recipe,
        data_dir=data_dir,
        depth=depth,
        stage_cost=stage_cost,
        control_cost=control_cost,
        epochs=recipe.epochs if epochs is None else epochs,
    )
    return Answer(study_horizon(recipe, seeds=seeds, radius=radius, runs=runs))


def with_page(name: str, study: Any) -> Answer:
    """Writes the page of a study's figures beside its study.json."""
    from deeplimit.report.page import write_figures

    figures, title = PAGES[name]
    shown = resolve_name(f"deeplimit.report.{figures}")(study)
    return Answer(study, (write_figures(Path(study.folder) / FIGURE, title, shown),))
