"""Networks of several runs joined in one, and how well it does on the data they share."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from deeplimit.control import verify_crop
from deeplimit.errors import InputError
from deeplimit.meanfield import merge, narrow
from deeplimit.meanfield.geodesic import FramePolicy
from deeplimit.studies.harness import ProgressCallback, silent
from deeplimit.studies.measured_runs import SharedRuns, blamed, run_of
from deeplimit.training.building import evaluation_batches
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
    tell: ProgressCallback = silent,
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
        tell: is told what is done now, and the fraction done.

    Raises:
        InputError: as `interpolate_runs`, wrong weights, a width below 1.
    """
    if align and frame == "equal":
        raise InputError(
            'align turns stems and heads, which then differ; give the frame "interpolate" with it'
        )
    if width is not None and width < 1:
        raise InputError(f"width is {width}; expected a whole number ≥ 1")
    shared = SharedRuns.open(specs, trust=trust, stored=True)
    count = len(shared.runs)
    tell("the barycentre", 0.0)
    with blamed(*shared.paths):
        joined = merge(shared.measures(align=align), weights, frame=frame)
    measure, moved = joined.measure, None
    if width is not None and width < max(len(layer) for layer in measure.layers):
        narrowed = narrow(measure, width)
        measure, moved = narrowed.measure, narrowed.distance
    model = measure.network().eval()
    shares = tuple([1 / count] * count if weights is None else map(float, weights))
    networks = [*(run.model for run in shared.runs), model]
    with suppress(InputError):  # of several shapes
        networks.append(shared.average(shares))
    scores = []
    for k, network in enumerate(networks):
        tell("accuracy on test data", (k + 1) / (count + 3))
        scores.append(shared.score(network))
    best = max(range(count), key=lambda k: scores[k].accuracy)
    test = evaluation_batches(shared.data.test)
    result = MergedRuns(
        folder="",
        runs=shared.paths,
        names=shared.names,
        weights=shares,
        frame=frame,
        aligned=align,
        samples=len(shared.data.test),
        parents=tuple(scores[:count]),
        merged=scores[count],
        averaged=scores[-1] if len(scores) > count + 1 else None,
        distances=joined.distances,
        objectives=joined.objectives,
        depth=measure.depth,
        width=max(len(layer) for layer in measure.layers),
        narrowed=moved,
        verdict=verify_crop(networks[best], model, test, shared.loss).verdict,
        parts=Parts.of(shared.data),
        lower=joined.lower,
    )
    made = run_of(
        model,
        shared.folders[0],
        name,
        lambda new, to: new.write(replace(result, folder=str(to))),
    )
    return replace(result, folder=str(made.path))
