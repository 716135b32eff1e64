"""Trainings in tests do not wait for the disk."""

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="package")
def _unflushed() -> Iterator[None]:
    """Flushing is for power cuts, of which there are none here: a killed process loses nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield
