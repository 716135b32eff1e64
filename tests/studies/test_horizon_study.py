"""The horizon study on small networks: what it varies, what it keeps, what it counts."""

import contextlib
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from deeplimit.cli import main
from deeplimit.errors import InputError
from deeplimit.records import from_plain
from deeplimit.report.studies import horizon_table
from deeplimit.studies import HorizonRuns, HorizonStudy, horizon, horizon_recipe, study_horizon
from deeplimit.studies.horizon import judged
from deeplimit.training import Recipe, RunFolder, profile_run, recipe_for, train

SMALL = replace(
    recipe_for("digits"),
    depth=(2,),
    width=16,
    hidden=32,
    epochs=2,
    batch_size=128,
    learning_rate=1e-2,
    stage_cost=0.3,
    control_cost=1e-4,
    device="cpu",
)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> HorizonStudy:
    runs = tmp_path_factory.mktemp("study")
    return study_horizon(SMALL, seeds=(3, 1), runs=runs, quiet=True)


def folders(study: HorizonStudy) -> list[list[RunFolder]]:
    return [
        [RunFolder.open(Path(study.folder) / name) for name in depth.runs] for depth in study.depths
    ]


def test_the_stage_cost_is_the_same_from_the_first_step_to_the_last() -> None:
    """The bound is on what a constant one reaches; the recipe of mazes lets it grow."""
    assert recipe_for("mazes").stage_cost_grows
    assert not horizon_recipe("mazes").stage_cost_grows


@pytest.mark.slow
def test_only_depth_and_seed_differ(study: HorizonStudy) -> None:
    """Step size and costs per layer above all: they are what the theorem holds fixed."""
    recipes = [[folder.recipe for folder in row] for row in folders(study)]
    assert recipes == [
        [replace(SMALL, depth=(layers,), seed=seed) for seed in (3, 1)] for layers in (2, 4, 8)
    ]
    assert [depth.horizon for depth in study.depths] == [2, 4, 8]
    assert (study.step, study.stage_cost, study.control_cost) == (1.0, 0.3, 1e-4)
    assert (study.data, study.epochs, study.seeds, study.softness) == ("digits", 2, (3, 1), 0.05)


def test_the_counts_are_those_of_the_runs(study: HorizonStudy) -> None:
    for depth, row in zip(study.depths, folders(study), strict=True):
        for i, folder in enumerate(row):
            profiles = folder.profiles()
            assert profiles is not None
            distances = profiles.test.distance
            assert len(distances) == depth.horizon + 1
            assert depth.outside[i] == sum(d > study.radius for d in distances)
            assert depth.entry[i] == profiles.test.entry(study.radius)
            assert depth.accuracy[i] == profiles.test.accuracy[-1]
    assert study.radius == pytest.approx(0.97556, abs=1e-5)  # 0.2·log(0.95·9/0.05)·√0.9


def test_the_study_is_kept_beside_its_runs(study: HorizonStudy) -> None:
    written = json.loads((Path(study.folder) / "study.json").read_text())
    assert from_plain(HorizonStudy, written) == study


@pytest.mark.slow
@pytest.mark.parametrize(("radius", "outside"), [(1e9, (0, 0, 0)), (0.0, (2, 3, 5))])
def test_the_radius_is_the_callers(radius: float, outside: tuple[int, ...], tmp_path: Path) -> None:
    recipe = replace(SMALL, depth=(1,), epochs=1)
    study = study_horizon(recipe, seeds=(0,), radius=radius, runs=tmp_path, quiet=True)
    assert tuple(depth.outside[0] for depth in study.depths) == outside
    assert study.radius == radius


@pytest.mark.slow
def test_a_study_is_never_overwritten(study: HorizonStudy) -> None:
    first = Path(study.folder)
    before = (first / "study.json").read_bytes()
    small = replace(SMALL, depth=(1,), epochs=1)
    second = study_horizon(small, seeds=(0,), runs=first.parent, quiet=True)
    assert (first.name, Path(second.folder).name) == ("horizon-digits", "horizon-digits-2")
    assert (first / "study.json").read_bytes() == before


@pytest.mark.slow
def test_stages_grow_together(tmp_path: Path) -> None:
    recipe = replace(
        recipe_for("mnist"), data="digits", depth=(1, 2), width=2, hidden=2, reduction=1, epochs=1
    )
    study = study_horizon(recipe, seeds=(0,), runs=tmp_path, quiet=True)
    assert [row[0].recipe.depth for row in folders(study)] == [(1, 2), (2, 4), (4, 8)]
    assert [depth.horizon for depth in study.depths] == [3, 6, 12]


def made(outside: tuple[tuple[int, ...], ...]) -> HorizonStudy:
    depths = tuple(
        HorizonRuns(10 * 2**i, ("a", "b"), row, (None, 4), (0.5, 0.975))
        for i, row in enumerate(outside)
    )
    return HorizonStudy("runs/h", "digits", 1.0, 0.1, 0.0, 0.05, 0.976, 300, (0, 1), depths)


def test_growth_is_of_the_means() -> None:
    study = made(((7, 8), (7, 9), (9, 9)))
    assert study.depths[0].mean_outside == 7.5
    assert study.growth == pytest.approx(18 / 15)


def test_the_table_says_it_in_a_sentence_and_in_figures() -> None:
    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=100).print(horizon_table(made(((7, 8), (7, 9), (9, 9)))))
    lines = out.getvalue().splitlines()
    assert lines[0] == (
        "From 10 to 40 layers the number outside the tube grows by a factor of 1.20."
    )
    figures = [re.findall(r"[\d.–]+", line) for line in lines]
    assert ["40", "9", "9", "9.0", "–", "4", "50.0", "97.5"] in figures
    assert "γ = 0.1" in out.getvalue()


@pytest.mark.parametrize(("seeds", "says"), [((), "none"), ((1, 1), "1 1")])
def test_seeds_must_be_there_once(seeds: tuple[int, ...], says: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=says):
        study_horizon(SMALL, seeds=seeds, runs=tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_defaults_are_those_of_the_theory_page() -> None:
    """d = 32, h = 1, γ = 0.1, 300 epochs: where 5, 5, 6 layers"""
    recipe = horizon_recipe("digits")
    assert (recipe.width, recipe.step, recipe.stage_cost, recipe.epochs) == (32, 1.0, 0.1, 300)
    assert horizon_recipe("spirals") == recipe_for("spirals")


@pytest.mark.slow
def test_the_verb(tmp_path: Path) -> None:
    """`deeplimit study horizon`: its options reach the runs, its result is the file's."""
    args = "study horizon --depth 1 --seeds 4 --stage-cost 0.2 --control-cost 0.01 --epochs 1"
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        code = main([*args.split(), "--radius", "2", "--runs", str(tmp_path), "--json"])
    assert code == 0
    printed = json.loads(out.getvalue())
    assert printed == json.loads((tmp_path / "horizon-digits" / "study.json").read_text())
    expected = replace(
        horizon_recipe("digits"), stage_cost=0.2, control_cost=0.01, epochs=1, seed=4
    )
    ran: list[Recipe] = [row[0].recipe for row in folders(from_plain(HorizonStudy, printed))]
    assert ran == [replace(expected, depth=(layers,)) for layers in (1, 2, 4)]


@pytest.mark.parametrize(
    ("outside", "accuracy", "word"),
    [
        (((7, 8, 7), (7, 9, 8), (8, 9, 8)), 0.98, "kept"),  # one of 30 layers added, three times
        (((7, 8, 7), (9, 9, 9), (14, 16, 13)), 0.98, "lost"),  # 6 to 8 of 30
        (((7, 8, 7), (7, 9, 8), (7, 12, 8)), 0.98, "unresolved"),
        (((7,), (7,), (7,)), 0.98, "unresolved"),  # one seed has no spread
        (((7, 8, 7), (7, 9, 8), (8, 9, 8)), 0.13, "nothing learnt"),
        (((7, 8, 7), (7, 9, 8), (8, 9, 8)), 0.16, "kept"),
    ],
)
def test_the_verdict_is_on_the_layers_added(
    outside: tuple[tuple[int, ...], ...], accuracy: float, word: str
) -> None:
    seeds = len(outside[0])
    depths = [
        HorizonRuns(10 * 2**i, ("r",) * seeds, row, (4,) * seeds, (accuracy,) * seeds)
        for i, row in enumerate(outside)
    ]
    # 200 samples of ten classes: chance is 0.1, a share above 0.1 + 1.645·√(0.09/200) = 0.135.
    assert judged(depths, torch.arange(200) % 10) == word


def test_the_study_carries_its_verdict(study: HorizonStudy) -> None:
    assert study.verdict in ("kept", "unresolved", "lost", "nothing learnt")
    first, last = study.depths[0], study.depths[-1]
    more = last.horizon - first.horizon
    assert study.added == pytest.approx((last.mean_outside - first.mean_outside) / more)


@pytest.mark.slow
def test_an_interrupted_study_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Stopped between a training and its profile: nothing is trained again, and all is the same."""
    recipe = replace(SMALL, depth=(1,), epochs=1)
    whole = study_horizon(recipe, seeds=(5,), runs=tmp_path / "whole", quiet=True)
    profiled, trained = [], []

    def stopped(run: RunFolder) -> object:
        profiled.append(run)
        if len(profiled) == 2:
            raise KeyboardInterrupt
        return profile_run(run)

    def counted(recipe: Recipe, **options: Any) -> RunFolder:
        trained.append(recipe.horizon)
        return train(recipe, **options)

    monkeypatch.setattr(horizon, "profile_run", stopped)
    monkeypatch.setattr(horizon, "train", counted)
    with pytest.raises(KeyboardInterrupt):
        study_horizon(recipe, seeds=(5,), runs=tmp_path, quiet=True)
    again = study_horizon(recipe, seeds=(5,), runs=tmp_path, quiet=True)
    assert trained == [4, 2, 1]
    assert replace(again, folder=whole.folder) == whole
