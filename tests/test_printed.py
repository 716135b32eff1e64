"""The examples in the docstrings of public names run; results are tables of at most a screen."""

import doctest
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from measured_networks import classifier, inputs
from model_families import sample
from smooth_networks import batch, smooth_chain
from torch import Tensor, nn

from deeplimit import anatomy, control, data, gradient, meanfield, ode, studies
from deeplimit.network import ResidualChain, TwoLayerResidual
from deeplimit.training import recipe_for, train


def drawn(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    chain = ResidualChain([TwoLayerResidual(3, 4, "tanh") for _ in range(2)], step=0.5).double()
    for block in chain:
        nn.init.normal_(block.outer.weight, std=0.5)
    return chain


def points(size: int) -> Tensor:
    return torch.randn(size, 3, dtype=torch.float64, generator=torch.manual_seed(2))


def of_control() -> dict[str, Any]:
    family = sample("vector")
    loader = [(family.x, family.y)] * 6
    return {"anatomy": anatomy, "model": family.model.eval(), "loader": loader, "x": family.x}


def of_gradient() -> dict[str, Any]:
    blocks = [
        nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16), nn.LayerNorm(16))
        for _ in range(7)
    ]
    return {"nn": nn, "blocks": blocks, "x": torch.randn(4, 16)}


def of_ode() -> dict[str, Any]:
    x = batch()
    return {"chain": smooth_chain(4), "x": x, "y": x.argmax(1)}


def of_streams() -> dict[str, Any]:
    return {"model": classifier(), "other": classifier(seed=1), "x": inputs(classifier())}


GIVEN: dict[ModuleType, Callable[[], dict[str, Any]]] = {
    control: of_control,
    data: dict,
    gradient: of_gradient,
    meanfield: lambda: {"model": drawn(0), "other": drawn(1), "x": points(4)},
    ode: of_ode,
    studies: dict,
}


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A folder of runs, and two small runs in it."""
    runs = tmp_path_factory.mktemp("runs")
    small = replace(recipe_for("digits"), depth=(2,), hidden=8, epochs=1)
    pair = [train(replace(small, seed=s), runs=runs, name=f"{s}", quiet=True) for s in (0, 1)]
    classes = {"ResidualChain": ResidualChain, "TwoLayerResidual": TwoLayerResidual}
    return {
        "runs": runs,
        "first": pair[0].path,
        "second": pair[1].path,
        "replace": replace,
    } | classes


def public_names() -> Iterator[Any]:
    """Every name of a room that is to have an example."""
    for room in GIVEN:
        for name in room.__all__:
            if (
                room in (control, data)
                or name in ("LayerwiseMeasure", "ParticleFlow", "plan_memory", "use_adjoint")
                or (room is not gradient and name[0].islower())
            ):
                marks = () if room is data else pytest.mark.slow
                yield pytest.param(room, name, marks=marks, id=f"{room.__name__}.{name}")


@pytest.mark.parametrize(("room", "name"), public_names())
def test_an_example_runs(
    room: ModuleType, name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if room is studies:  # of the mazes a tenth, for no example says what is learnt of them
        monkeypatch.setattr("deeplimit.data.arrays._MAZES", 2_000)
    known = {public: getattr(room, public) for public in room.__all__} | {"torch": torch}
    known |= of_streams() if name == "align_streams" else GIVEN[room]()
    known |= request.getfixturevalue("two_runs") if room is studies else {}
    example = doctest.DocTestParser().get_doctest(known[name].__doc__, known, name, None, 0)
    assert example.examples, f"{name} has none"
    assert doctest.DocTestRunner().run(example).failed == 0


@pytest.mark.slow
def test_measures_results_are_tables_of_at_most_a_screen() -> None:
    a, b = drawn(0), drawn(1)
    recorder = meanfield.certify_convergence(a, m=1e-3)
    for k in range(2):
        risk = a(points(3)).square().mean()
        risk.backward()
        recorder.record(float(k), risk)
    results = [meanfield.cot_distance(a, b), meanfield.narrow(a, 2), recorder.certificate()]
    results += [meanfield.merge([a, b]), meanfield.feature_kernel(a, points(3))]
    for result in results:
        said, header, *rows = str(result).splitlines()
        assert len(rows) == 2
        assert len({len(row.split("  ")) > 1 for row in (header, *rows)}) == 1
        assert len(said) > 40


@pytest.mark.slow
def test_results_on_the_limit_of_depth_are_tables_of_at_most_a_screen() -> None:
    chain, x = smooth_chain(64), batch()
    found = ode.depth_limit(chain, x, loader=[(x, x.argmax(1))], solvers=[("rk4", 2)])
    parts = [*found.smoothness.stages, *found.gaps, *found.curves, *found.solvers]
    for result in (found, found.smoothness, *parts):
        lines = str(result).splitlines()
        assert 1 <= len(lines) <= 24
        assert type(result).__name__ not in lines[0]
    states = [line.split()[0] for line in str(found.gaps[0]).splitlines()[1:]]
    assert states[::20] == ["state", "64"]
