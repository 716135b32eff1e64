"""Fixtures of the network tests."""

from collections.abc import Iterator

import pytest
import torch
from model_families import FAMILIES, Sample, sample


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Sample:
    """A model of each family in turn, with a batch."""
    return sample(request.param)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors: several threads would only wait for each other, long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
