"""The examples in docstrings run, and print what they say."""

import doctest
from dataclasses import replace
from typing import Any

import pytest
import torch

from deeplimit import studies
from deeplimit.network import ResidualChain, TwoLayerResidual
from deeplimit.training import recipe_for, train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The names that examples use: a folder of runs, and two small runs in it."""
    runs = tmp_path_factory.mktemp("runs")
    small = replace(recipe_for("digits"), depth=(2,), hidden=8, epochs=1)
    pair = [train(replace(small, seed=s), runs=runs, name=f"{s}", quiet=True) for s in (0, 1)]
    names = {"runs": runs, "first": pair[0].path, "second": pair[1].path, "torch": torch}
    names |= {"ResidualChain": ResidualChain, "TwoLayerResidual": TwoLayerResidual}
    return names | {"replace": replace} | {name: getattr(studies, name) for name in studies.__all__}


@pytest.mark.parametrize("name", [name for name in studies.__all__ if name[0].islower()])
def test_an_example_runs(name: str, known: dict[str, Any]) -> None:
    example = doctest.DocTestParser().get_doctest(known[name].__doc__, known, name, None, 0)
    assert example.examples
    assert doctest.DocTestRunner().run(example).failed == 0
