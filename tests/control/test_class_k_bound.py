"""KL ≥ α(dist): the class-K∞ function that strict dissipativity rests on."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deeplimit import SoftCrossEntropy
from deeplimit.control.trajectories import class_k_bound

CLASSES = [2, 3, 4, 10, 20]
PARTS = [1e-3, 0.05, 0.3, 0.7, 0.95, 0.999]  # ε as a fraction of 1 − 1/C


def loss_of(classes: int, part: float) -> SoftCrossEntropy:
    return SoftCrossEntropy(classes, part * (1 - 1 / classes))


def ratios(loss: SoftCrossEntropy, z: Tensor, y: Tensor) -> Tensor:
    return loss.excess(z, y) / class_k_bound(loss, loss.distance(z, y))


@pytest.mark.slow
@given(
    st.integers(2, 20),
    st.floats(1e-4, 0.9999),
    st.integers(0, 2**31),
    st.floats(-2, 3),
    st.booleans(),
)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_the_excess_of_random_logits_is_above_the_bound(
    classes: int, part: float, seed: int, size: float, sparse: bool
) -> None:
    loss = loss_of(classes, part)
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (200,), generator=generator)
    apart = torch.randn(200, classes, generator=generator, dtype=torch.float64)
    if sparse:  # logits that differ in a few classes only come closest to the bound
        apart *= torch.rand(200, classes, generator=generator) < 2 / classes
        apart[:, 0] += 1e-3
    z = loss.minimiser(y, torch.float64) + 10**size * apart
    assert ratios(loss, z, y).min() >= 1
    excess, bound = loss.excess(z, y), class_k_bound(loss, loss.distance(z, y))
    mean_bound = class_k_bound(loss, loss.distance(z, y).mean())
    assert excess.mean() >= bound.mean() >= mean_bound * (1 - 1e-14)


@pytest.mark.slow
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("part", PARTS)
def test_the_smallest_ratio_that_descent_finds_is_above_one(classes: int, part: float) -> None:
    """Minimises KL/α over directions on spheres of many radii around the minimisers."""
    loss = loss_of(classes, part)
    generator = torch.Generator().manual_seed(7)
    radii = torch.logspace(-2, 2, 25, dtype=torch.float64).repeat_interleave(4)[:, None]
    direction = torch.randn(100, classes, generator=generator, dtype=torch.float64)
    direction.requires_grad_()
    y = torch.zeros(100, dtype=torch.long)
    optimiser = torch.optim.Adam([direction], lr=0.1)

    def found() -> Tensor:
        centred = direction - direction.mean(-1, keepdim=True)
        unit = centred / centred.norm(dim=-1, keepdim=True)
        return ratios(loss, loss.minimiser(y, torch.float64) + radii * unit, y)

    for _ in range(60):
        optimiser.zero_grad()
        found().log().sum().backward()
        optimiser.step()
    assert found().min() >= 1


@pytest.mark.parametrize("classes", CLASSES)
def test_alpha_is_convex_and_of_class_k_infinity(classes: int) -> None:
    loss = loss_of(classes, 0.3)
    distance = torch.linspace(0, 50, 2001, dtype=torch.float64)
    alpha = class_k_bound(loss, distance)
    assert alpha[0] == 0
    assert (alpha.diff() > 0).all()
    assert (alpha.diff().diff() > -1e-12).all()
    assert alpha[1:41].diff().diff().min() > 0
    far = class_k_bound(loss, torch.tensor([1e6, 2e6], dtype=torch.float64))
    assert far[1] / far[0] == pytest.approx(2, rel=1e-5)  # unbounded, linear at last


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("part", PARTS)
def test_lambda_is_the_least_curvature_at_the_minimisers(classes: int, part: float) -> None:
    loss = loss_of(classes, part)
    q = loss.minimiser(torch.tensor(0), torch.float64).exp().numpy()
    curvatures = np.linalg.eigvalsh(np.diag(q) - np.outer(q, q))  # one is 0: the direction 1
    least = sorted(curvatures)[1]
    softness = loss.softness
    stated = 2 * softness * (1 - softness) if classes == 2 else softness / (classes - 1)
    assert stated == pytest.approx(least, rel=1e-9)
    # α(d) = λd²/2 + O(d³)
    small = torch.tensor(1e-5, dtype=torch.float64)
    assert float(class_k_bound(loss, small)) == pytest.approx(stated * 1e-10 / 2, rel=1e-4)
    d = 1.7
    value = stated / 2 * (math.exp(-math.sqrt(2) * d) - 1 + math.sqrt(2) * d)
    assert float(class_k_bound(loss, torch.tensor(d).double())) == pytest.approx(value, rel=1e-6)
