"""One harness for all studies: axes, what is measured at a point, resumption, the record.

A study is data. The harness visits the points of its axes one after the other, keeps what was
measured at each in points.json, and makes the record of all, study.json, in a new folder. A study
that was interrupted goes on where it was: a point that is in points.json with the same settings is
not run again. A finished study is never touched.
"""

import json
import math
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, fields
from glob import escape
from importlib.metadata import version
from itertools import compress, groupby, pairwise, product
from operator import index
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import numpy as np
import torch

from deeplimit._anatomy.checks import check_number, shown
from deeplimit.errors import InputError, RunError
from deeplimit.files import new_folder, remove, write_text
from deeplimit.memory import OBJECTS, require
from deeplimit.reading import read_json
from deeplimit.records import Record, coerce, to_plain
from deeplimit.terminal import ProgressCallback, silent
from deeplimit.training.run_files import alone

STUDY, POINTS = "study.json", "points.json"

Value = TypeVar("Value")
Found = TypeVar("Found", bound=Record)
Numbers = Sequence[int] | Sequence[float]
Point = tuple[Any, ...]  # a value of each axis, in their order
Tell = Callable[..., None]  # the same of one measurement, without a fraction at its start


@dataclass(frozen=True)
class Machine:
    """The machine and versions that a result was measured with.

    Attributes:
        processor: its model.
        cores: of the machine.
        threads: that torch used.
        python, torch, deeplimit: their versions.
        gpu: its name; None where torch sees none.
    """

    processor: str
    cores: int
    threads: int
    python: str
    torch: str
    deeplimit: str
    gpu: str | None = None

    @classmethod
    def here(cls) -> "Machine":
        """Returns what this process runs on.

        >>> Machine.here().cores > 0
        True
        """
        return cls(
            processor=_processor(),
            cores=os.cpu_count() or 0,
            threads=torch.get_num_threads(),
            python=platform.python_version(),
            torch=torch.__version__,
            deeplimit=version("deeplimit"),
            gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        )


def _processor() -> str:
    with suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor()


def machine() -> dict[str, str | int]:
    """Returns it as plain values, to be stored beside the figures of a benchmark."""
    return {name: value for name, value in vars(Machine.here()).items() if value is not None}


@dataclass(frozen=True)
class Study(Generic[Value, Found]):
    """An experiment over axes.

    Attributes:
        name: of its folder.
        record: the class of its record, a dataclass.
        axes: their values, by their names, from the slowest to the fastest.
        settings: all else that decides what is measured at a point, by name. Axes and settings that
            are fields of the record go into it.
        value: the annotation of what is measured at a point, as `records` reads it.
        measure: measures one point, or the points that differ in the axes of `together` alone. It
            is given the study's folder, and what shows what is done now, and the fraction done.
        result: makes the record's other fields of all points; theory's ranges and the verdict come
            in here.
        together: the axes whose points are measured in one call.
        cost: of a point, relative to that of the others.
    """

    name: str
    record: Callable[..., Found]
    axes: Mapping[str, Sequence[Any]]
    settings: Mapping[str, Any]
    value: Any
    measure: Callable[[Sequence[Point], Path, Tell], Sequence[Value]]
    result: Callable[[Mapping[Point, Value], Path], Mapping[str, Any]]
    together: tuple[str, ...] = ()
    cost: Callable[[Point], float] = lambda _: 1.0

    def groups(self) -> list[list[Point]]:
        """Returns the points of each call."""
        alone = [name not in self.together for name in self.axes]
        every = product(*self.axes.values())
        return [list(points) for _, points in groupby(every, lambda p: [*compress(p, alone)])]

    def plain_settings(self) -> dict[str, Any]:
        """Returns all that a point's value depends on, as JSON holds it."""
        versions = {"torch": torch.__version__, "deeplimit": version("deeplimit")}
        plain: dict[str, Any] = json.loads(json.dumps(to_plain({**self.settings, **versions})))
        return plain

    def write(self, folder: Path, known: Mapping[Point, Value]) -> None:
        """Keeps what is known in a folder."""
        points = [[list(point), to_plain(value)] for point, value in known.items()]
        kept = {"settings": self.plain_settings(), "points": points}
        write_text(folder / POINTS, json.dumps(kept, allow_nan=False) + "\n")


def run_study(study: Study[Value, Found], runs: Path, progress: ProgressCallback = silent) -> Found:
    """Measures all points, keeps each, and leaves study.json in the study's folder in `runs`."""
    groups = study.groups()
    total = sum(study.cost(point) for group in groups for point in group)
    with _folder(study, Path(runs), progress) as (folder, known):
        done = 0.0
        for group in groups:
            share = sum(map(study.cost, group)) / total

            def tell(message: str, part: float = 0.0, at: float = done, to: float = share) -> None:
                progress(message, at + to * part)

            if missing := [point for point in group if point not in known]:
                known |= zip(missing, study.measure(missing, folder, tell), strict=True)
                study.write(folder, known)
            done += share
        names = {field.name for field in fields(cast(Any, study.record))}
        axes = {name: tuple(values) for name, values in study.axes.items()}
        own = {name: value for name, value in {**study.settings, **axes}.items() if name in names}
        own |= study.result(known, folder)
        record = study.record(folder=str(folder), machine=Machine.here(), **own)
        write_text(folder / STUDY, record.to_json() + "\n")
    return record


@contextmanager
def _folder(
    study: Study[Value, Found], runs: Path, progress: ProgressCallback
) -> Iterator[tuple[Path, dict[Point, Value]]]:
    """The study's folder, held for writing, and what is known; gone if nothing was found in it."""
    there = runs.exists()
    with ExitStack() as held:
        folder, known = _unfinished(study, runs, held)
        if folder is None:
            folder = new_folder(runs, study.name, lambda aside, _: study.write(aside, {}))
            held.enter_context(alone(folder))
        else:
            progress(f"{folder} goes on: {len(known)} points are there", 0.0)
        try:
            yield folder, known
        except BaseException:
            if not known and {path.name for path in folder.iterdir()} <= {POINTS, ".lock"}:
                remove(folder)
                if not there:
                    with suppress(OSError):  # somebody else's runs are in it by now
                        runs.rmdir()
            raise


def _unfinished(
    study: Study[Value, Found], runs: Path, held: ExitStack
) -> tuple[Path | None, dict[Point, Value]]:
    """The folder of the same study, interrupted, that nobody is working on; held from now on."""
    for path in sorted(runs.glob(f"{escape(study.name)}*/{POINTS}")):
        if (path.parent / STUDY).exists():
            continue
        there = read_json(path, f"remove {path.parent}, then run the study again")
        if there.get("settings") == study.plain_settings():
            with suppress(RunError):
                held.enter_context(alone(path.parent))
                points = there["points"]
                return path.parent, {tuple(p): coerce(study.value, v, str(path)) for p, v in points}
    return None, {}


def whole(name: str, values: Any) -> tuple[int, ...]:
    """Returns whole numbers, of a list or an array, as Python's own; raises InputError for others.

    >>> whole("depths", [8, 16])
    (8, 16)
    """
    try:
        return tuple(map(index, np.ravel(values).tolist()))
    except (TypeError, ValueError):
        raise InputError(
            f"{name} {shown(values)} given; expected whole numbers, such as (8, 16)"
        ) from None


def check_once(name: str, values: Sequence[Any]) -> None:
    """Raises InputError unless there is at least one value, each once."""
    if not values or len(set(values)) < len(values):
        raise InputError(f"{name} {_listed(values)} given; expected at least one, each once")


def check_rising(
    name: str, values: Numbers, expected: str, *, least: float = 0.0, count: int = 1
) -> None:
    """Raises InputError unless finite values rise from `least` on, `count` of them or more."""
    rising = all(a < b for a, b in pairwise(values))
    if len(values) < count or not rising or not all(least <= v < math.inf for v in values):
        raise InputError(f"{name} {_listed(values)} given; expected {expected}")


def check_positive(**numbers: float) -> None:
    """Raises InputError unless all are numbers above 0."""
    for name, value in numbers.items():
        said = f"the {name.replace('_', ' ')}"
        check_number(said, value, "a number above 0", lambda v: 0 < v < math.inf)


def check_fits(depth: int, numbers: int, *, modules: bool = True) -> None:
    """Raises InputError unless `depth` layers of so many float64 each fit into memory at once."""
    size = depth * (8 * numbers + modules * OBJECTS)
    require(size, f"networks of {depth} layers do not fit into memory", "give smaller numbers")


def _listed(values: Sequence[Any]) -> str:
    return " ".join(map(str, values)) or "(none)"
