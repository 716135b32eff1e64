"""Networks of several runs joined in one, and how well it does on the data they share."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from deeplimit.control import verify_crop
from deeplimit.errors import InputError
from deeplimit.meanfield import Merged, align_streams, merge, narrow
from deeplimit.meanfield.geodesic import FramePolicy
from deeplimit.studies.comparison import Tell
from deeplimit.studies.measured_runs import (
    MeasuredRun,
    alignment_batch,
    averaged,
    check_storable,
    folders_of,
    measured,
    run_of,
    score,
    shared_data,
)
from deeplimit.training import loss_of
from deeplimit.training.building import evaluation_batches
from deeplimit.training.new_folder import check_beside
from deeplimit.training.results import MergedRuns, Parts


def merge_runs(
    specs: Sequence[str | Path],
    *,
    weights: Sequence[float] | None = None,
    width: int | None = None,
    frame: FramePolicy = "equal",
    align: bool = False,
    name: str = "merged",
    trust: bool = False,
    tell: Tell = lambda message, done: None,
) -> MergedRuns:
    """Joins the networks of runs in a barycentre of their measures, in a new run folder.

    It lies beside the first run and is one like any other: `deeplimit profile`, `refine` and
    `interpolate` take it.

    Args:
        specs: run folders on the same data, two or more, of any widths and depths. The merged
            network has the first one's width, and the merged grid's depth.
        weights: λ_k ≥ 0 of sum 1; equal by default.
        width: at most so many neurons in a layer, by `narrow`.
        frame: "equal": stems, heads and norms must be; "interpolate" takes their weighted mean.
        align: as in `interpolate_runs`, of all runs but the first.
        name: of the new run folder.
        trust: whether code that the runs' recipes name may be run.
        tell: told what is done now, and the fraction done.

    Raises:
        InputError: as `interpolate_runs`, wrong weights, a width below 1.
    """
    if align and frame == "equal":
        raise InputError(
            'align turns stems and heads, which then differ; give the frame "interpolate" with it'
        )
    if width is not None and width < 1:
        raise InputError(f"width is {width}; expected a whole number ≥ 1")
    runs = measured(specs, trust=trust)
    folders = folders_of(runs)
    check_beside(folders[0].path)
    check_storable(runs[0].model)
    data = shared_data(folders)
    loss = loss_of(folders[0].recipe, data)
    tell("the barycentre", 0.0)
    joined = _joined(runs, weights, frame, align, alignment_batch(data) if align else None)
    measure, moved = joined.measure, None
    if width is not None and width < max(len(layer) for layer in measure.layers):
        narrowed = narrow(measure, width)
        measure, moved = narrowed.measure, narrowed.distance
    model = measure.network().eval()
    shares = tuple([1 / len(runs)] * len(runs) if weights is None else map(float, weights))
    networks = [run.model for run in runs]
    try:
        plain = averaged(networks, shares)
    except InputError:  # of several shapes
        plain = None
    scores = []
    for k, network in enumerate([*networks, model, *([] if plain is None else [plain])]):
        tell("accuracy on test data", (k + 1) / (len(runs) + 3))
        scores.append(score(network, evaluation_batches(data.test), loss))
    best = max(range(len(runs)), key=lambda k: scores[k].accuracy)
    report = verify_crop(networks[best], model, evaluation_batches(data.test), loss)
    result = MergedRuns(
        folder="",
        runs=tuple(run.path for run in runs),
        names=tuple(run.name for run in runs),
        weights=shares,
        frame=frame,
        aligned=align,
        samples=len(data.test),
        parents=tuple(scores[: len(runs)]),
        merged=scores[len(runs)],
        averaged=None if plain is None else scores[-1],
        distances=joined.distances,
        objectives=joined.objectives,
        depth=measure.depth,
        width=max(len(layer) for layer in measure.layers),
        narrowed=moved,
        verdict=report.verdict,
        parts=Parts.of(data),
        lower=joined.lower,
    )
    made = run_of(
        model, folders[0], name, lambda new, to: new.write(replace(result, folder=str(to)))
    )
    return replace(result, folder=str(made.path))


def _joined(
    runs: Sequence[MeasuredRun],
    weights: Sequence[float] | None,
    frame: FramePolicy,
    align: bool,
    batch: Tensor | None,
) -> Merged:
    first, *others = [run.measure for run in runs]
    try:
        if align and batch is not None:
            others = [align_streams(first, other, batch) for other in others]
        return merge([first, *others], weights, frame=frame)
    except InputError as error:
        raise InputError(f"{', '.join(run.path for run in runs)}: {error}") from error
