"""A bridge over a layer that some batches skip."""

import pytest
from own_models import Own, X, Y

from deeplimit import InputError, crop


def test_a_layer_that_does_not_run_on_every_batch_is_named() -> None:
    model = Own().eval()
    model.skip = float(X.sum()) + 1
    with pytest.raises(InputError, match="layer 2 of Own does not run on every batch"):
        crop(model, remove=[2], bridge=[(X, Y), (X + 1, Y)])
