"""The examples in the docstrings of public functions run, and print what they say."""

import doctest

import pytest
import torch
from smooth_networks import batch, smooth_chain

from deeplimit import ode

pytestmark = pytest.mark.slow

NAMES = [name for name in ode.__all__ if name[0].islower()]


@pytest.mark.parametrize("name", NAMES)
def test_an_example_runs(name: str) -> None:
    x = batch()
    known = {name: getattr(ode, name) for name in ode.__all__}
    known |= {"torch": torch, "chain": smooth_chain(4), "x": x, "y": x.argmax(1)}
    example = doctest.DocTestParser().get_doctest(known[name].__doc__, known, name, None, 0)
    assert example.examples
    assert doctest.DocTestRunner().run(example).failed == 0


def test_every_result_is_a_table_of_at_most_a_screen() -> None:
    chain, x = smooth_chain(64), batch()
    found = ode.depth_limit(chain, x, loader=[(x, x.argmax(1))], solvers=[("rk4", 2)])
    parts = [*found.smoothness.stages, *found.gaps, *found.curves, *found.solvers]
    for result in (found, found.smoothness, *parts):
        lines = str(result).splitlines()
        assert 1 <= len(lines) <= 24
        assert type(result).__name__ not in lines[0]
    states = [line.split()[0] for line in str(found.gaps[0]).splitlines()[1:]]
    assert states[::20] == ["state", "64"]
