"""The harness of studies: what is visited, what is kept, what is not run again."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from filelock import FileLock

from deeplimit.errors import RunError
from deeplimit.records import Record
from deeplimit.studies.harness import Machine, Point, Study, Tell, run_study

BREAKS_AT = ("b", 2)


@dataclass(frozen=True)
class Sums(Record):
    """The record of a study of sums."""

    folder: str
    power: int
    numbers: tuple[int, ...]
    total: float
    machine: Machine | None = None


def study(
    visited: list[Point], *, power: int = 1, breaks: type[BaseException] | None = None
) -> Study[float, Sums]:
    def measure(points: Sequence[Point], _: Path, tell: Tell) -> list[float]:
        if BREAKS_AT in points and breaks is not None:
            raise breaks("broken")
        tell(f"letter {points[0][0]}", 0.5)
        visited.extend(points)
        return [number**power / 3 for _, number in points]

    return Study(
        name="sums",
        record=Sums,
        axes={"letters": ("a", "b"), "numbers": (1, 2, 3)},
        settings={"power": power},
        value=float,
        measure=measure,
        result=lambda found, _: {"total": sum(found.values())},
        cost=lambda point: point[1],
    )


def test_all_points_in_their_order_and_the_record_of_them(tmp_path: Path) -> None:
    visited: list[Point] = []
    told: list[tuple[str, float]] = []
    found = run_study(study(visited), tmp_path, lambda *said: told.append(said))
    assert visited == [(letter, number) for letter in "ab" for number in (1, 2, 3)]
    assert (found.folder, found.power, found.numbers) == (str(tmp_path / "sums"), 1, (1, 2, 3))
    assert found.total == pytest.approx(4)
    assert found.machine == Machine.here()
    assert Sums.from_json((tmp_path / "sums" / "study.json").read_text()) == found
    assert told[4] == ("letter b", pytest.approx((6 + 1 + 1) / 12))  # 6 + 1 of 12 done, and half 2


def test_points_that_differ_in_an_axis_may_be_measured_together(tmp_path: Path) -> None:
    visited: list[Point] = []
    at_once = study(visited)
    calls: list[int] = []

    def measure(points: Sequence[Point], folder: Path, tell: Tell) -> Sequence[float]:
        calls.append(len(points))
        return at_once.measure(points, folder, tell)

    both = Study(**(vars(at_once) | {"measure": measure, "together": ("numbers",)}))
    assert run_study(both, tmp_path).total == pytest.approx(4)
    assert calls == [3, 3]


@pytest.mark.parametrize("how", [KeyboardInterrupt, RunError])
def test_an_interrupted_study_goes_on(how: type[BaseException], tmp_path: Path) -> None:
    first: list[Point] = []
    with pytest.raises(how):
        run_study(study(first, breaks=how), tmp_path)
    assert first == [("a", 1), ("a", 2), ("a", 3), ("b", 1)]
    assert not (tmp_path / "sums" / "study.json").exists()
    second: list[Point] = []
    told: list[str] = []
    found = run_study(study(second), tmp_path, lambda message, _: told.append(message))
    assert second == [("b", 2), ("b", 3)]
    assert told[0] == f"{tmp_path / 'sums'} goes on: 4 points are there"
    assert found.total == pytest.approx(4)
    assert [path.name for path in tmp_path.iterdir()] == ["sums"]


def test_other_settings_and_a_finished_study_are_left_alone(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_study(study([], breaks=KeyboardInterrupt), tmp_path)
    before = (tmp_path / "sums" / "points.json").read_bytes()
    visited: list[Point] = []
    assert run_study(study(visited, power=2), tmp_path).folder == str(tmp_path / "sums-2")
    assert len(visited) == 6
    assert (tmp_path / "sums" / "points.json").read_bytes() == before
    run_study(study([]), tmp_path)
    again = run_study(study([]), tmp_path)
    assert again.folder == str(tmp_path / "sums-3")
    assert json.loads((tmp_path / "sums" / "study.json").read_text())["power"] == 1


def test_a_study_that_another_process_works_on_is_not_taken(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_study(study([], breaks=KeyboardInterrupt), tmp_path)
    with FileLock(tmp_path / "sums" / ".lock"):
        assert run_study(study([]), tmp_path).folder == str(tmp_path / "sums-2")


def test_where_nothing_was_found_nothing_is_left(tmp_path: Path) -> None:
    broken = study([], breaks=RunError)
    with pytest.raises(RunError):
        run_study(Study(**(vars(broken) | {"axes": {"letters": "b", "numbers": (2,)}})), tmp_path)
    assert not list(tmp_path.iterdir())


SCRIPT = """
from pathlib import Path
from tempfile import mkdtemp
import numpy as np
from deeplimit.studies import study_consistency, study_convergence, study_linear, study_smooth

runs = mkdtemp()
linear = {"depths": (2, 4), "seeds": (0,), "steps": 1, "runs": runs}
found = study_linear(**linear | {"depths": np.array([2, 4]), "seeds": 0})
assert (found.depths, found.seeds) == ((2, 4), (0,))
assert type(found).from_json(Path(found.folder, "study.json").read_text()) == found
wrong = [{"depths": (2.5, 4)}, {"depths": "24"}, {"seeds": (0.5,)}, {"steps": 1.5}, {"steps": "1"}]
calls = [lambda f=f, w=w: f(**linear | w) for f in (study_linear, study_smooth) for w in wrong]
wrong = [{"widths": (4.5,)}, {"seeds": "a"}, {"depth": 2.5}, {"samples": "8"}]
calls += [lambda w=w: study_convergence(**{"runs": runs} | w) for w in wrong]
sizes = {"depths": (2, 3, 4), "widths": (4, 8, 12), "atoms": 4, "runs": runs}
wrong = [{"depths": (2, 3, 4.5)}, {"widths": (4, 8, None)}, {"atoms": 2.5}, {"seeds": 0.5}]
calls += [lambda w=w: study_consistency(**sizes | w) for w in wrong]
"""


@pytest.mark.slow
def test_numbers_that_are_not_whole_are_refused(refused_calls: Callable[[str], None]) -> None:
    """In a process where nothing checks annotations; an array, and a single seed, are taken."""
    refused_calls(SCRIPT)
