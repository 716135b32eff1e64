"""Layers and batches of other kinds than expected: one line each that says what to give."""

from collections.abc import Callable

SCRIPT = """
import numpy as np
import torch
from deeplimit import SoftCrossEntropy, choose_cut, crop, turnpike_profile, verify_crop
from deeplimit.control import Fading
from deeplimit.network import Architecture

model = Architecture("vector", (6,), 4, (4,), width=5, hidden=5).build()
x, y, loss = torch.rand(8, 6), torch.arange(8) % 4, SoftCrossEntropy(4)
profile = turnpike_profile(model, [(x, y)], loss)
masks = [[True, False], np.array([True, False]), torch.tensor([True, False])]
layers = [*masks, 3, torch.tensor(3), "12", [1.0], ["1"], [None]]
depths = [1.0, "1", torch.tensor(1.0), np.float64(1), [1]]
batches = [
    {"pixel_values": x, "labels": y},
    (x, x, y),
    ([x], y),
    (x, y.tolist()),
    x,
    (),
    None,
]
calls = [
    *(lambda wrong=wrong: crop(model, remove=wrong) for wrong in layers),
    *(lambda wrong=wrong: Fading(model, wrong) for wrong in layers),
    *(lambda wrong=wrong: crop(model, wrong) for wrong in depths),
    *(lambda wrong=wrong: turnpike_profile(model, [wrong], loss) for wrong in batches),
    *(lambda wrong=wrong: verify_crop(model, crop(model, 2), [wrong]) for wrong in batches),
    *(lambda wrong=wrong: choose_cut(model, profile, [wrong], blocks=2) for wrong in batches[:-1]),
]
"""


def test_every_one_is_an_input_error_of_one_line(refused_calls: Callable[[str], None]) -> None:
    refused_calls(SCRIPT)
