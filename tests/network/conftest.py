"""Fixtures of the network tests."""

import pytest
from model_families import FAMILIES, Sample, sample


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Sample:
    """A model of each family in turn, with a batch."""
    return sample(request.param)
