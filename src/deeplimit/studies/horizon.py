"""Is there a turnpike? Train at N, 2N and 4N and count the layers outside the tube.

If some control of N_0 layers brings all samples to the minimisers at cost K above the minimum, and
training does no worse than that control followed by zeros, then for every horizon N

    #{n : mean dist(z_n, Z*_y) > δ}  ≤  K / (γ α(δ))

with α the class-K∞ function of strict dissipativity. The step size h, γ and r per layer stay what
they are while N grows. The bound is on what training reaches: undertrained networks break it.
Source: [PF24] arXiv 2405.19013.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean, stdev

from torch import Tensor

from deeplimit._anatomy.checks import check_number
from deeplimit.control import DepthTable, TurnpikeProfile
from deeplimit.control.verdict import CONFIDENCE, Word, Z, word_of
from deeplimit.records import Record
from deeplimit.studies import harness
from deeplimit.studies.harness import Machine, Point, Study, Tell
from deeplimit.training import (
    Recipe,
    RunFolder,
    complete,
    profile_run,
    recipe_for,
    resume,
    run_data,
    train,
)
from deeplimit.training.run_folder import name_of

MULTIPLES = (1, 2, 4)
ADDED = 0.05  # of the layers added may lie outside the tube where the count is said to stay


@dataclass(frozen=True)
class HorizonRuns:
    """The networks of one depth, one for each seed of the study.

    Attributes:
        horizon: N, the number of layers.
        runs: their run folders, in the study's.
        outside: layers 0 … N outside the tube, on test data.
        entry: first layer from which on all are in the tube; None where no layer is in it.
        accuracy: of the whole network, on test data.
    """

    horizon: int
    runs: tuple[str, ...]
    outside: tuple[int, ...]
    entry: tuple[int | None, ...]
    accuracy: tuple[float, ...]

    @property
    def mean_outside(self) -> float:
        """Layers outside the tube, mean over the seeds."""
        return sum(self.outside) / len(self.outside)


@dataclass(frozen=True)
class HorizonStudy(Record):
    """Layers outside the tube at N, 2N and 4N.

    Attributes:
        folder: where the runs and study.json are.
        data: the data set.
        step, stage_cost, control_cost: h, γ and r, the same at every depth.
        softness: ε.
        radius: the tube's radius δ.
        epochs: passes over the training data in each run.
        seeds: of the runs.
        depths: one entry per depth, from the smallest to the largest.
        verdict: "kept": of the layers added from N to 4N at most `ADDED` lie outside the tube, at
            95 % over the seeds, so that the turnpike's count stays; "lost": more do; "unresolved":
            these seeds tell neither; "nothing learnt": some network is not shown to be better on
            test data than always answering the largest class. None in older files.
        added: the part of the layers added that lies outside, mean over the seeds.
        machine: that the study was run on.
    """

    folder: str
    data: str
    step: float
    stage_cost: float
    control_cost: float
    softness: float
    radius: float
    epochs: int
    seeds: tuple[int, ...]
    depths: tuple[HorizonRuns, ...]
    verdict: Word | None = None
    added: float | None = None
    machine: Machine | None = None

    @property
    def growth(self) -> float:
        """Mean layers outside at 4N over those at N; near 1 where there is a turnpike."""
        return self.depths[-1].mean_outside / max(self.depths[0].mean_outside, 1e-9)


def horizon_recipe(data: str) -> Recipe:
    """Returns the data set's recipe at a constant γ; for digits to convergence, 32 numbers a state.

    The bound is on what a constant stage cost reaches.

    >>> horizon_recipe("digits").epochs
    300
    """
    recipe = replace(recipe_for(data), stage_cost_grows=False)
    return replace(recipe, width=32, epochs=300) if data == "digits" else recipe


def study_horizon(
    recipe: Recipe,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    radius: float | None = None,
    runs: Path = Path("runs"),
    quiet: bool = False,
) -> HorizonStudy:
    """Trains `recipe` at one, two and four times its depth, once for each seed.

    Everything else, step size and costs per layer included, stays as the recipe says. The counts
    are of test data. The runs and study.json are left in a folder of their own,
    horizon-DATA; a study that was interrupted goes on.

    >>> recipe = replace(horizon_recipe("digits"), depth=(1,), epochs=1)
    >>> found = study_horizon(recipe, seeds=(0,), runs=runs, quiet=True)
    >>> [networks.horizon for networks in found.depths]
    [1, 2, 4]

    Args:
        recipe: of the smallest network; its own seed is not used.
        seeds: at least one.
        radius: δ of the tube; by default `TurnpikeProfile.radius`, 0.2·d_0.
        runs: folder for the study's folder.
        quiet: show no progress.

    Raises:
        InputError: no seed, a seed twice, or a negative radius.
    """
    seeds = harness.whole("seeds", seeds)
    harness.check_once("seeds", seeds)
    if radius is not None:
        check_number("the tube radius", radius, "a number ≥ 0", lambda r: r >= 0)
    deeper = {k: replace(recipe, depth=tuple(k * n for n in recipe.depth)) for k in MULTIPLES}
    smallest: dict[int, RunFolder] = {}  # with its data, by its seed

    def measure(points: Sequence[Point], folder: Path, _: Tell) -> list[DepthTable]:
        ((multiple, seed),) = points
        name = _name(deeper[multiple], seed)
        if (folder / name).exists():  # it was interrupted
            run = resume(folder / name, quiet=quiet)
        else:
            own = replace(deeper[multiple], seed=seed)
            run = train(own, runs=folder, name=name, quiet=quiet)
        if (multiple, seed) == (MULTIPLES[0], seeds[0]):
            smallest[seed] = run
        return [profile_run(run).test]

    def counted(found: Mapping[Point, TurnpikeProfile], folder: Path) -> dict[str, object]:
        depths = []
        for multiple in MULTIPLES:
            tests = [found[multiple, seed] for seed in seeds]
            depths.append(
                HorizonRuns(
                    horizon=deeper[multiple].horizon,
                    runs=tuple(_name(deeper[multiple], seed) for seed in seeds),
                    outside=tuple(test.outside(radius) for test in tests),
                    entry=tuple(test.entry(radius) for test in tests),
                    accuracy=tuple(test.accuracy[-1] for test in tests),
                )
            )
        first = smallest.get(seeds[0]) or RunFolder.open(folder / depths[0].runs[0])
        return {
            "radius": tests[0].radius if radius is None else radius,
            "depths": tuple(depths),
            "verdict": judged(depths, run_data(first).test.y),
            "added": fmean(_added(depths)),
        }

    study = Study(
        name=f"horizon-{name_of(recipe.data)}",
        record=HorizonStudy,
        # What does not fit is refused before anything is trained.
        axes={"multiples": MULTIPLES[::-1], "seeds": seeds},
        settings=asdict(replace(recipe, seed=0)),
        value=DepthTable,
        measure=measure,
        result=counted,
    )
    return harness.run_study(study, runs)


def _name(recipe: Recipe, seed: int) -> str:
    return f"{recipe.horizon}-layers-seed-{seed}"


def judged(depths: Sequence[HorizonRuns], targets: Tensor) -> Word:
    """The study's verdict, as `HorizonStudy.verdict` says; `targets` are the test samples'."""
    samples, largest = len(targets), int(targets.bincount().max())
    chance = largest / samples
    margin = Z * math.sqrt(chance * (1 - chance) / samples)  # the score test of a share
    if min(min(runs.accuracy) for runs in depths) <= chance + margin:
        return "nothing learnt"
    parts = _added(depths)
    if len(parts) < 2:
        return "unresolved"
    from scipy.stats import t

    reach = float(t.ppf(CONFIDENCE, len(parts) - 1)) * stdev(parts) / math.sqrt(len(parts))
    return word_of(fmean(parts) - reach, fmean(parts) + reach, ADDED)


def _added(depths: Sequence[HorizonRuns]) -> list[float]:
    """Of each seed, the part of the layers added from N to 4N that lies outside the tube."""
    first, last = depths[0], depths[-1]
    more = last.horizon - first.horizon
    return [(b - a) / more for a, b in zip(first.outside, last.outside, strict=True)]


def demo_recipe(seed: int = 0) -> Recipe:
    """Returns eight layers on mazes, which need several of them, with their control; 3 epochs.

    >>> demo_recipe().depth
    (8,)
    """
    return replace(recipe_for("mazes"), epochs=3, control="plain", seed=seed)


def run_demo(recipe: Recipe, *, runs: Path = Path("runs"), quiet: bool = False) -> RunFolder:
    """Trains, profiles and cuts a network, and trains its control (`complete`).

    >>> run_demo(replace(demo_recipe(), depth=(2,), epochs=1), runs=runs, quiet=True).path.name
    'demo'
    """
    then = partial(complete, quiet=quiet)
    return train(recipe, runs=runs, name="demo", quiet=quiet, then=then)
