"""The examples in docstrings run, and print what they say."""

import doctest

import pytest
import torch
from model_families import sample

import deeplimit
from deeplimit import control

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", control.__all__)
def test_an_example_runs(name: str) -> None:
    family = sample("vector")
    known = {name: getattr(control, name) for name in control.__all__}
    loader = [(family.x, family.y)] * 6
    known |= {"torch": torch, "anatomy": deeplimit.anatomy, "loader": loader, "x": family.x}
    known["model"] = family.model.eval()
    example = doctest.DocTestParser().get_doctest(known[name].__doc__, known, name, None, 0)
    assert example.examples, f"{name} has none"
    assert doctest.DocTestRunner().run(example).failed == 0
