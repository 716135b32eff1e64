"""`digits`, handwritten digits that come with scikit-learn, and `spirals`, made from the seed."""

from __future__ import annotations

import numpy as np
from sklearn.datasets import load_digits as sklearn_digits

from deeplimit.data.dataset import DataSet
from deeplimit.data.registry import Request
from deeplimit.data.splitting import split_whole


def load_digits(request: Request) -> DataSet:
    """The digits as grey images [1, 8, 8]; no download; 60/20/20, stratified.

    The grey values 0 … 16 become 0 … 255, rounded.
    """
    pixels, labels = sklearn_digits(return_X_y=True)
    x = np.rint(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
    names = tuple(str(digit) for digit in range(10))
    return split_whole(request.name, x, labels.astype(np.int64), names)


_POINTS = 500  # per arm
_TURNS = 1.25
_INNER_RADIUS = 0.1  # keeps the arms apart at the centre: 0.2 = 10 standard deviations of the noise
_NOISE = 0.02


def load_spirals(request: Request) -> DataSet:
    """Two spirals: d = C = 2, 600 / 200 / 200 points, at most 1 + noise from the centre.

    Arm c ∈ {0, 1} is r(t)·(cos α, sin α) with r = 0.1 + 0.9 t, α = 2π·1.25·t + πc, plus normal
    noise of standard deviation 0.02 in both coordinates; t = √u with u uniform in [0, 1] spreads
    the points about evenly along the arm. Another seed gives other points.
    """
    generator = np.random.default_rng(request.seed)
    arm = np.repeat([0, 1], _POINTS)
    t = np.sqrt(generator.uniform(size=2 * _POINTS))
    radius = _INNER_RADIUS + (1 - _INNER_RADIUS) * t
    angle = 2 * np.pi * _TURNS * t + np.pi * arm
    x = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    x += _NOISE * generator.standard_normal(x.shape)
    return split_whole(request.name, x.astype(np.float32), arm.astype(np.int64), ("arm 0", "arm 1"))
