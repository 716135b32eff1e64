"""Verbs on several networks: as measures, what lies between, what they share; at several depths."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from deeplimit.errors import InputError
from deeplimit.studies.experiments import RUNS, Runs, Seeds
from deeplimit.terminal import ProgressCallback, silent
from deeplimit.training import RunFolder
from deeplimit.training.run_folder import check_beside, check_spec
from deeplimit.verbs.answer import (
    COUNT,
    PART,
    Answer,
    Figure,
    Seed,
    Trust,
    Within,
    check_figure,
    profiled,
)

Frame = Literal["equal", "interpolate"] | None


def compare(
    runs: Annotated[tuple[str, ...], "RUN|MODEL"],
    *,
    sinkhorn: Annotated[float | None, "EPS"] = None,
    seed: Seed = 0,
    figure: Figure = None,
    trust: Trust = False,
    tell: ProgressCallback = silent,
) -> Answer:
    """Measure how far networks are from one another, whatever their widths and depths.

    The layer-conditional optimal transport distance: in every layer particles are matched as
    cheaply as possible, so that the order of neurons does not count. Of two networks it says where
    in depth they differ and what the matching does; of more it prints the distance of every two.
    For example:
      deeplimit compare runs/digits runs/digits-2
      deeplimit compare runs/a runs/b runs/c --figure distances.html

    Args:
        runs: Run folders that train wrote, two or more; or models as in deeplimit gradient.
        sinkhorn: For layers of thousands of neurons: couplings regularised by EPS, 0.01 say, times
            the mean cost; distances are then given with a bound from below.
        seed: Of random parameters.
        figure: Write the distance of every layer to this HTML file, which opens offline, and all
            figures to the .json file beside it.
    """
    check_figure(figure)
    check_several(runs)
    for run in runs:
        check_spec(run, trust=trust)
    from deeplimit.studies import compare_runs

    found = compare_runs(runs, sinkhorn=sinkhorn, seed=seed, trust=trust, tell=tell)
    if figure is None:
        return Answer(found)
    from deeplimit.report.measures import comparison_figures
    from deeplimit.report.page import write_figures

    names = ", ".join(network.name for network in found.networks)
    title = f"{names}: distance, layer by layer"
    return Answer(found, (write_figures(figure, title, comparison_figures(found), found),))


def interpolate(
    first: Annotated[Path, "RUN_A"],
    second: Annotated[Path, "RUN_B"],
    *,
    points: Annotated[int, "K", Within(2)] = 11,
    frame: Frame = None,
    align: bool = False,
    save: Annotated[float | None, "T", PART] = None,
    name: Annotated[str | None, "NAME"] = None,
    figure: Figure = None,
    trust: Trust = False,
    tell: ProgressCallback = silent,
) -> Answer:
    """Measure what lies between two trained networks, of any widths and depths.

    Loss and accuracy on test data along the geodesic of layer-conditional optimal transport, where
    every point is a network, beside the plain average of parameters, where there is one; and the
    barrier of each: how far the loss rises above the line between its ends. Leaves a page and a
    .json file beside the first run, A-to-B.html. For example:
      deeplimit interpolate runs/a runs/b
      deeplimit interpolate runs/a runs/b --frame interpolate --align
      deeplimit interpolate runs/a runs/b --save 0.5 --name between

    Args:
        first: The run folder of t = 0.
        second: The run folder of t = 1, on the same data.
        points: How many t, from 0 to 1.
        frame: What becomes of stem, head, norms and output biases: equal: they must be;
            interpolate: they move linearly. By default equal, and with --align interpolate.
        align: Take the second network in the basis of its residual stream nearest to the first
            one's, as found on training data; of a network of kind vector with a linear stem, or
            convolutional of one stage without norms.
        save: Write the network at this t, and say how far it is from both ends: for unequal widths
            not as the geodesic's point, since a network's neurons have no weights.
        name: Where to: a new run folder's name, beside the first run, or FILE.safetensors.
        figure: Where to write the page instead.
    """
    check_figure(figure)
    if (save is None) != (name is None):
        raise InputError("--save and --name go together: at which t, and where the network goes")
    if figure is None and first.is_dir():
        check_beside(first)
    for run in (first, second):
        RunFolder.open(run, trust=trust)
    from deeplimit.report.measures import interpolation_figures
    from deeplimit.report.page import write_figures
    from deeplimit.studies import interpolate_runs

    found = interpolate_runs(
        first,
        second,
        points=points,
        frame=frame,
        align=align,
        save=save,
        name=name,
        trust=trust,
        tell=tell,
    )
    aligned = "-aligned" if align else ""
    page = f"{first.resolve().name}-to-{second.resolve().name}{aligned}.html"
    place = first.resolve().parent / page if figure is None else figure
    turned = ", turned into the first one's basis" if found.aligned else ""
    title = f"From {found.names[0]} to {found.names[1]}{turned}"
    written = [write_figures(place, title, interpolation_figures(found), found)]
    if found.saved is not None and Path(found.saved).is_dir():
        written.append(profiled(RunFolder.open(found.saved)))
    return Answer(found, tuple(written))


def merge(
    runs: Annotated[tuple[Path, ...], "RUN"],
    *,
    weights: Annotated[tuple[float, ...], "W", PART] = (),
    width: Annotated[int | None, "M", COUNT] = None,
    frame: Frame = None,
    align: bool = False,
    name: Annotated[str, "NAME"] = "merged",
    trust: Trust = False,
    tell: ProgressCallback = silent,
) -> Answer:
    """Join trained networks of any widths and depths in one.

    A barycentre of layer-conditional optimal transport: in every layer matched particles are
    averaged, not neurons of the same number. Leaves a new run folder beside the first run, with the
    network and merge.json, the test accuracy of the networks and of what was made of them. For
    example:
      deeplimit merge runs/a runs/b
      deeplimit merge runs/a runs/b runs/c --width 64 --name abc

    Args:
        runs: Run folders on the same data, two or more; the first gives the width.
        weights: Of the networks, of sum 1; by default equal.
        width: At most so many neurons in a layer.
        frame: What becomes of stem, head, norms and output biases: equal: they must be;
            interpolate: their mean. By default equal, and with --align interpolate.
        align: Take all networks in the basis of the first one's residual stream, as in interpolate.
        name: The new run folder's name.
    """
    check_several(runs)
    if weights and len(weights) != len(runs):
        raise InputError(f"--weights has {len(weights)} numbers; expected {len(runs)}, one a run")
    for run in runs:
        RunFolder.open(run, trust=trust)
    from deeplimit.studies import merge_runs

    found = merge_runs(
        runs,
        weights=weights or None,
        width=width,
        frame=frame,
        align=align,
        name=name,
        trust=trust,
        tell=tell,
    )
    return Answer(found, (profiled(RunFolder.open(found.folder)),))


def check_several(runs: Sequence[object]) -> None:
    """Raises InputError unless there are two runs or more."""
    if len(runs) < 2:
        raise InputError(f"expected two runs or more, got {len(runs)}")


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
