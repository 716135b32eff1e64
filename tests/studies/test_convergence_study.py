"""The study of convergence: problems, rates, certificates in both corners, the verb."""

import contextlib
import io
import json
import math
from pathlib import Path

import pytest
import torch

from deeplimit.cli import main
from deeplimit.errors import InputError
from deeplimit.meanfield import LayerwiseMeasure, feature_kernel, slope
from deeplimit.records import from_plain
from deeplimit.report.convergence import convergence_answer, convergence_figures
from deeplimit.studies import ConvergenceStudy, study_convergence
from deeplimit.studies.convergence import STATE, drawn, fitted_rate, risk_of

SMALL = {"widths": (2, 256), "distances": (0.05, 5.0), "depth": 2, "samples": 4, "time": 3.0}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> ConvergenceStudy:
    return study_convergence(**SMALL, seeds=(0, 1), runs=tmp_path_factory.mktemp("runs"))


def test_the_problem_starts_where_it_should() -> None:
    model, x, y = drawn(3, 8, 0.7, 4, 5)
    assert torch.allclose(x @ x.T, STATE * torch.eye(4, dtype=torch.float64), atol=1e-12)
    risk = risk_of(model, x, y)
    assert risk.item() == pytest.approx(0.7**2 / 2)
    wide = drawn(3, 16, 0.7, 4, 5)
    assert torch.equal(wide[1], x)
    direction = (y - model(x)).detach()
    assert torch.allclose((wide[2] - wide[0](x)).detach(), direction)
    assert LayerwiseMeasure.of(model).particles.shape == (3, 8, 2 * STATE + 1)


@pytest.mark.slow
def test_the_first_record_is_the_networks(study: ConvergenceStudy) -> None:
    (training, _) = study.cell(256, 5.0)
    model, x, y = drawn(2, 256, 5.0, 4, 0)
    risk = risk_of(model, x, y)
    risk.backward()
    m = slope(model) ** 2 / (2 * risk.item()) / 2
    assert training.by_slope.m == pytest.approx(m)
    kernel = feature_kernel(model, x)
    assert (training.kernel_m, training.kernel) == (kernel.m, min(kernel.smallest))
    assert training.by_kernel is not None
    assert training.by_kernel.m == kernel.m
    assert training.initial == pytest.approx(12.5)


def test_the_good_corner_holds_and_the_bad_one_is_broken(study: ConvergenceStudy) -> None:
    assert study.held(256, 0.05, "slope") == 1
    assert study.held(256, 0.05, "kernel") == 1
    assert study.held(2, 5.0, "slope") == 0
    assert study.held(2, 0.05, "kernel") == 0  # M < D: no m at all
    for good in study.cell(256, 0.05):
        assert good.fitted is not None
        assert good.fitted >= good.by_slope.m >= good.kernel_m
        pairs = zip(good.by_slope.risks, good.by_slope.guaranteed, strict=True)
        assert all(risk <= curve * (1 + 1e-12) for risk, curve in pairs)
    for bad in study.cell(2, 5.0):
        assert bad.by_slope.broken_by == ("rate",)
        assert bad.kernel_m == 0
        assert bad.by_kernel is None
    assert "smallest risk: 2 of 2 hold" in convergence_answer(study)
    assert "largest risk: 0 of 2 hold" in convergence_answer(study)


def test_what_is_kept_and_drawn(study: ConvergenceStudy) -> None:
    kept = json.loads((Path(study.folder) / "study.json").read_text())
    assert from_plain(ConvergenceStudy, kept) == study
    figures = {name: figure for name, figure, _ in convergence_figures(study)}
    grid = [list(row) for row in figures["map-slope"].data[0].z]
    assert grid == [[study.held(m, r, "slope") for r in study.distances] for m in study.widths]
    assert figures["map-kernel"].data[0].text[0][0] == "no m"
    curve = figures["decay"].data[0]
    first = study.cell(2, 0.05)[0].by_slope
    assert list(curve.y) == [risk / first.risks[0] for risk in first.risks]


def test_a_fitted_rate() -> None:
    times = tuple(0.5 * k for k in range(20))
    assert fitted_rate(times, [3 * math.exp(-2 * 0.7 * t) for t in times]) == pytest.approx(0.7)
    assert fitted_rate((0.0,), (1.0,)) is None


@pytest.mark.slow
def test_the_verb(tmp_path: Path) -> None:
    words = ["study", "convergence", "--widths", "2", "8", "--distances", "0.1", "--seeds", "0"]
    words += ["--depth", "2", "--samples", "3", "--time", "0.4", "--runs", str(tmp_path)]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert main(words) == 0
    assert "Certificates that hold, m of the features' kernel" in out.getvalue()
    assert "no m" in out.getvalue()
    assert "training: M = 8, ρ = 0.1, seed 0" in err.getvalue()
    assert (tmp_path / "convergence" / "study.html").is_file()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"widths": (8, 4)}, "widths 8 4 given"),
        ({"widths": ()}, r"widths \(none\) given"),
        ({"distances": (0.0, 1.0)}, "distances 0.0 1.0 given"),
        ({"samples": 1}, "1 samples given"),
        ({"samples": STATE + 1}, "which are orthogonal"),
        ({"depth": 0}, "depth 0"),
        ({"time": -1.0}, "the time is -1.0"),
        ({"seeds": (1, 1)}, "each once"),
    ],
)
def test_wrong_input(changed: dict, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        study_convergence(**(SMALL | changed), runs=tmp_path)
    assert not list(tmp_path.iterdir())
