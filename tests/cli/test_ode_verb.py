"""`deeplimit ode`: what it measures is what Python measures; the page; wrong input in one line."""

import html
import json
from pathlib import Path

import pytest
from cli_commands import command, contents

from deeplimit.ode import DepthLimit, discretization_gap, smoothness, solver_accuracies
from deeplimit.records import from_plain
from deeplimit.training import RunFolder, run_data
from deeplimit.training.building import evaluation_batches

pytestmark = pytest.mark.slow

NET = """
import torch
from deeplimit import ResidualChain
from deeplimit.network.blocks import TwoLayerResidual

def build():
    torch.manual_seed(0)
    return ResidualChain([TwoLayerResidual(8, 16, "tanh") for _ in range(4)], step=0.25)

def one():
    return ResidualChain([TwoLayerResidual(8, 16, "tanh")])
"""


def test_a_run_gets_its_figures_and_its_page(run: Path) -> None:
    done = command("ode", run, "--json")
    assert done.code == 0, done.err
    assert done.err == ""
    found = from_plain(DepthLimit, json.loads(done.out))
    folder = RunFolder.open(run)
    assert folder.depth_limit() == found
    model, test = folder.model(), run_data(folder).test
    assert found.smoothness == smoothness(model)
    x, _ = next(iter(evaluation_batches(test.take(32))))
    assert found.gaps[0] == discretization_gap(model, x)
    asked = [(row.solver, row.steps) for row in found.solvers[1:]]
    assert asked == [("euler", 1), ("euler", 6), ("rk4", 1), ("dopri5", None)]
    assert found.solvers == solver_accuracies(model, evaluation_batches(test), asked)
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "The limit of infinite depth" in page
    assert found.smoothness.verdict in html.unescape(page)
    assert "smoothness-0-data" in page


def test_the_terminal_tells_the_verdict_first(run: Path) -> None:
    done = command("ode", run, "--solver", "rk4", "--steps", "1", "3")
    assert done.code == 0, done.err
    folder = RunFolder.open(run).depth_limit()
    assert folder is not None
    words = " ".join(done.out.split())
    assert words.startswith(folder.smoothness.verdict)
    assert [row.steps for row in folder.solvers] == [3, 1, 3]
    assert "The page is at" in done.out
    assert "measuring: smoothness in depth" in done.err


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with the user's ode_nets.py."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "ode_nets.py").write_text(NET)
    return tmp_path


def test_a_model_and_a_figure(here: Path) -> None:
    figure = here / "ode.html"
    done = command("ode", "ode_nets:build", "--shape", "8", "--figure", figure, "--json")
    assert done.code == 0, done.err
    found = from_plain(DepthLimit, json.loads(done.out))
    assert found.gaps[0].horizon == 4
    assert found.solvers == ()
    assert found.gaps[0].bound is not None
    words = command("ode", "ode_nets:build", "--shape", "8")
    assert "the bounds: Lipschitz constants, layer 1 of 4" in words.err
    less = command("ode", "ode_nets:build", "--shape", "8", "--no-bound", "--json")
    (gap,) = from_plain(DepthLimit, json.loads(less.out)).gaps
    assert (gap.bound, gap.integral_bound, gap.lipschitz) == (None, None, None)
    assert gap.gap == found.gaps[0].gap
    text = figure.read_text(encoding="utf-8")
    assert text.count("plotly-graph-div") == 3
    assert "Distance to the Neural ODE" in text


WRONG = [
    (["ode_nets:one", "--shape", "8"], "no stage of two layers or more"),
    (["ode_nets:build", "--shape", "8", "--solver", "rk4"], "--solver given for ode_nets:build"),
    (["ode_nets:build", "--shape", "8", "--batch", "0"], "batch is 0"),
    (["ode_nets:build", "--shape", "8", "--tolerance", "1"], "--tolerance given for"),
    (["ode_nets:build", "--shape", "8", "--figure", "no/such.html"], "there is no folder no"),
    (["ode_nets:build", "--shape", "x"], "expected sizes such as 3,224,224"),
    (["nowhere"], "nowhere"),
]


@pytest.mark.parametrize(("words", "said"), WRONG)
def test_wrong_input_is_one_line(here: Path, words: list[str], said: str) -> None:
    before = contents(here)
    done = command("ode", *words)
    assert done.code == 2
    assert said in done.err
    assert len(done.err.strip().splitlines()) <= 2
    assert contents(here) == before


WRONG_FOR_A_RUN = [
    (["--steps", "3"], "--steps given without --solver"),
    (["--solver", "rk9", "--steps", "3"], "the solver is 'rk9'"),
    (["--solver", "dopri5", "--steps", "3"], "dopri5 chooses its own"),
    (["--solver", "euler"], "euler needs at least 1"),
    (["--shape", "8"], "--shape given, but"),
    (["--solver", "dopri5", "--tolerance", "0"], "tolerance is 0.0"),
    (["--tolerance", "-1"], "tolerance is -1.0"),
    (["--solver", "rk4", "--steps", "2", "--tolerance", "0.1"], "rk4 takes steps of one size"),
    (["--solver", "dopri5", "--tolerance", "nan"], "tolerance is nan"),
]


@pytest.mark.parametrize(("words", "said"), WRONG_FOR_A_RUN)
def test_wrong_input_leaves_a_run_alone(run: Path, words: list[str], said: str) -> None:
    before = contents(run)
    done = command("ode", run, *words)
    assert done.code == 2, done.out
    assert said in done.err
    assert contents(run) == before
