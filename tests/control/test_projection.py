"""Trajectories in a plane against NumPy's singular value decomposition."""

import math

import numpy as np
import pytest
import torch
from model_families import CLASSES, Sample, sample, shaken
from naive_networks import naive_logits, naive_walk
from torch import Tensor

from deeplimit import Heun, InputError, ResidualChain, SoftCrossEntropy
from deeplimit.control import picture_trajectories
from deeplimit.network import Architecture, TwoLayerResidual

LOSS = SoftCrossEntropy(CLASSES, 0.1)


def batches(x: Tensor, y: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(size), y.split(size), strict=True))


def test_logits_of_more_classes_lie_on_their_principal_axes(family: Sample) -> None:
    picture = picture_trajectories(family.model, batches(family.x, family.y, 4), LOSS, samples=5)
    with torch.no_grad():
        model = family.model.eval()
        walk, _ = naive_walk(model, family.x[:5])
        z = np.stack([naive_logits(model, m, s).numpy() for m, s in walk])
    centred = z - z.mean(-1, keepdims=True)
    flat = centred.reshape(-1, CLASSES)
    centre = flat.mean(0)
    _, spread, axes = np.linalg.svd(flat - centre, full_matrices=False)
    points = np.array(picture.points)
    assert points.shape == (family.depth + 1, 5, 2)
    expected = (centred - centre) @ axes[:2].T
    signs = np.sign((points * expected).sum((0, 1)))
    # Points are rounded to four decimals.
    assert np.allclose(points, expected * signs, atol=6e-5)
    assert picture.explained == pytest.approx((spread[:2] ** 2).sum() / (spread**2).sum(), rel=1e-9)
    assert picture.plane == "logits"
    assert picture.labels == tuple(family.y[:5].tolist())
    for c, (start, end) in enumerate(picture.minimisers):
        q = np.full(CLASSES, 0.1 / (CLASSES - 1))
        q[c] = 0.9
        log_q = np.log(q)
        on_plane = (log_q - log_q.mean() - centre) @ axes[:2].T * signs
        assert start == end == pytest.approx(on_plane, rel=1e-9, abs=1e-9)
    assert all(module.training for module in family.model.modules()) is False
    assert family.model.training is False


@pytest.mark.parametrize("scheme", [None, Heun()])
def test_states_in_the_plane_are_shown_as_they_are(scheme: Heun | None) -> None:
    torch.manual_seed(0)
    chain = shaken(ResidualChain([TwoLayerResidual(2, 5, "tanh") for _ in range(4)], scheme=scheme))
    x, y = torch.randn(7, 2).double(), torch.tensor([0, 1, 0, 1, 1, 0, 1])
    loss = SoftCrossEntropy(2, 0.05)
    picture = picture_trajectories(chain, batches(x, y, 3), loss)
    states = torch.stack(chain.trajectory(x)).detach()
    assert picture.plane == "state"
    assert picture.explained == 1
    assert np.allclose(np.array(picture.points), states.numpy(), atol=6e-5)
    reach = float(states.abs().max())
    for c, (start, end) in enumerate(picture.minimisers):
        log_q = np.log([0.95, 0.05] if c == 0 else [0.05, 0.95])
        assert start == pytest.approx(log_q - reach, rel=1e-9)
        assert end == pytest.approx(log_q + reach, rel=1e-9)
        # Both ends are minimisers.
        for point in (start, end):
            assert (
                float(loss.distance(torch.tensor([point], dtype=torch.float64), torch.tensor([c])))
                < 1e-9
            )
    assert chain.training


def test_two_classes_behind_a_head_are_shown_as_logits() -> None:
    model = shaken(Architecture("vector", (2,), 2, (2,), width=2, hidden=3).build())
    x, y = (
        torch.randn(5, 2, generator=torch.Generator().manual_seed(0)).double(),
        torch.arange(5) % 2,
    )
    picture = picture_trajectories(model, [(x, y)], SoftCrossEntropy(2, 0.05))
    assert picture.plane == "logits"
    assert picture.explained == pytest.approx(1)  # centred, two classes lie on one line
    points = np.array(picture.points)
    assert np.abs(points[..., 1]).max() < 1e-3
    walk, _ = naive_walk(model.eval(), x)
    z = torch.stack([naive_logits(model, m, s) for m, s in walk]).detach()
    spread = (z[..., 0] - z[..., 1]) / math.sqrt(2)
    assert np.allclose(np.abs(points[..., 0]), (spread - spread.mean()).abs().numpy(), atol=6e-5)


def test_a_single_sample_and_a_single_layer() -> None:
    x, y = torch.tensor([[1.0, 2.0, 4.0]]).double(), torch.tensor([1])
    picture = picture_trajectories(ResidualChain([]), [(x, y)], SoftCrossEntropy(3))
    assert picture.points == (((0.0, 0.0),),)
    assert all(math.isfinite(v) for ends in picture.minimisers for point in ends for v in point)


def test_only_as_many_batches_as_needed_are_read() -> None:
    family = sample("chain")

    def loader():
        yield family.x, family.y
        raise AssertionError("a second batch was asked for")

    picture = picture_trajectories(family.model, loader(), LOSS, samples=6)
    assert len(picture.labels) == 6
    assert family.model.training


def test_an_empty_loader_is_refused() -> None:
    with pytest.raises(InputError, match="loader gave no batch"):
        picture_trajectories(sample("chain").model, [], LOSS)
