"""Networks between others: on the geodesic of two, in the barycentre of several."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from torch import nn

from deeplimit.control import verify_crop
from deeplimit.errors import InputError
from deeplimit.meanfield import LayerwiseMeasure, cot_distance, cot_geodesic, merge, narrow
from deeplimit.meanfield.geodesic import FramePolicy
from deeplimit.studies.comparison import ComparedLayer, compared_layers
from deeplimit.studies.measured_runs import SharedRuns, averaged, blamed, run_of
from deeplimit.terminal import ProgressCallback, silent
from deeplimit.training import RunFolder
from deeplimit.training.building import evaluation_batches, tolerance_of
from deeplimit.training.models import of_transformers, save_network
from deeplimit.training.results import MergedRuns, Parts, Score
from deeplimit.training.run_files import SUFFIX

ROUNDING = 1e-6  # nats that a loss in single precision does not tell from none


@dataclass(frozen=True)
class Interpolation:
    """Holds what lies between two networks, on test data.

    Attributes:
        runs: as they were given.
        names: what they are called.
        frame: what became of stem, head and norms: "equal", or "interpolate".
        aligned: whether the second network was taken in the first one's basis of the stream.
        samples: of the test data.
        softness: ε of the loss, the soft cross-entropy, as in the first run's recipe.
        ends: the two networks themselves.
        distance: d.
        layers: where the networks meet in depth, and how far they are apart there.
        ts: the points, from 0 to 1.
        geodesic: at each of them the network on the geodesic. For unequal depths its first and last
            are the networks with layers divided in two steps, not quite `ends`.
        naive: the same for (1 − t) θ + t θ', the plain average of parameters; None where there is
            none.
        no_naive: why not; empty where there is one.
        width: neurons in the widest layer of a network between the two.
        barrier: by how much the loss on the geodesic lies above the straight line between its ends,
            at most; 0 where it stays below it.
        naive_barrier: the same of the averages; None where there are none.
        saved: where the network at some t was written, and t.
        saved_distances: of the network that was written, read again, to both ends. A network has no
            weights of its atoms, so that of unequal widths it is another measure than the point of
            the geodesic, whose distances are t d and (1 − t) d.
        lower: d is at least this, as `CotDistance.lower`.
    """

    runs: tuple[str, str]
    names: tuple[str, str]
    frame: FramePolicy
    aligned: bool
    samples: int
    softness: float
    ends: tuple[Score, Score]
    distance: float
    layers: tuple[ComparedLayer, ...]
    ts: tuple[float, ...]
    geodesic: tuple[Score, ...]
    naive: tuple[Score, ...] | None
    no_naive: str
    width: int
    barrier: float
    naive_barrier: float | None
    saved: str | None = None
    saved_at: float | None = None
    saved_distances: tuple[float, float] | None = None
    lower: float | None = None

    @property
    def ratio(self) -> float | None:
        """The geodesic's barrier over the averages'; None without one, or where that is 0."""
        if self.naive_barrier is None or self.naive_barrier < ROUNDING:
            return None
        return self.barrier / self.naive_barrier


def interpolate_runs(
    first: str | Path,
    second: str | Path,
    *,
    points: int = 11,
    frame: FramePolicy | None = None,
    align: bool = False,
    save: float | None = None,
    name: str | None = None,
    trust: bool = False,
    tell: ProgressCallback = silent,
) -> Interpolation:
    """Measures loss and accuracy on test data along the geodesic from one run's network to another.

    Beside it the naive average of the parameters, for networks of one shape.

    >>> interpolate_runs(first, second, points=3, frame="interpolate").ts
    (0.0, 0.5, 1.0)

    The arguments are those of `deeplimit.verbs.interpolate`; a basis is aligned by `align_streams`.

    Raises:
        InputError: no such runs, different data, state dimensions or activations, networks that are
            not means of particles, frames that differ, a basis that is fixed, t outside [0, 1].
    """
    if (save is None) != (name is None):
        raise InputError("save and name go together: save=0.5 and the name of what is written")
    place, is_file = Path(str(name)), str(name).endswith(SUFFIX)
    if is_file and not place.parent.is_dir():
        raise InputError(f"name is {name}: there is no folder {place.parent}")
    if is_file and place.exists():
        raise InputError(f"name is {name}, which is there already; give another name")
    stored = save is not None and not is_file
    shared = SharedRuns.open([first, second], frame, align=align, trust=trust, stored=stored)
    tell("the distance", 0.0)
    frame, (start, end) = shared.frame, shared.measures
    with blamed(*shared.paths):
        transport = cot_distance(start, end, plans=True)
        cot_geodesic(start, end, 0.0, frame=frame, transport=transport)  # refused now or never

    def between(t: float) -> nn.Module:
        return cot_geodesic(start, end, t, frame=frame, transport=transport).network().eval()

    models = [run.model for run in shared.runs]
    ts, no_naive = tuple(k / (points - 1) for k in range(points)), ""
    geodesic, naive = [], []
    for k, t in enumerate(ts):
        tell(f"the geodesic at t = {t:.3g}", (k + 1) / (2 * points + 1))
        geodesic.append(shared.score(between(t)))
    try:
        for k, t in enumerate(ts):
            average = averaged(models, [1 - t, t])
            tell(f"parameters averaged at t = {t:.3g}", (points + k + 1) / (2 * points + 1))
            naive.append(shared.score(average))
    except InputError as error:
        naive, no_naive = [], str(error)
    off = None
    if save is not None:
        network = between(save)
        again = LayerwiseMeasure.of(network)
        off = cot_distance(start, again).distance, cot_distance(again, end).distance
        if not is_file:
            place = run_of(network, shared.folders[0], str(name)).path
        elif of_transformers(network):
            raise InputError(f"a model of transformers is a folder, not {name}: give a plain name")
        else:
            save_network(network, place.with_suffix(""))
    return Interpolation(
        runs=cast(tuple[str, str], shared.paths),
        names=cast(tuple[str, str], shared.names),
        frame=frame,
        aligned=align,
        samples=len(shared.data.test),
        softness=shared.folders[0].recipe.softness,
        ends=(shared.score(models[0]), shared.score(models[1])),
        distance=transport.distance,
        layers=compared_layers(start, end, transport),
        ts=ts,
        geodesic=tuple(geodesic),
        naive=tuple(naive) or None,
        no_naive=no_naive,
        width=max(len(plan.rows) for plan in transport.plans or ()),
        barrier=loss_barrier(ts, [score.loss for score in geodesic]),
        naive_barrier=loss_barrier(ts, [score.loss for score in naive]) if naive else None,
        saved=None if save is None else str(place),
        saved_at=save,
        saved_distances=off,
        lower=transport.lower,
    )


def loss_barrier(ts: Sequence[float], losses: Sequence[float]) -> float:
    """Computes max_t L(t) − ((1 − t) L(0) + t L(1)), which is 0 at the ends.

    Source: Frankle, Dziugaite, Roy, Carbin 2020, arXiv 1912.05671; relative to the line of the ends
    as in Entezari, Sedghi, Saukh, Neyshabur 2022, arXiv 2110.06296.
    """
    first, last = losses[0], losses[-1]
    above = (value - (1 - t) * first - t * last for t, value in zip(ts, losses, strict=True))
    return max(0.0, *above)


def merge_runs(
    specs: Sequence[str | Path],
    *,
    weights: Sequence[float] | None = None,
    width: int | None = None,
    frame: FramePolicy | None = None,
    align: bool = False,
    name: str = "merged",
    trust: bool = False,
    tell: ProgressCallback = silent,
) -> MergedRuns:
    """Joins the networks of runs in a barycentre of their measures, in a new run folder.

    It lies beside the first run and is one like any other: `deeplimit profile`, `refine` and
    `interpolate` take it.

    >>> merge_runs([first, second], frame="interpolate", name="both").weights
    (0.5, 0.5)

    The arguments are those of `deeplimit.verbs.merge`; `narrow` makes layers of at most `width`.

    Raises:
        InputError: as `interpolate_runs`, wrong weights, a width below 1.
    """
    shared = SharedRuns.open(specs, frame, align=align, trust=trust, stored=True)
    frame, count = shared.frame, len(shared.runs)
    tell("the barycentre", 0.0)
    with blamed(*shared.paths):
        joined = merge(shared.measures, weights, frame=frame)
    measure, moved = joined.measure, None
    if width is not None and width < max(len(layer) for layer in measure.layers):
        narrowed = narrow(measure, width)
        measure, moved = narrowed.measure, narrowed.distance
    model = measure.network().eval()
    shares = tuple([1 / count] * count if weights is None else map(float, weights))
    networks = [*(run.model for run in shared.runs), model]
    with suppress(InputError):  # of several shapes
        networks.append(averaged(networks[:count], shares))
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
        verdict=verify_crop(
            networks[best],
            model,
            test,
            shared.loss,
            tolerance=tolerance_of(shared.folders[best].recipe, shared.data),
        ).verdict,
        parts=Parts.of(shared.data),
        lower=joined.lower,
    )

    def fill(new: RunFolder, to: Path) -> None:
        new.write(replace(result, folder=str(to)))

    return replace(result, folder=str(run_of(model, shared.folders[0], name, fill).path))
