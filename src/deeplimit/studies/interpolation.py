"""Loss and accuracy between two networks: along the geodesic, and by averaging parameters."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from deeplimit.control import SoftCrossEntropy
from deeplimit.data import DataSet
from deeplimit.errors import InputError
from deeplimit.meanfield import (
    CotDistance,
    LayerwiseMeasure,
    align_streams,
    cot_distance,
    cot_geodesic,
)
from deeplimit.meanfield.geodesic import FramePolicy
from deeplimit.studies.comparison import ComparedLayer, Tell, compared_layers
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
from deeplimit.training import RunFolder, loss_of
from deeplimit.training.building import evaluation_batches
from deeplimit.training.models import of_transformers, save_network
from deeplimit.training.new_folder import check_beside
from deeplimit.training.results import Score
from deeplimit.training.run_files import SUFFIX

FRAMES = ("equal", "interpolate")


@dataclass(frozen=True)
class Interpolation:
    """What lies between two networks, on test data.

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
        return self.barrier / self.naive_barrier if self.naive_barrier else None


@dataclass(frozen=True, eq=False)
class Way:
    """Two networks, and what is needed to go from one to the other."""

    start: LayerwiseMeasure
    end: LayerwiseMeasure
    frame: FramePolicy
    transport: CotDistance

    def network(self, t: float) -> nn.Module:
        """The network at t."""
        found = cot_geodesic(self.start, self.end, t, frame=self.frame, transport=self.transport)
        return found.network().eval()


def interpolate_runs(
    first: str | Path,
    second: str | Path,
    *,
    points: int = 11,
    frame: FramePolicy = "equal",
    align: bool = False,
    save: float | None = None,
    name: str | None = None,
    trust: bool = False,
    tell: Tell = lambda message, done: None,
) -> Interpolation:
    """Loss and accuracy on test data along the geodesic from one run's network to another's.

    Beside it the naive average of the parameters, for networks of one shape.

    Args:
        first: a run folder, of t = 0.
        second: another on the same data, of t = 1; any width and depth.
        points: how many t, evenly spaced from 0 to 1.
        frame: "equal": stems, heads and norms must be; "interpolate" moves them linearly.
        align: take the second network in the basis of the residual stream that is nearest to the
            first one's, by their states on training data, as `align_streams`. Its stem and head
            turn along, so that they need the frame "interpolate".
        save: a t, whose network is written.
        name: of it: a new run folder's beside the first, or a file that ends in .safetensors.
        trust: whether code that the runs' recipes name may be run.
        tell: told what is done now, and the fraction done.

    Raises:
        InputError: no such runs, different data, state dimensions or activations, networks that are
            not means of particles, frames that differ, a basis that is fixed, t outside [0, 1].
    """
    _check(points, frame, align, save, name)
    runs = measured([first, second], trust=trust)
    folders = folders_of(runs)
    if save is not None and not str(name).endswith(SUFFIX):
        check_storable(runs[0].model)
        check_beside(folders[0].path)
    data = shared_data(folders)
    tell("the distance", 0.0)
    path = _path(runs, frame, align, data)
    loss = loss_of(folders[0].recipe, data)
    ts = tuple(k / (points - 1) for k in range(points))
    ends = _score(runs[0].model, data, loss), _score(runs[1].model, data, loss)
    geodesic = []
    for k, t in enumerate(ts):
        tell(f"the geodesic at t = {t:.3g}", (k + 1) / (2 * points + 1))
        middle = path.network(t)
        geodesic.append(_score(middle, data, loss))
    width = max(len(plan.rows) for plan in path.transport.plans or ())
    naive, why = _naive(runs, ts, data, loss, tell)
    made = off = None
    if save is not None:
        between = path.network(save)
        again = LayerwiseMeasure.of(between)
        off = (
            cot_distance(path.start, again).distance,
            cot_distance(again, path.end).distance,
        )
        made = _save(between, folders[0], str(name))
    return Interpolation(
        runs=(runs[0].path, runs[1].path),
        names=(runs[0].name, runs[1].name),
        frame=frame,
        aligned=align,
        samples=len(data.test),
        softness=folders[0].recipe.softness,
        ends=ends,
        distance=path.transport.distance,
        layers=compared_layers(path.start, path.end, path.transport),
        ts=ts,
        geodesic=tuple(geodesic),
        naive=naive,
        no_naive=why,
        width=width,
        barrier=loss_barrier(ts, [s.loss for s in geodesic]),
        naive_barrier=None if naive is None else loss_barrier(ts, [s.loss for s in naive]),
        saved=made,
        saved_at=save,
        saved_distances=off,
        lower=path.transport.lower,
    )


def loss_barrier(ts: Sequence[float], losses: Sequence[float]) -> float:
    """max_t L(t) − ((1 − t) L(0) + t L(1)), which is 0 at the ends.

    Source: Frankle, Dziugaite, Roy, Carbin 2020, arXiv 1912.05671; relative to the line of the ends
    as in Entezari, Sedghi, Saukh, Neyshabur 2022, arXiv 2110.06296.
    """
    first, last = losses[0], losses[-1]
    above = (value - (1 - t) * first - t * last for t, value in zip(ts, losses, strict=True))
    return max(0.0, *above)


def _check(
    points: int, frame: FramePolicy, align: bool, save: float | None, name: str | None
) -> None:
    if points < 2:
        raise InputError(f"points is {points}; expected at least 2, t = 0 and t = 1")
    if frame not in FRAMES:
        raise InputError(f"frame is {frame!r}; expected one of {', '.join(FRAMES)}")
    if align and frame == "equal":
        raise InputError(
            "align turns the second network's stem and head, which then differ from the first's; "
            'give the frame "interpolate" with it'
        )
    if (save is None) != (name is None):
        raise InputError("save and name go together: save=0.5 and the name of what is written")
    if save is not None and not 0 <= save <= 1:
        raise InputError(f"save is {save}; expected a t in [0, 1], such as 0.5")
    if str(name).endswith(SUFFIX):
        place = Path(str(name))
        if not place.parent.is_dir():
            raise InputError(f"name is {name}: there is no folder {place.parent}")
        if place.exists():
            raise InputError(f"name is {name}, which is there already; give another name")


def _path(runs: Sequence[MeasuredRun], frame: FramePolicy, align: bool, data: DataSet) -> Way:
    a, b = runs
    start, end = a.measure, b.measure
    try:
        if align:
            end = align_streams(start, end, alignment_batch(data))
        path = Way(start, end, frame, cot_distance(start, end, plans=True))
        cot_geodesic(start, end, 0.0, frame=frame, transport=path.transport)  # refused now or never
    except InputError as error:
        raise InputError(f"{a.path} and {b.path}: {error}") from error
    return path


def _naive(
    runs: Sequence[MeasuredRun],
    ts: Sequence[float],
    data: DataSet,
    loss: SoftCrossEntropy,
    tell: Tell,
) -> tuple[tuple[Score, ...] | None, str]:
    models = [run.model for run in runs]
    found = []
    for k, t in enumerate(ts):
        try:
            middle = averaged(models, [1 - t, t])
        except InputError as error:
            return None, str(error)
        tell(f"parameters averaged at t = {t:.3g}", (len(ts) + k + 1) / (2 * len(ts) + 1))
        found.append(_score(middle, data, loss))
    return tuple(found), ""


def _score(model: nn.Module, data: DataSet, loss: SoftCrossEntropy) -> Score:
    return score(model, evaluation_batches(data.test), loss)


def _save(model: nn.Module, like: RunFolder, name: str) -> str:
    """Writes the network; says where."""
    if not name.endswith(SUFFIX):
        return str(run_of(model, like, name).path)
    place = Path(name)
    if of_transformers(model):
        raise InputError(f"a model of transformers is a folder; {name} given: give a plain name")
    save_network(model, place.with_suffix(""))
    return str(place)
