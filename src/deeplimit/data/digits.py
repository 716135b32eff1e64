"""`digits`: 1797 handwritten digits of 8×8 pixels that come with scikit-learn."""

from __future__ import annotations

import numpy as np
from sklearn.datasets import load_digits as sklearn_digits

from deeplimit.data.dataset import DataSet
from deeplimit.data.request import Request
from deeplimit.data.splitting import split_whole


def load_digits(request: Request) -> DataSet:
    """The digits as grey images [1, 8, 8]; no download; 60/20/20, stratified.

    The grey values 0 … 16 become 0 … 255, rounded.
    """
    pixels, labels = sklearn_digits(return_X_y=True)
    x = np.rint(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
    names = tuple(str(digit) for digit in range(10))
    return split_whole(request.name, x, labels.astype(np.int64), names)
