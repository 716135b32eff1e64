"""All of it in one result: each part is what its own function says."""

from dataclasses import replace

import pytest
import torch

from deeplimit import InputError
from deeplimit.network import Architecture, ResidualChain
from deeplimit.ode import (
    DepthLimit,
    depth_limit,
    discretization_gap,
    smoothness,
    solver_accuracies,
)
from deeplimit.records import from_plain, to_plain

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    made = Architecture(
        "convolutional", (1, 8, 8), 3, (3, 2), 4, 4, "tanh", "batch", step=0.3, reduction=1
    ).build()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made.eval()


SOLVERS = [("euler", 3), ("dopri5", None)]
X = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
LOADER = [(X, torch.zeros(3, dtype=torch.long))]


@pytest.fixture(scope="module")
def told() -> list[str]:
    return []


@pytest.fixture(scope="module")
def found(model: torch.nn.Module, told: list[str]) -> DepthLimit:
    return depth_limit(model, X, loader=LOADER, solvers=SOLVERS, tell=told.append)


def test_it_is_the_parts(model: torch.nn.Module, found: DepthLimit, told: list[str]) -> None:
    assert found.smoothness == smoothness(model)
    assert found.gaps == tuple(discretization_gap(model, X, stage=m) for m in (0, 1))
    assert found.solvers == solver_accuracies(model, LOADER, SOLVERS)
    assert list(dict.fromkeys(message.split(",")[0] for message in told)) == [
        "smoothness in depth",
        "stage 0",
        "stage 1",
        "accuracy with other solvers",
    ]
    assert "stage 1, the bounds: second derivatives of the states" in told
    assert depth_limit(model, X, bound=False).solvers == ()


def test_curves_are_numbers_of_the_controls_in_order(
    model: torch.nn.Module, found: DepthLimit
) -> None:
    first, second = found.curves
    assert (first.stage, second.stage) == (0, 1)
    for curves, chain in zip((first, second), model.stages, strict=True):  # type: ignore[arg-type]
        assert set(curves.groups) <= set(dict(chain[0].named_parameters()))
        assert "conv1.weight" in curves.groups
        for name, drawn in curves.groups.items():
            every = torch.stack([block.get_parameter(name).flatten() for block in chain]).double()
            for values in drawn:
                same = (every == torch.tensor(values, dtype=torch.float64)[:, None]).all(0)
                assert same.any(), name
            assert len(set(drawn)) == len(drawn)


def test_controls_that_are_zero_throughout_are_not_drawn() -> None:
    torch.manual_seed(0)
    made = Architecture("vector", (4,), 3, (3,), 4, 5).build().eval()  # last layers start at 0
    (curves,) = depth_limit(made, torch.randn(2, 4)).curves
    assert set(curves.groups) == {"inner.weight", "inner.bias"}


def test_it_survives_a_file(found: DepthLimit) -> None:
    infinite = replace(found.gaps[0], bound=(0.0, float("inf")))
    found = replace(found, gaps=(infinite, *found.gaps[1:]))
    assert from_plain(type(found), to_plain(found)) == found


def test_a_model_without_depth() -> None:
    chain = ResidualChain([torch.nn.Linear(2, 2)])
    with pytest.raises(InputError, match="no stage of two layers or more"):
        depth_limit(chain, torch.ones(1, 2))
