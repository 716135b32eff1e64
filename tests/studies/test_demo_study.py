"""The demo: the network, its control, and the figures that it has to reach."""

import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest

from deeplimit.cli import main
from deeplimit.studies import run_demo
from deeplimit.training import RunFolder, crop_run, profile_run, recipe_for

pytestmark = pytest.mark.slow


SMALL = replace(
    recipe_for("digits"),
    control="plain",
    depth=(4,),
    hidden=16,
    epochs=3,
    learning_rate=1e-2,
    stage_cost=1.0,
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return run_demo(SMALL, runs=tmp_path_factory.mktemp("runs"), quiet=True)


def test_the_control_differs_in_stage_cost_and_depth_alone(demo: RunFolder) -> None:
    small, folder, runs = SMALL, demo, demo.path.parent
    assert folder.path.name == "demo"
    assert folder.recipe == small
    cut, reference = folder.cut(), folder.reference()
    assert cut is not None
    assert reference is not None
    assert cut.removed
    depth = cut.report.horizon_after
    control = RunFolder.open(runs / "demo-without-stage-cost")
    plain = replace(small, stage_cost=0.0, control="none")
    assert control.recipe == plain
    assert RunFolder.open(runs / f"demo-plain-{depth}").recipe == replace(plain, depth=(depth,))

    profile = profile_run(control).test
    assert vars(reference.test).items() <= vars(profile).items()
    again = crop_run(control, depth).report
    assert reference.report.horizon_after == depth
    assert reference.report.accuracy_before == again.accuracy_before
    assert reference.report.accuracy_after == again.accuracy_after


def test_a_second_demo_leaves_the_first_alone(demo: RunFolder) -> None:
    before = {path: path.read_bytes() for path in demo.path.iterdir() if path.is_file()}
    second = run_demo(SMALL, runs=demo.path.parent, quiet=True)
    assert before == {path: path.read_bytes() for path in demo.path.iterdir() if path.is_file()}
    assert second.path.name == "demo-2"
    assert {path.name for path in demo.path.parent.iterdir()} >= {
        "demo",
        "demo-without-stage-cost",
        "demo-2",
        "demo-2-without-stage-cost",
    }


@pytest.mark.parametrize("seed", [0])
def test_the_demo_reaches_its_figures(seed: int, tmp_path: Path) -> None:
    """Mazes need depth: one training is as good at the cut's depth as a network of that depth."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        assert main(["demo", "--seed", str(seed), "--runs", str(tmp_path), "--json"]) == 0
    printed = json.loads(out.getvalue())
    report = printed["results"]["cut"]["report"]
    depths = printed["results"]["profiles"]["test"]["accuracy"]
    control, small = (printed["results"]["reference"][name] for name in ("report", "small"))
    assert report["horizon_before"] == 8
    assert 3 <= report["horizon_after"] <= 6
    assert report["accuracy_after"] >= 0.92
    assert report["accuracy_before"] - report["accuracy_after"] <= 0.01
    assert depths[1] < depths[-1] - 0.06
    assert depths[2] < depths[-1] - 0.02
    assert control["horizon_after"] == report["horizon_after"]
    assert control["accuracy_before"] - control["accuracy_after"] >= 0.01
    assert small["horizon_before"] == small["horizon_after"] == report["horizon_after"]
    assert small["accuracy_after"] == report["accuracy_after"]
    assert abs(small["accuracy_before"] - small["accuracy_after"]) <= 0.02
    assert small["parameters_before"] == report["parameters_after"]
    page = Path(printed["page"]).read_text()
    assert "The same network trained without stage cost loses" in page
