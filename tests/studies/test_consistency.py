"""The study of consistency: draws, the flow against plain descent, slopes, the verb."""

import contextlib
import io
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from plotly.subplots import make_subplots
from torch import Tensor

from deeplimit.cli import main
from deeplimit.errors import InputError
from deeplimit.meanfield import LayerwiseMeasure, cot_distance
from deeplimit.records import from_plain
from deeplimit.report.studies import consistency_figures
from deeplimit.report.style import logarithmic_panels
from deeplimit.studies import ConsistencyStudy, study_consistency
from deeplimit.studies.consistency import SPREAD, STATE, Problem
from deeplimit.studies.convergence import flow, network_of

TINY = {"depths": (2, 4, 8), "widths": (8, 16, 32), "atoms": 4, "draws": 2, "time": 0.3}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> ConsistencyStudy:
    return study_consistency(**TINY, seeds=(0, 1), runs=tmp_path_factory.mktemp("runs"))


def naive_flow(particles: Tensor, x: Tensor, y: Tensor, rate: float, steps: int) -> Tensor:
    """Every particle by −N·M·∂L/∂ω, the network written out."""
    horizon, width, _ = particles.shape
    omega = particles.clone().requires_grad_()
    for _ in range(steps):
        state = x
        for layer in omega:
            u, w, b = layer.split([STATE, STATE, 1], dim=1)
            state = state + torch.tanh(state @ w.T + b[:, 0]) @ u / (width * horizon)
        risk = (state - y).square().sum() / (2 * len(x))
        (gradient,) = torch.autograd.grad(risk, omega)
        omega = (omega - rate * horizon * width * gradient).detach().requires_grad_()
    return omega.detach()


def test_the_flow_moves_particles_by_their_scaled_gradient() -> None:
    problem = Problem.of(3, 4)
    particles = problem.particles("independent", 3, 8, 0)
    model = network_of(particles)
    flow(model, problem.x, problem.y, 0.2, 5)
    expected = naive_flow(particles, problem.x, problem.y, 0.2, 5)
    assert torch.allclose(LayerwiseMeasure.of(model).particles, expected, rtol=1e-9, atol=1e-11)


def _drawn_elsewhere(problem: Problem) -> torch.Tensor:
    """The same measure and draw, but for the seed."""
    return replace(problem, seed=1).particles("independent", 2, 4000, 1)


def test_what_is_drawn() -> None:
    problem = Problem.of(0, 4)
    atoms = problem.particles("atoms", 6, 12, 0)
    assert torch.equal(atoms[:, :4], atoms[:, 8:])
    at_zero = problem.centres(6)[0]
    assert torch.equal(at_zero, problem.cosine)
    finer = problem.centres(12)
    assert torch.equal(finer[::2], problem.centres(6))  # one curve, whatever N
    tied = problem.particles("tied", 6, 4000, 0) - problem.particles("tied", 6, 4000, 0)[0]
    moved = problem.centres(6) - problem.centres(6)[0]
    nearest = (tied[3][:, None] - moved[3][None]).norm(dim=2).min(1).values
    assert float(nearest.max()) < 1e-12  # each follows its atom
    spread = problem.particles("independent", 2, 4000, 1)
    assert not torch.equal(spread[0], spread[1])
    for other in (problem.particles("independent", 2, 4000, 2), _drawn_elsewhere(problem)):
        assert not torch.isin(spread, other).any()  # of another draw, and of another seed
    residual = (spread[0][:, None] - at_zero[None]).norm(dim=2).min(1).values.square().mean()
    assert float(residual) == pytest.approx(SPREAD**2 * (2 * STATE + 1), rel=0.05)


@pytest.mark.slow
def test_values_are_those_of_the_networks(study: ConsistencyStudy) -> None:
    problem, found = Problem.of(1, 4), []
    for n, m in ((4, 16), (8, 32)):
        particles = naive_flow(problem.particles("atoms", n, m, 0), problem.x, problem.y, 0.1, 3)
        found.append(LayerwiseMeasure(particles))
    expected = cot_distance(*found).distance
    assert study.rate("distance", "atoms").values[1][1] == pytest.approx(expected, rel=1e-7)
    before = problem.particles("independent", 4, 16, 0)
    after = naive_flow(before, problem.x, problem.y, 0.1, 3)
    moved = cot_distance(LayerwiseMeasure(before), LayerwiseMeasure(after)).distance
    assert study.rate("travelled", "independent").values[1][1] == pytest.approx(moved, rel=1e-7)
    apart = []
    for draw in (0, 1):
        outputs = []
        for n, m in ((2, 8), (4, 16)):
            start = problem.particles("tied", n, m, draw)
            model = network_of(naive_flow(start, problem.x, problem.y, 0.1, 3))
            with torch.no_grad():
                outputs.append(model(problem.seen))
        apart.append((outputs[0] - outputs[1]).square().sum(1))
    root = math.sqrt(float(torch.cat(apart).mean()))
    assert study.rate("output", "tied").values[1][0] == pytest.approx(root, rel=1e-7)


def test_what_falls_and_what_stays(study: ConsistencyStudy) -> None:
    assert study.rate("distance", "atoms").within
    assert study.rate("travelled", "independent").within
    assert study.rate("unscaled", "independent").within
    kept = json.loads((Path(study.folder) / "study.json").read_text())
    assert from_plain(ConsistencyStudy, kept) == study
    ((_, figure, _),) = consistency_figures(study)
    curve = next(t for t in figure.data if t.name == "steps not scaled")
    values = study.rate("unscaled", "independent").values
    assert list(curve.y) == pytest.approx([math.sqrt(a * b) for a, b in zip(*values, strict=True)])


def test_every_panel_has_ticks_among_its_own_values() -> None:
    """Between two powers of ten too, whatever the other panel shows."""
    figure = make_subplots(rows=1, cols=2)
    figure.add_scatter(y=[2.1, 3.0, 7.0], row=1, col=1)
    figure.add_scatter(y=[1e-4, 1.0, 30.0], row=1, col=2)
    logarithmic_panels(figure)
    left, right = figure.select_yaxes()
    assert [tick for tick in left.tickvals if 2.1 <= tick <= 7.0] == [5]
    assert {1e-4, 1e-2, 1.0} <= set(right.tickvals)
    assert (left.type, right.type) == ("log", "log")


@pytest.mark.slow
def test_the_verb(tmp_path: Path) -> None:
    words = ["study", "consistency", "--depths", "2", "3", "4", "--widths", "4", "8", "12"]
    words += ["--atoms", "4", "--draws", "1", "--seeds", "0", "--time", "0.1"]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert main([*words, "--runs", str(tmp_path)]) == 0
    assert "of 5 slopes are where the theory says" in out.getvalue()
    assert "training: seed 0, N = 2, M = 4" in err.getvalue()
    assert (tmp_path / "consistency" / "study.html").is_file()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"depths": (2, 4)}, "expected at least three sizes"),
        ({"widths": (8, 16)}, "a width for each depth"),
        ({"depths": (4, 2, 8)}, "from the smallest to the largest"),
        ({"atoms": 3}, "a number that divides every width"),
        ({"draws": 0}, "draws is 0"),
        ({"time": 0.01}, "less than one step"),
        ({"learning_rate": math.nan}, "the learning rate is nan"),
        ({"seeds": ()}, "expected at least one"),
    ],
)
def test_wrong_input(changed: dict, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        study_consistency(**(TINY | changed), runs=tmp_path)
    assert not list(tmp_path.iterdir())
