"""The examples in docstrings run, and print what they say."""

import doctest

import pytest
import torch

from deeplimit import data


@pytest.mark.parametrize("name", data.__all__)
def test_an_example_runs(name: str) -> None:
    known = {name: getattr(data, name) for name in data.__all__} | {"torch": torch}
    example = doctest.DocTestParser().get_doctest(known[name].__doc__, known, name, None, 0)
    assert example.examples
    assert doctest.DocTestRunner().run(example).failed == 0
