"""Networks as measures: what figures, captions and tables say are the results' own numbers."""

import html
import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from plotly import graph_objects as go
from rich.console import Console

from deeplimit.meanfield import ConvergenceCertificate, certify_convergence, particle_flow
from deeplimit.network import ResidualChain, TwoLayerResidual
from deeplimit.report import render_page
from deeplimit.report.convergence import (
    certificate_figures,
    rate_figure,
    risk_figure,
    travelled_figure,
)
from deeplimit.report.measures import (
    comparison_answer,
    comparison_figures,
    comparison_summary,
    interpolation_answer,
    interpolation_figures,
    interpolation_summary,
    merge_summary,
)
from deeplimit.studies.comparison import (
    ComparedLayer,
    ComparedNetwork,
    ComparedPair,
    Comparison,
)
from deeplimit.studies.interpolation import Interpolation, loss_barrier
from deeplimit.training import Recipe, RunFolder
from deeplimit.training.results import MergedRuns, RunResults, Score

LAYERS = (
    ComparedLayer(0.0, 0.5, 0, 0, 3.0, 4.0, 8, 0.25, 5.0),
    ComparedLayer(0.5, 1.0, 1, 1, 4.0, 6.0, 8, 0.0, 7.0),
)


def certificate(m: float | None = None) -> ConvergenceCertificate:
    """Of a real training, of a few steps."""
    torch.manual_seed(0)
    chain = ResidualChain([TwoLayerResidual(2, 24, "tanh") for _ in range(2)], step=0.5).double()
    with torch.no_grad():
        for block in chain:
            block.outer.weight.normal_().div_(48)
    x, y = torch.randn(2, 3, 2, dtype=torch.float64)
    optimizer, recorder = particle_flow(chain, 0.1), certify_convergence(chain, m=m)
    for k in range(6):
        optimizer.zero_grad()
        risk = (chain(x) - y).square().sum() / 6
        risk.backward()
        recorder.record(0.1 * k, risk)
        optimizer.step()
    return recorder.certificate()


def interpolation(naive: bool = True) -> Interpolation:
    scores = tuple(Score(v, 1 - v) for v in (0.2, 0.3, 0.2))
    plain = tuple(Score(v, 1 - v) for v in (0.2, 0.7, 0.2))
    return Interpolation(
        runs=("runs/a", "runs/b"),
        names=("a", "b"),
        frame="equal",
        aligned=False,
        samples=100,
        softness=0.05,
        ends=(scores[0], scores[2]),
        distance=math.sqrt(12.5),
        layers=LAYERS,
        ts=(0.0, 0.5, 1.0),
        geodesic=scores,
        naive=plain if naive else None,
        no_naive="" if naive else "the networks differ in width or depth",
        width=8,
        barrier=0.1,
        naive_barrier=0.5 if naive else None,
    )


def comparison(networks: int) -> Comparison:
    every = [ComparedNetwork(n, f"runs/{n}", 2, (8, 8), (5,), 10.0) for n in "abc"[:networks]]
    pairs = [(i, j) for i in range(networks) for j in range(i + 1, networks)]
    return Comparison(
        tuple(every),
        tuple(ComparedPair(i, j, 3.5 + i + j, 3.5 + i + j, 5.0, LAYERS) for i, j in pairs),
    )


def text_of(renderable: object) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return " ".join(console.file.getvalue().split())


def curves(figure: go.Figure) -> dict[str, list[float | None]]:
    return {trace.name: list(trace.y) for trace in figure.data}


@pytest.mark.slow
def test_the_page_has_the_certificate(digits: RunResults, digits_page: str) -> None:
    found = certificate()
    page = html.unescape(render_page(replace(digits, certificate=found)))
    assert f"The certificate {found.verdict}." in page
    for name, _, caption in certificate_figures(found):
        assert f'id="{name}-data"' in page
        assert caption in page
    assert "certificate-risk" not in digits_page
    assert "The certificate of convergence" not in digits_page


@pytest.mark.slow
def test_the_certificates_figures_are_its_records() -> None:
    found = certificate()
    assert curves(risk_figure(found)) == {
        "guaranteed": list(found.guaranteed),
        "risk": list(found.risks),
    }
    assert curves(travelled_figure(found)) == {
        "budget R": [found.budget] * 6,
        "length of the way": list(found.path_lengths),
        "distance": list(found.distances),
    }
    assert curves(rate_figure(found))["m̂"] == list(found.rates)
    assert found.holds
    assert not risk_figure(found).layout.shapes
    broken = certificate(m=1e3)
    assert broken.broken_at == 0
    (mark,) = risk_figure(broken).layout.shapes
    assert mark.x0 == broken.times[0]
    above = sum(r > g * (1 + 1e-9) for r, g in zip(broken.risks, broken.guaranteed, strict=True))
    assert above > 0
    assert f"above it in {above} of 6 records" in certificate_figures(broken)[0][2]


@pytest.mark.slow
def test_a_run_folder_keeps_the_certificate(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "run", Recipe())
    assert folder.results().certificate is None
    found = replace(certificate(), rates=(1.0, None, 2.0, 3.0, 4.0, 5.0))
    folder.write(found)
    assert folder.results().certificate == found
    (folder.path / "certificate.json").write_text('{"times": [')
    with pytest.raises(ValueError, match=r"certificate.json: damaged .*RunFolder.write"):
        folder.results()


def test_a_path_of_two_curves_and_its_barriers() -> None:
    found = interpolation()
    loss, accuracy, distance = (figure for _, figure, _ in interpolation_figures(found))
    assert curves(loss) == {"geodesic": [0.2, 0.3, 0.2], "parameters averaged": [0.2, 0.7, 0.2]}
    assert curves(accuracy)["parameters averaged"] == pytest.approx([80, 30, 80])
    assert curves(distance) == {"matched": [3, 4, 4], "by their numbers": [4, 6, 6]}
    assert list(distance.data[0].x) == [0, 0.5, 1]
    answer = interpolation_answer(found).replace("\u00a0", " ")
    assert answer == (
        "On the geodesic the loss rises by at most 0.100 above its ends' line, on the way of "
        "averaged parameters by at most 0.500: 20.0 % of it."
    )
    summary = text_of(interpolation_summary(found))
    assert summary.startswith("On the geodesic")
    assert re.search(r"0\.5 0\.300 70\.0.% 0\.700 30\.0.%", summary)


def test_a_saved_network_off_the_geodesic_is_said_to_be() -> None:
    saved = replace(interpolation(), saved="x", saved_at=0.5, saved_distances=(123.9, 131.1))
    found = replace(saved, distance=195.8)
    for text in (text_of(interpolation_summary(found)), interpolation_figures(found)[2][2]):
        told = " ".join(text.replace("\u00a0", " ").split())
        assert "has the distances 124 and 131 to the ends" in told
        assert "the point of the geodesic has 97.9 and 97.9" in told
        assert "off the geodesic" in told
    on = replace(found, saved_distances=(97.9, 97.9))
    assert "off the geodesic" not in text_of(interpolation_summary(on))


def test_a_path_where_no_average_exists() -> None:
    found = interpolation(naive=False)
    assert "does not exist: the networks differ in width or depth" in interpolation_answer(found)
    assert list(curves(interpolation_figures(found)[0][1])) == ["geodesic"]


def test_a_barrier_is_above_the_line_of_the_ends() -> None:
    assert loss_barrier((0.0, 0.25, 1.0), (1.0, 2.0, 3.0)) == pytest.approx(0.5)
    assert loss_barrier((0.0, 0.5, 1.0), (1.0, 1.5, 3.0)) == 0


def test_compared_networks() -> None:
    two, three = comparison(2), comparison(3)
    assert comparison_answer(two).replace("\u00a0", " ") == (
        "a and b: d = 4.50, 45.0 % of the larger one's size. With neurons matched by their numbers "
        "it would be 5.00."
    )
    summary = text_of(comparison_summary(two))
    assert re.search(r"0\.5 – 1 2, 2 4\.00 6\.00 8 0\.0.% 7\.00", summary)
    (_, distances, _), (_, figure, _) = comparison_figures(three)
    assert [*distances.data[0].text[1]] == ["4.50", "", "6.50"]
    assert [*distances.data[0].z[2]] == [5.5, 6.5, None]
    assert [trace.name for trace in figure.data] == ["a – b", "a – c", "b – c"]
    assert re.search(r"b 4\.50 6\.50 c 5\.50 6\.50", text_of(comparison_summary(three)))
    assert json.loads(figure.to_json())["data"][0]["line"]["shape"] == "hv"


@pytest.mark.parametrize(
    ("lower", "upper", "by_number", "says"),
    [
        (0.0, 0.073, 0.0728, "0 ≤ d ≤ 0.0728"),  # by Sinkhorn, above a coupling that is known
        (0.05, 0.07, 0.08, "0.0500 ≤ d ≤ 0.0700"),
    ],
)
def test_bounds_by_sinkhorn_are_taken_for_no_more(
    lower: float, upper: float, by_number: float, says: str
) -> None:
    two = comparison(2)
    pair = replace(two.pairs[0], distance=upper, lower=lower, by_number=by_number)
    answer = comparison_answer(replace(two, pairs=(pair,), sinkhorn=0.01))
    assert says in answer
    assert "already stand in matching order" not in answer
    exact = replace(pair, distance=0.3, lower=0.3, by_number=0.3)
    assert "in matching order" in comparison_answer(replace(two, pairs=(exact,)))


def test_what_of_a_distance_is_proven_is_said_of_every_verb() -> None:
    """Of sizes too different for float64 the exact solver leaves a gap."""
    two = comparison(2)
    pair = replace(two.pairs[0], distance=0.07, lower=0.05, by_number=0.08)
    assert "In float64: d is at least 0.0500." in text_of(
        comparison_summary(replace(two, pairs=(pair,)))
    )
    assert "at least" not in text_of(comparison_summary(two))
    exact = replace(interpolation(), distance=0.07, lower=0.07)
    gap = replace(exact, lower=0.05)
    assert "a → b, d = 0.0700" in text_of(interpolation_summary(exact))
    assert "a → b, 0.0500 ≤ d ≤ 0.0700" in text_of(interpolation_summary(gap))
    assert interpolation_figures(gap)[2][2].startswith("0.0500 ≤ d ≤ 0.0700. Matched")
    score = Score(0.3, 0.9)
    merged = MergedRuns(
        folder="runs/m",
        runs=("runs/a", "runs/b"),
        names=("a", "b"),
        weights=(0.5, 0.5),
        frame="equal",
        aligned=False,
        samples=100,
        parents=(score, score),
        merged=score,
        averaged=None,
        distances=(0.07, 0.08),
        objectives=(0.1,),
        depth=1,
        width=1,
        narrowed=None,
        lower=(0.05, 0.08),
    )
    said = text_of(merge_summary(merged))
    assert "Of the distance to a only this is proven: 0.0500 ≤ d ≤ 0.0700." in said
    assert "to b only" not in said
    assert "100 test samples; 1 layer of up to 1 neuron." in said
    assert "proven" not in text_of(merge_summary(replace(merged, lower=None)))
