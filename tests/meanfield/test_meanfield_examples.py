"""The examples in the docstrings of public names run, and print what they say."""

import doctest

import pytest
import torch
from measured_networks import classifier, inputs
from torch import nn

from deeplimit import ResidualChain, meanfield
from deeplimit.network import TwoLayerResidual

pytestmark = pytest.mark.slow

NAMES = [name for name in meanfield.__all__ if name[0].islower()]
NAMES += ["LayerwiseMeasure", "ParticleFlow"]


def drawn(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    chain = ResidualChain([TwoLayerResidual(3, 4, "tanh") for _ in range(2)], step=0.5).double()
    for block in chain:
        nn.init.normal_(block.outer.weight, std=0.5)
    return chain


@pytest.mark.parametrize("name", NAMES)
def test_an_example_runs(name: str) -> None:
    known = {name: getattr(meanfield, name) for name in meanfield.__all__}
    known |= {"torch": torch, "model": drawn(0), "other": drawn(1)}
    known["x"] = torch.randn(4, 3, dtype=torch.float64, generator=torch.manual_seed(2))
    if name == "align_streams":
        known |= {"model": classifier(), "other": classifier(seed=1), "x": inputs(classifier())}
    example = doctest.DocTestParser().get_doctest(known[name].__doc__, known, name, None, 0)
    assert example.examples
    assert doctest.DocTestRunner().run(example).failed == 0


def test_every_result_is_a_table_of_at_most_a_screen() -> None:
    a, b = drawn(0), drawn(1)
    recorder = meanfield.certify_convergence(a, m=1e-3)
    x = torch.randn(3, 3, dtype=torch.float64, generator=torch.manual_seed(2))
    for k in range(2):
        risk = a(x).square().mean()
        risk.backward()
        recorder.record(float(k), risk)
    results = [meanfield.cot_distance(a, b), meanfield.narrow(a, 2), recorder.certificate()]
    results += [meanfield.merge([a, b]), meanfield.feature_kernel(a, x)]
    for result in results:
        said, header, *rows = str(result).splitlines()
        assert len(rows) == 2
        assert len({len(row.split("  ")) > 1 for row in (header, *rows)}) == 1
        assert len(said) > 40
