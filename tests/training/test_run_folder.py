"""The run folder: never overwritten, whole or not there, and damage is named."""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deeplimit.control import (
    CropResult,
    CutChoice,
    DepthCosts,
    DepthTable,
    TrajectoryPicture,
    TurnpikeProfile,
)
from deeplimit.errors import InputError, RunError
from deeplimit.files import write_text, write_whole
from deeplimit.training import Cut, Profiles, Recipe, Reference, RunFolder, recipe_for
from deeplimit.training.progress import COLUMNS, Row, from_csv, to_csv
from deeplimit.training.verifying import verify_run

PROFILE = TurnpikeProfile(
    samples=3,
    classes=2,
    softness=0.05,
    minimum=0.1985152433458726,
    loss=(0.7, 1 / 3),
    accuracy=(0.5, 1.0),
    distance=(2.0, 0.1 + 0.2),
    class_distance=((2.0, math.nan), (0.3, math.nan)),
    relative_update=(math.inf,),
    loss_error=(0.1, 0.0),
    accuracy_error=(1e-17, 0.0),
)
REPORT = CropResult(3, 2, 1, 1.0, 1.0, 0.0, 0.4, 0.5, 1.0, 20, 10, 200, 100, 2e-3, 1e-3, 3, "cpu")
COSTS = DepthCosts((10, 20), (100, 200), (1e-3, 2e-3), 3, "cpu", 1)
TABLE = DepthTable(**vars(PROFILE), costs=COSTS, recommended=1)
PICTURE = TrajectoryPicture(
    points=(((0.0, 1.5), (2.0, 3.0)),),
    labels=(0, 1),
    plane="state",
    explained=1.0,
    minimisers=(((0.0, 0.0), (1.0, 1.0)), ((0.0, 1.0), (1.0, 0.0))),
)


def new(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "runs", None, recipe_for("spirals"), ("inner", "outer"))


def test_an_existing_run_is_never_touched(tmp_path: Path) -> None:
    names = [new(tmp_path).path.name for _ in range(3)]
    assert names == ["spirals", "spirals-2", "spirals-3"]
    other = RunFolder.create(tmp_path / "runs", "spirals", replace(recipe_for("spirals"), seed=9))
    assert other.path.name == "spirals-4"
    assert RunFolder.open(tmp_path / "runs" / "spirals").recipe.seed == 0
    assert RunFolder.open(other.path) == other


@pytest.mark.slow
def test_runs_made_at_once_never_share_a_folder(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda _: new(tmp_path).path, range(24)))
    assert len(set(paths)) == 24
    assert all((path / "recipe.toml").is_file() for path in paths)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ("hub:owner/Some.Images", "Some"),
        ("npz:../folder/my set.npz", "my-set"),
        ("npz:x", "x"),
        ("npz:..", "run"),
    ],
)
def test_the_folder_is_named_after_the_data(data: str, name: str, tmp_path: Path) -> None:
    assert RunFolder.create(tmp_path, None, recipe_for(data)).path.name == name


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\0b"])
def test_a_name_that_is_no_folder_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be a folder's"):
        RunFolder.create(tmp_path, name, Recipe())


def test_a_place_that_cannot_hold_runs_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="a file is in the way"):
        RunFolder.create(tmp_path / "file", "a", Recipe())
    with pytest.raises(InputError, match="no run folder can be made there"):
        RunFolder.create(tmp_path / "file" / "below", "a", Recipe())
    with pytest.raises(InputError, match="no run folder can be made there"):
        RunFolder.create("/proc/deeplimit", "a", Recipe())  # writable for nobody, root included


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        RunFolder.open(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"no recipe\.toml in it"):
        RunFolder.open(tmp_path)
    folder = new(tmp_path)
    recipe = folder.path / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("format = 1", "format = 7"))
    with pytest.raises(InputError, match="format 7, this deeplimit reads 1"):
        RunFolder.open(folder.path)


def test_an_unfinished_run_has_no_network(tmp_path: Path) -> None:
    folder = new(tmp_path)
    with pytest.raises(InputError, match="deeplimit train --resume"):
        folder.model()
    with pytest.raises(InputError, match="deeplimit crop"):
        folder.cropped()


def test_results_come_back_exactly(tmp_path: Path) -> None:
    folder = new(tmp_path)
    empty = folder.results()
    assert empty.name == "spirals"
    assert empty.class_names == ("inner", "outer")
    assert empty.recipe["kind"] == "logit"
    assert (empty.metrics, empty.profiles, empty.picture) == ((), None, None)
    assert (empty.cut, empty.reference) == (None, None)
    cut, reference = Cut((1,), 0.005, REPORT), Reference(PROFILE, REPORT)
    folder.write(Profiles(PROFILE, PROFILE, TABLE))
    folder.write(PICTURE)
    folder.write(cut)
    folder.write(reference)
    row: Row = dict.fromkeys(COLUMNS, 0.1) | {"epoch": 1.0, "entry": None}
    folder.write_metrics([row])
    results = RunFolder.open(folder.path).results()
    assert results.picture == PICTURE
    assert results.cut == cut
    assert results.metrics == (row,)
    assert results.profiles is not None
    assert results.reference is not None
    assert results.reference.report == REPORT
    for profile in (results.profiles.validation, results.reference.test):
        assert repr(profile) == repr(PROFILE)  # NaN and all
    assert repr(results.profiles.test) == repr(TABLE)


def test_fields_that_may_be_none_may_be_left_out(tmp_path: Path) -> None:
    """Profiles without influence, cuts without a choice; and both with."""
    folder = new(tmp_path)
    choice = CutChoice((1,), "trial", "blocks", 1.0, (1, 1), (1, 0), 9, 0.5, 0.25, 0.1, 20, 10)
    for profile, cut in (
        (PROFILE, Cut((1,), 0.005, REPORT)),
        (replace(PROFILE, influence=(0.25,)), Cut((1,), None, REPORT, choice)),
    ):
        profiles = Profiles(profile, profile, DepthTable(**vars(profile)))
        folder.write(profiles)
        folder.write(cut)
        assert repr(folder.profiles()) == repr(profiles)
        assert folder.cut() == cut
        for name, field in (("profile.json", "influence"), ("crop.json", "choice")):
            if cut.choice is None:
                text = (folder.path / name).read_text()
                assert f', "{field}": null' in text
                for one in (field, "costs", "recommended"):
                    text = text.replace(f', "{one}": null', "")
                (folder.path / name).write_text(text)
        assert not verify_run(folder.path, accepting=True).wrong
        assert repr(folder.profiles()) == repr(profiles)
        assert folder.cut() == cut


JSON: dict[str, tuple[Callable[[RunFolder], None], Callable[[RunFolder], object]]] = {
    "profile.json": (
        lambda f: f.write(Profiles(PROFILE, PROFILE, TABLE)),
        RunFolder.profiles,
    ),
    "trajectories.json": (lambda f: f.write(PICTURE), RunFolder.picture),
    "crop.json": (lambda f: f.write(Cut((1,), 0.005, REPORT)), RunFolder.cut),
    "reference.json": (
        lambda f: f.write(Reference(PROFILE, REPORT)),
        RunFolder.reference,
    ),
}


@pytest.mark.parametrize("name", JSON)
def test_a_damaged_result_is_named_with_a_remedy(name: str, tmp_path: Path) -> None:
    folder = new(tmp_path)
    write, read = JSON[name]
    write(folder)
    path = folder.path / name
    whole = path.read_text()
    for damaged in (whole[: len(whole) // 2], "", "[]", "{}", whole.replace("0.05", '"0.05"')):
        if damaged == whole:
            continue
        path.write_text(damaged)
        with pytest.raises(InputError, match="damaged") as caught:
            read(folder)
        assert str(path) in str(caught.value)
        assert "write it again: deeplimit" in str(caught.value)


finite_or_not = st.floats(allow_nan=False)
rows = st.lists(
    st.fixed_dictionaries(dict.fromkeys(COLUMNS, finite_or_not))
    | st.fixed_dictionaries({name: st.none() | finite_or_not for name in COLUMNS})
)


@pytest.mark.slow
@given(rows=rows, entry=st.none() | st.integers(0, 99).map(float))
def test_metrics_come_back_exactly(rows: list[Row], entry: float | None) -> None:
    numbered: list[Row] = [
        row | {"epoch": float(i + 1), "entry": entry} for i, row in enumerate(rows)
    ]
    assert from_csv(to_csv(numbered)) == tuple(numbered)


@pytest.mark.parametrize("damage", ["", "epoch,loss\n1,2\n", "half a row", "not a number"])
def test_damaged_metrics_are_named(damage: str, tmp_path: Path) -> None:
    folder = new(tmp_path)
    row: Row = dict.fromkeys(COLUMNS, 0.125) | {"epoch": 1.0, "entry": 2.0}
    folder.write_metrics([row, row])
    path = folder.path / "metrics.csv"
    text = path.read_text()
    changed = {"half a row": text[: text.rindex("0.125,0.125")], "not a number": text + "1,x,,,,,,"}
    path.write_text(changed.get(damage, damage))
    with pytest.raises(InputError, match=r"metrics\.csv: damaged"):
        folder.metrics()


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "old")

    def fail(file: object) -> None:
        file.write(b"half of the n")  # type: ignore[attr-defined]
        raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match="No space left on device; free some space"):
        write_whole(path, fail)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
