"""Layers, batches, losses, numbers of other kinds than expected: one line each on what to give."""

from collections.abc import Callable

import pytest

pytestmark = pytest.mark.slow

SCRIPT = """
import numpy as np
import torch
from deeplimit import (
    SoftCrossEntropy, StageCost, choose_cut, crop, dissipativity, turnpike_profile, verify_crop)
from deeplimit.control import Distillation, Fading, picture_trajectories
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
smaller, objective, fade = crop(model, 2), StageCost(model, loss), Fading(model, [])
losses = [torch.nn.CrossEntropyLoss(), torch.nn.MSELoss(), SoftCrossEntropy, "soft", [(x, y)]]
targets = [torch.rand(8), torch.rand(8, 4), y.float() + 0.5, y + 1, y[:, None], y[:5], y.cfloat()]
calls = [
    *(lambda wrong=wrong: crop(model, remove=wrong) for wrong in layers),
    *(lambda wrong=wrong: Fading(model, wrong) for wrong in layers),
    *(lambda wrong=wrong: crop(model, wrong) for wrong in depths),
    *(lambda wrong=wrong: turnpike_profile(model, [wrong], loss) for wrong in batches),
    *(lambda wrong=wrong: verify_crop(model, crop(model, 2), [wrong]) for wrong in batches),
    *(lambda wrong=wrong: choose_cut(model, profile, [wrong], blocks=2) for wrong in batches[:-1]),
    *(lambda wrong=wrong: StageCost(model, wrong) for wrong in (*losses[2:], None)),
    *(lambda wrong=wrong: Distillation(model, wrong, model) for wrong in (*losses, None)),
    *(lambda w=w: turnpike_profile(model, [(x, y)], w) for w in (*losses[1:], None)),
    *(lambda wrong=wrong: picture_trajectories(model, [(x, y)], wrong) for wrong in losses),
    *(lambda wrong=wrong: verify_crop(model, smaller, [(x, y)], wrong) for wrong in losses[1:]),
    *(lambda wrong=wrong: turnpike_profile(model, [(x, wrong)], loss) for wrong in targets),
    *(lambda wrong=wrong: picture_trajectories(model, [(x, wrong)], loss) for wrong in targets),
    *(lambda wrong=wrong: verify_crop(model, smaller, [(x, wrong)]) for wrong in targets),
    *(lambda wrong=wrong: choose_cut(model, profile, [(x, wrong)], blocks=2) for wrong in targets),
    *(lambda wrong=wrong: dissipativity(objective, [(x, wrong)]) for wrong in targets),
    *(lambda wrong=wrong: objective(x, wrong) for wrong in (*targets, y.numpy(), y.tolist(), None)),
    *(lambda wrong=wrong: choose_cut(model, wrong, [(x, y)], blocks=2) for wrong in (None, loss)),
    lambda: turnpike_profile(model, loss, [(x, y)]),
    lambda: verify_crop(model, smaller, loss),
    lambda: choose_cut(model, profile, loss, blocks=2),
    lambda: dissipativity(model, [(x, y)]),
    lambda: turnpike_profile(None, [(x, y)], loss),
    lambda: StageCost("runs/digits", loss),
    *(lambda w=w: StageCost(model, loss, w) for w in ("0.1", None, [0.1], True, float("inf"))),
    *(lambda w=w: StageCost(model, loss, control_cost=w) for w in ("0.1", None, -1.0)),
    *(lambda k=k: StageCost(model, loss, control_cost_kind=k) for k in ("l2", None, ["kinetic"])),
    *(lambda k=k: StageCost(model, loss, layers=k) for k in (0, 1.5, True, "2")),
    *(lambda w=w: Distillation(model, loss, model, teacher_weight=w) for w in ("0.1", None, 2)),
    *(lambda w=w: Distillation(model, loss, model, temperature=w) for w in ("1", None, 0)),
    *(lambda w=w: SoftCrossEntropy(4, w) for w in ("0.1", None, [0.1])),
    *(lambda w=w: SoftCrossEntropy(w) for w in ("4", None, 4.0, True)),
    *(lambda w=w: choose_cut(model, profile, [(x, y)], accuracy=w) for w in ("a", [0], 1, 0.5, 50)),
    *(lambda w=w: choose_cut(model, profile, blocks=w) for w in ("a", [2], 1.5)),
    *(lambda w=w: profile.depth_within(w) for w in ("a", None, 1, 0.5)),
    *(lambda w=w: profile.entry(w) for w in ("a", -1, [1])),
    *(lambda w=w: fade.set_step(w) for w in ("1", None, 2)),
]
"""


def test_every_one_is_an_input_error_of_one_line(refused_calls: Callable[[str], None]) -> None:
    refused_calls(SCRIPT)
