"""Two-layer residuals: training, gap and slopes against naive references."""

import contextlib
import io
import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from deeplimit.cli import main
from deeplimit.errors import InputError, RunError
from deeplimit.ode.discretization import discretization_gap
from deeplimit.records import from_plain
from deeplimit.studies import SmoothStudy, study_smooth
from deeplimit.studies.smooth import (
    first_chain,
    largest_difference,
    neural_ode_gap,
    regression,
    watch_training,
)

DEPTHS, STEPS = (4, 8, 16), 24


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> SmoothStudy:
    runs = tmp_path_factory.mktemp("smooth")
    return study_smooth(activations=("tanh",), depths=DEPTHS, seeds=(2,), steps=STEPS, runs=runs)


def naive_run(weights: list[tuple[Tensor, Tensor, Tensor]], x: Tensor) -> list[Tensor]:
    """States x_0 … x_N of x + V tanh(W x + b)/N, a sample a row."""
    states = [x]
    for inner, bias, outer in weights:
        states.append(states[-1] + torch.tanh(states[-1] @ inner.T + bias) @ outer.T / len(weights))
    return states


def naive_training(start: str, horizon: int, seed: int) -> tuple[list[float], list[Tensor]]:
    """Losses at every step and the final controls, each one long vector, by autograd alone."""
    chain = first_chain("tanh", start, horizon, DEPTHS[-1], seed, 0.5)  # type: ignore[arg-type]
    weights = [
        tuple(p.detach().clone().requires_grad_() for p in block.parameters()) for block in chain
    ]
    x, y = regression(seed)
    losses = []
    for step in range(STEPS + 1):
        loss = (naive_run(weights, x)[-1] - y).pow(2).sum() / (2 * len(x))
        losses.append(loss.item())
        if step == STEPS:
            break
        flat = [p for layer in weights for p in layer]
        for p, gradient in zip(flat, torch.autograd.grad(loss, flat), strict=True):
            p.data -= 0.1 * horizon * gradient
    return losses, [torch.cat([p.detach().flatten() for p in layer]) for layer in weights]


@pytest.mark.slow
@pytest.mark.parametrize("start", ["smooth", "independent"])
def test_training_is_that_of_plain_gradient_descent(start: str, study: SmoothStudy) -> None:
    family = next(family for family in study.families if family.start == start)
    for i, horizon in enumerate(DEPTHS):
        losses, controls = naive_training(start, horizon, 2)
        assert family.initial_loss[0][i] == pytest.approx(losses[0], rel=1e-12)
        assert family.final_loss[0][i] == pytest.approx(losses[-1], rel=1e-9)
        largest = max(float((b - a).norm()) for a, b in pairwise(controls))
        assert family.rate("difference", "final").values[0][i] == pytest.approx(largest, rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("activation", "start"), [("tanh", "independent"), ("gelu", "smooth"), ("relu", "smooth")]
)
def test_the_gap_is_that_of_the_library(activation: str, start: str) -> None:
    """Before and after training; the library's solver controls its own error."""
    chain = first_chain(activation, start, 4, 4, 1, 0.5)  # type: ignore[arg-type]
    x, y = regression(1)
    seen = watch_training(chain, x, y, 0.1, 20)
    after = max(discretization_gap(chain, x, bound=False).gap)
    assert seen.gap[-1] == pytest.approx(after, rel=2e-3)
    first = first_chain(activation, start, 4, 4, 1, 0.5)  # type: ignore[arg-type]
    before = max(discretization_gap(first, x, bound=False).gap)
    assert seen.gap[0] == pytest.approx(before, rel=2e-3)
    assert abs(after / before - 1) > 0.05  # training moved it: the two are told apart


def test_networks_of_all_depths_start_on_one_curve() -> None:
    for start in ("smooth", "independent"):
        coarse, fine = (first_chain("tanh", start, n, 12, 3, 0.5) for n in (3, 12))
        assert (coarse.step, fine.step) == (1 / 3, 1 / 12)
        for n, block in enumerate(coarse):
            for p, q in zip(block.parameters(), fine[4 * n].parameters(), strict=True):
                assert torch.equal(p, q)


@pytest.mark.slow
def test_the_starts_have_the_variances_they_say() -> None:
    """Over many blocks and seeds; and only the smooth one is smooth."""
    for start in ("smooth", "independent"):
        chains = [first_chain("tanh", start, 16, 16, seed, 0.3) for seed in range(12)]
        blocks = [block for chain in chains for block in chain]
        for name, variance in (
            ("inner.weight", 1 / 8),
            ("inner.bias", 1),
            ("outer.weight", 1 / 64),
        ):
            every = torch.stack([block.get_parameter(name) for block in blocks])
            assert float(every.detach().var()) == pytest.approx(variance, rel=0.15)
        # ‖θ‖² is 16 + 16 + 2: independent ones are √68 apart, those of one curve √34/(Nℓ).
        apart = np.mean([largest_difference(chain) for chain in chains])
        expected = math.sqrt(68) if start == "independent" else math.sqrt(34) / (16 * 0.3)
        assert apart == pytest.approx(expected, rel=0.3)


def test_the_callers_random_numbers_are_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first_chain("relu", "smooth", 2, 4, 0, 0.5)
    assert torch.equal(torch.rand(3), expected)


def test_what_falls_and_what_does_not(study: SmoothStudy) -> None:
    """At N = 4 … 16 after a flow time of 2.4, far from the limit: the sides are clear already."""
    smooth, independent = study.families
    for quantity in ("gap", "difference"):
        for moment in ("initial", "final"):
            assert -1.3 < smooth.rate(quantity, moment).slope < -0.7
    assert independent.rate("gap", "final").slope > -0.5
    assert independent.rate("gap", "final").slope > independent.rate("gap", "initial").slope
    assert independent.rate("difference", "final").slope > -0.1
    for family in study.families:
        assert all(
            b < a / 3 for a, b in zip(family.initial_loss[0], family.final_loss[0], strict=True)
        )


def test_the_study_is_kept(study: SmoothStudy) -> None:
    folder = Path(study.folder)
    assert folder.name == "smooth"
    assert from_plain(SmoothStudy, json.loads((folder / "study.json").read_text())) == study
    assert study.looked_at == (0, 6, 12, 18, 24)
    assert [family.name for family in study.families] == ["tanh, smooth", "tanh, independent"]


@pytest.mark.slow
def test_the_theory_is_of_smooth_activations(tmp_path: Path) -> None:
    """With ReLU there is nothing that the slopes from a smooth start are held against."""
    study = study_smooth(
        activations=("relu", "gelu"), depths=(2, 4), seeds=(0,), steps=1, runs=tmp_path
    )
    said = {
        family.name: [rate.within is not None for rate in family.rates] for family in study.families
    }
    assert not any(said["relu, smooth"])
    assert all(said["gelu, smooth"])
    assert said["relu, independent"] == said["gelu, independent"]
    assert sum(said["gelu, independent"]) == 4  # the gap after training, differences always


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"activations": ()}, "activations \\(none\\)"),
        ({"activations": ("tanh", "tanh")}, "each once"),
        ({"activations": ("tahn",)}, "'tahn'"),
        ({"depths": (4, 6)}, "divide the largest"),
        ({"depths": (4,)}, "at least two"),
        ({"seeds": (1, 1)}, "each once"),
        ({"length_scale": 0.0}, "length scale is 0"),
        ({"learning_rate": -1.0}, "learning rate is -1"),
        ({"steps": 0}, "0 steps"),
    ],
)
def test_wrong_input(options: dict, says: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=says):
        study_smooth(runs=tmp_path, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_divergence_is_said(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="gelu, smooth start, seed 0, N = 2: the training diverged"):
        study_smooth(
            activations=("gelu",), depths=(2, 4), seeds=(0,), learning_rate=1e3, runs=tmp_path
        )
    assert not list(tmp_path.iterdir())


def test_an_ode_without_solution_has_no_gap() -> None:
    chain = first_chain("relu", "independent", 2, 2, 0, 0.5)
    for p in chain.parameters():
        p.data *= 1e60
    assert math.isnan(neural_ode_gap(chain, regression(0)[0]))


@pytest.mark.slow
def test_the_verb(tmp_path: Path) -> None:
    """`deeplimit study smooth`: its options reach the study; the answer, the figure, progress."""
    args = "study smooth --activations silu --depths 2 4 --seeds 7 --steps 3 --learning-rate 0.05"
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([*args.split(), "--length-scale", "0.25", "--runs", str(tmp_path)])
    assert code == 0
    study = from_plain(SmoothStudy, json.loads((tmp_path / "smooth" / "study.json").read_text()))
    assert (study.depths, study.seeds, study.steps) == ((2, 4), (7,), 3)
    assert (study.learning_rate, study.length_scale) == (0.05, 0.25)
    assert [family.name for family in study.families] == ["silu, smooth", "silu, independent"]
    assert (
        out.getvalue().split("\n")[-2] == f"The figure is at {tmp_path / 'smooth' / 'study.html'}"
    )
    assert "slopes are where the theory says" in out.getvalue()
    assert "Plotly.newPlot" in (tmp_path / "smooth" / "study.html").read_text()
    assert err.getvalue().splitlines() == [
        f"training: silu, {start} start, seed 7, N = {horizon}"
        for start in ("smooth", "independent")
        for horizon in (2, 4)
    ]
