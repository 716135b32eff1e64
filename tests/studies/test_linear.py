"""Linear residuals: gradient, gap and slopes against naive references."""

import contextlib
import io
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from scipy.integrate import solve_ivp
from torch import Tensor

from deeplimit.cli import main
from deeplimit.errors import InputError, RunError
from deeplimit.network import LinearResidual, ResidualChain
from deeplimit.ode.discretization import discretization_gap
from deeplimit.records import from_plain
from deeplimit.report import rates_figure
from deeplimit.report.studies import rates_table
from deeplimit.studies import LinearStudy, study_linear
from deeplimit.studies.linear import (
    THEORY,
    drawn,
    first_controls,
    largest_difference,
    linear_gap,
    scaled_gradient,
    states,
)

DEPTHS, STEPS = (8, 16, 32, 64), 40


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> LinearStudy:
    runs = tmp_path_factory.mktemp("linear")
    return study_linear(depths=DEPTHS, seeds=(4, 1), steps=STEPS, runs=runs)


def chain(controls: Tensor) -> ResidualChain:
    """The same network as the library's own."""
    blocks = [LinearResidual(controls.shape[-1]).double() for _ in controls]
    for block, theta in zip(blocks, controls, strict=True):
        block.weight.data.copy_(theta)
    return ResidualChain(blocks, step=1 / len(controls))


def naive_gap(controls: Tensor) -> float:
    """scipy's solver, interval by interval, for each column of I."""
    horizon, width, _ = controls.shape
    theta = controls.numpy()
    x, y, largest = np.eye(width), np.eye(width), 0.0
    for n in range(horizon):
        left, right = theta[n], theta[min(n + 1, horizon - 1)]

        def velocity(s: float, flat: np.ndarray, left=left, right=right) -> np.ndarray:
            at = (1 - s) * left + s * right
            return (at @ flat.reshape(width, width) / horizon).ravel()

        solved = solve_ivp(velocity, (0, 1), y.ravel(), method="DOP853", rtol=1e-11, atol=1e-13)
        y = solved.y[:, -1].reshape(width, width)
        x = x + left @ x / horizon
        largest = max(largest, float(np.linalg.norm(x - y, axis=0).max()))
    return largest


def naive_training(start: str, horizon: int, seed: int) -> tuple[list[Tensor], list[float]]:
    """The controls after each step and the losses, by backpropagation and a plain optimiser."""
    model = chain(first_controls(start, horizon, seed))
    target = drawn(seed)[2]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05 * horizon)
    controls, losses = [], []
    for _ in range(STEPS + 1):
        controls.append(torch.stack([block.weight.detach().clone() for block in model]))
        # A row of the batch is a column of I: Π of rows is Πᵀ.
        loss = (model(torch.eye(4, dtype=torch.float64)).T - target).square().sum() / 2
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return controls, losses


@pytest.mark.parametrize("start", THEORY)
def test_the_closed_form_is_the_gradient(start: str) -> None:
    """Two networks side by side, against autograd on the product."""
    controls = torch.stack([first_controls(start, 6, seed) for seed in (0, 1)]).requires_grad_()
    targets = torch.stack([drawn(seed)[2] for seed in (0, 1)])
    unit = torch.eye(4, dtype=torch.float64)
    losses = []
    for theta, target in zip(controls, targets, strict=True):
        product = unit
        for one in theta:
            product = (unit + one / 6) @ product
        losses.append((product - target).square().sum() / 2)
    (expected,) = torch.autograd.grad(sum(losses), controls)
    found = scaled_gradient(controls.detach(), states(controls.detach()), targets)
    torch.testing.assert_close(found, 6 * expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("start", THEORY)
@pytest.mark.parametrize("horizon", [2, 9])
def test_the_gap_is_scipys(start: str, horizon: int) -> None:
    both = torch.stack([first_controls(start, horizon, seed) for seed in (0, 7)])
    found = linear_gap(both, states(both))
    assert found.tolist() == pytest.approx([naive_gap(one) for one in both], rel=1e-6)


@pytest.mark.slow
def test_the_gap_is_that_of_the_library() -> None:
    controls = first_controls("smooth", 12, 2)
    unit = torch.eye(4, dtype=torch.float64)
    expected = discretization_gap(chain(controls), unit, bound=False)
    assert float(linear_gap(controls, states(controls))) == pytest.approx(
        max(expected.gap), rel=1e-6
    )


@pytest.mark.parametrize("horizon", [8, 64])
def test_the_gap_of_alternating_controls_is_known(horizon: int) -> None:
    """∫θ ds = 0 over each interval but the last: x(s_n) = 1, while x_n falls to e^{−1/2}."""
    root, network, gaps = math.sqrt(horizon), 1.0, []
    for n in range(horizon):
        network *= 1 + (-1) ** n / root
        gaps.append(abs(network - (1.0 if n < horizon - 1 else math.exp(-1 / root))))
    controls = first_controls("alternating", horizon, 0)
    found = linear_gap(controls, states(controls))
    assert float(found) == pytest.approx(max(gaps), rel=1e-6)


def test_the_smooth_start_is_one_curve_of_half_an_oscillation() -> None:
    coarse, fine = (first_controls("smooth", horizon, 3) for horizon in (4, 64))
    torch.testing.assert_close(coarse, fine[::16], rtol=1e-14, atol=1e-14)
    steps = fine.diff(dim=0)
    assert bool(((steps > 0).all(dim=0) | (steps < 0).all(dim=0)).all())  # monotone: at most half
    assert float(largest_difference(fine)) > 0


@pytest.mark.slow
def test_training_is_that_of_plain_backpropagation(study: LinearStudy) -> None:
    """Losses, differences and gaps of one network of each start, at all three moments."""
    for family in study.families:
        controls, losses = naive_training(family.start, 8, 1)
        assert family.initial_loss[1][0] == pytest.approx(losses[0], rel=1e-12)
        assert family.final_loss[1][0] == pytest.approx(losses[-1], rel=1e-9)
        looked = [controls[step] for step in study.looked_at]
        differences = [float(largest_difference(theta)) for theta in looked]
        for moment, expected in zip(
            ("initial", "final", "worst"),
            (differences[0], differences[-1], max(differences)),
            strict=True,
        ):
            assert family.rate("difference", moment).values[1][0] == pytest.approx(expected)
        gaps = family.rate("gap", "initial"), family.rate("gap", "final")
        assert gaps[0].values[1][0] == pytest.approx(naive_gap(looked[0]), rel=1e-6)
        assert gaps[1].values[1][0] == pytest.approx(naive_gap(looked[-1]), rel=1e-6)
        worst = family.rate("gap", "worst").values[1][0]
        assert worst >= max(gap.values[1][0] for gap in gaps)


def test_what_falls_and_what_does_not(study: LinearStudy) -> None:
    """Slopes over N = 8 … 64 after 40 steps, which have most of the loss behind them."""
    smooth, independent, alternating = study.families
    for rate in smooth.rates:
        assert rate.within, rate
        assert -1.1 <= rate.slope <= -0.9
    for moment in ("initial", "final", "worst"):
        assert independent.rate("gap", moment).slope < -0.7
        assert abs(independent.rate("difference", moment).slope) < 0.2
        assert alternating.rate("gap", moment).slope > -0.1
        assert alternating.rate("difference", moment).slope == pytest.approx(0.5, abs=0.05)
    for family in study.families:
        for first, last in zip(family.initial_loss, family.final_loss, strict=True):
            assert all(b < a / 5 for a, b in zip(first, last, strict=True))


def test_slopes_are_of_the_values(study: LinearStudy) -> None:
    for family in study.families:
        for rate in family.rates:
            logs = np.log(study.depths), np.log(rate.values)
            fits = [np.polyfit(logs[0], row, 1)[0] for row in logs[1]]
            assert rate.slopes == pytest.approx(fits)
            assert rate.slope == pytest.approx(np.polyfit(logs[0], logs[1].mean(axis=0), 1)[0])


def test_the_study_is_kept(study: LinearStudy) -> None:
    folder = Path(study.folder)
    assert folder.name == "linear"
    assert from_plain(LinearStudy, json.loads((folder / "study.json").read_text())) == study
    assert (study.looked_at[0], study.looked_at[-1], len(study.looked_at)) == (0, STEPS, 21)


def test_the_table_holds_the_slopes_and_what_they_should_be(study: LinearStudy) -> None:
    out = io.StringIO()
    Console(file=out, width=80).print(rates_table(study.families, "A note."))
    text = out.getvalue().replace("−", "-")
    rows = [re.split(r"  +", line.strip()) for line in text.splitlines()]
    marks = {True: " ✓", False: " ✗", None: ""}
    found = {row[0]: row[1:] for row in rows if row[1:2] == ["gap"]}
    for family in study.families:
        rates = [family.rate("gap", moment) for moment in ("initial", "final", "worst")]
        expected = [f"{rate.slope:.2f}{marks[rate.within]}" for rate in rates]
        seeds = f"{min(rates[1].slopes):.2f} … {max(rates[1].slopes):.2f}"
        assert found[family.start][1:5] == [*expected, seeds]
    assert found["smooth"][5] == "-1 ± 0.1"
    assert found["independent"][5] == "≤ -0.50"
    judged = [rate.within for family in study.families for rate in family.rates]
    assert len(judged) == 18
    assert text.splitlines()[0] == f"{judged.count(True)} of 18 slopes are where the theory says."
    assert "A note." in text


def test_the_figure_draws_the_means_of_the_seeds(study: LinearStudy) -> None:
    figure = rates_figure("Title", study.depths, study.families)
    named = {(t.name, t.yaxis): t for t in figure.data if t.name}
    assert len(named) == 3 * 2 * 2  # starts, quantities, before and after
    gap = named["alternating, after training", "y"]
    values = study.families[2].rate("gap", "final").values
    assert gap.x == study.depths
    np.testing.assert_allclose(gap.y, np.sqrt(np.prod(values, axis=0)))
    np.testing.assert_allclose(np.add(gap.y, gap.error_y.array), np.max(values, axis=0))
    np.testing.assert_allclose(np.subtract(gap.y, gap.error_y.arrayminus), np.min(values, axis=0))
    falling = next(t for t in figure.data if not t.name)
    slope = math.log(falling.y[1] / falling.y[0]) / math.log(falling.x[1] / falling.x[0])
    assert slope == pytest.approx(-1)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"depths": (8,)}, "depths 8 given"),
        ({"depths": (16, 8)}, "smallest to the largest"),
        ({"depths": (1, 8)}, "2 layers or more"),
        ({"seeds": ()}, "at least one"),
        ({"learning_rate": 0.0}, "learning rate is 0"),
        ({"learning_rate": math.nan}, "learning rate is nan"),
        ({"steps": 0}, "0 steps"),
    ],
)
def test_wrong_input(options: dict, says: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=says):
        study_linear(runs=tmp_path, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_divergence_is_said(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="N = 8: the training diverged; give a smaller learning"):
        study_linear(depths=(8, 16), seeds=(0,), learning_rate=50.0, steps=20, runs=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_verb(tmp_path: Path) -> None:
    """`deeplimit study linear`: its options reach the study, its result is the file's."""
    args = "study linear --depths 2 4 --seeds 5 9 --steps 6 --learning-rate 0.1 --json"
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([*args.split(), "--runs", str(tmp_path)])
    assert (code, err.getvalue()) == (0, "")
    printed = json.loads(out.getvalue())
    assert printed == json.loads((tmp_path / "linear" / "study.json").read_text())
    study = from_plain(LinearStudy, printed)
    assert (study.depths, study.seeds) == ((2, 4), (5, 9))
    assert (study.steps, study.learning_rate) == (6, 0.1)
    assert "Plotly.newPlot" in (tmp_path / "linear" / "study.html").read_text()
