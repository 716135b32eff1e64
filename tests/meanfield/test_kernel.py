"""The kernel of features against numpy, and the inequality that it gives, on real gradients."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from flow_networks import STATE, X, backward, chain, drawn
from torch import Tensor, nn

from deeplimit import InputError
from deeplimit.meanfield.kernel import feature_kernel
from deeplimit.meanfield.slope import slope
from deeplimit.network import (
    Architecture,
    ConvolutionalResidual,
    ResidualChain,
    ResidualClassifier,
    TwoLayerResidual,
)


def test_the_smallest_eigenvalues_are_numpys() -> None:
    """Layer by layer, widths unequal; the kernel by a double loop over samples."""
    model = chain(4, [9, 8, 20, 12], size=2.0)
    found = feature_kernel(model, X)
    x = X.numpy()
    for block, value in zip(model, found.smallest, strict=True):
        w, b, v = (
            p.detach().numpy() for p in (block.inner.weight, block.inner.bias, block.outer.weight)
        )
        features = np.tanh(x @ w.T + b)
        kernel = [[np.dot(f, g) / len(w) for g in features] for f in features]
        assert value == pytest.approx(np.linalg.eigvalsh(np.array(kernel))[0], rel=1e-8)
        x = x + model.step * features @ v.T
    assert found.widths == (9, 8, 20, 12)
    assert found.samples == len(X)


def test_the_attenuation_is_the_one_of_the_jacobians() -> None:
    """Closed forms: dφ/dx = V diag(1 − tanh²) W."""
    model = chain(4, 9, size=2.0)
    found = feature_kernel(model, X)
    products, lipschitz = np.ones(len(X)), 0.0
    states = [x.detach() for x in model.trajectory(X)]
    for n, block in enumerate(model):
        w, v = block.inner.weight.detach().numpy(), block.outer.weight.detach().numpy()
        derivatives = 1 - np.tanh(block.inner(states[n]).detach().numpy()) ** 2
        every = [v @ np.diag(s) @ w for s in derivatives]
        lipschitz += model.step * max(np.linalg.norm(j, 2) for j in every)
        if n:
            least = [np.linalg.svd(np.eye(STATE) + model.step * j)[1][-1] for j in every]
            products *= np.array(least) ** 2
    assert found.attenuation == pytest.approx(products.min(), rel=1e-9)
    assert found.lipschitz == pytest.approx(lipschitz, rel=1e-9)
    assert found.m == pytest.approx(products.min() * min(found.smallest) / len(X), rel=1e-9)


def test_in_the_limit_the_attenuation_is_at_least_the_papers() -> None:
    """e^{−2 L_x}, up to O(1/N)."""
    for horizon in (8, 64):
        found = feature_kernel(chain(horizon, 9, size=2.0), X)
        assert found.attenuation > math.exp(-2 * found.lipschitz) * (1 - 4 / horizon)
        assert found.attenuation < 1


@pytest.mark.parametrize("seed", range(4))
def test_the_slope_is_never_below_what_the_kernel_says(seed: int) -> None:
    """‖∇L‖² ≥ 2mL, from real gradients of networks with strong layers."""
    model = chain(5, 9, size=2.0, seed=seed)
    m = feature_kernel(model, X).m
    risk = backward(model)
    assert m > 0
    assert slope(model) ** 2 >= 2 * m * risk


def worst_case(model: nn.Module, block: TwoLayerResidual, x: Tensor) -> Tensor:
    """The direction of the smallest eigenvalue [D, 1]."""
    with torch.no_grad():
        features = block.activation(block.inner(x))
        return torch.linalg.eigh(features @ features.T)[1][:, :1]


def test_the_inequality_is_attained() -> None:
    """One layer with V = 0 and an error along the worst direction: ‖∇L‖² = 2mL."""
    model = chain(1, 9, size=0.0)
    direction = worst_case(model, model[0], X)
    error = direction @ drawn(1, STATE)
    risk = error.square().sum() / (2 * len(X))
    model(X).backward(error / len(X))
    m = feature_kernel(model, X).m
    assert slope(model) ** 2 == pytest.approx(2 * m * float(risk), rel=1e-7)


def classifier(classes: int, hidden: int = 12, width: int = STATE) -> ResidualClassifier:
    torch.manual_seed(0)
    a = Architecture("vector", (5,), classes, (3,), width, hidden=hidden, activation="tanh")
    return a.build().double()


def test_a_head_counts_by_its_smallest_singular_value() -> None:
    """Layers that start at 0 have nothing but the head between error and features."""
    model, x = classifier(2), drawn(6, 5)
    found = feature_kernel(model, x)
    s = np.linalg.svd(model.head.weight.detach().numpy())[1][-1]
    assert found.m == pytest.approx(s**2 * min(found.smallest) / 6, rel=1e-12)
    assert (found.lipschitz, found.attenuation) == (0, 1)
    risk = (model(x) - drawn(6, 2, seed=3)).square().sum() / 12
    risk.backward()
    assert slope(model, others=0.0) ** 2 >= 2 * found.m * float(risk.detach()) > 0
    assert feature_kernel(classifier(4), x).m == 0
    assert "more outputs" in feature_kernel(classifier(4), x).verdict


def test_what_it_says() -> None:
    good = feature_kernel(chain(3, [9, 20, 20]), X)
    assert good.verdict.startswith(
        "the width suffices for 7 samples at this start: m ≥ 2.27e-05 (λ_min"
    )
    narrow = feature_kernel(chain(3, [9, 6, 20]), X)
    assert (narrow.m, narrow.smallest[1]) == (0, 0)
    assert "layer 1 has 6 particles for 7 samples" in narrow.verdict
    twice = feature_kernel(chain(3, 20), torch.cat([X[:3], X[:1]]))
    assert twice.m == 0
    assert "singular to working precision" in twice.verdict
    single = feature_kernel(chain(3, 20).float(), torch.cat([X, X + 1e-4]).float())
    assert single.m == 0


WRONG: dict[str, tuple[Callable[[], nn.Module], Tensor, str]] = {
    "one sample": (lambda: chain(2, 4), X[:1], "a batch of 1 given; the kernel needs at least 2"),
    "no sample": (lambda: chain(2, 4), X[:0], "a batch of 0 given"),
    "tokens": (lambda: chain(2, 4), X[None], "states of shape .1, 7, 3. found"),
    "nan": (lambda: chain(2, 4), X * math.nan, "the states are not finite"),
    "convolutions": (
        lambda: ResidualChain([ConvolutionalResidual(3, 4, "none").double()]),
        drawn(2, 3, 4, 4),
        "the kernel of a ConvolutionalResidual is not known",
    ),
    "head": (lambda: _other_head(), drawn(6, 5), "the head is Sequential; expected a linear head"),
    "stem": (
        lambda: nn.Sequential(nn.Linear(3, 3), chain(2, 4)),
        X,
        "the kernel of Sequential is not known here; expected a ResidualChain",
    ),
}


def _other_head() -> nn.Module:
    model = classifier(2)
    model.head = nn.Sequential(model.head, nn.Tanh())
    return model


@pytest.mark.parametrize("case", WRONG)
def test_what_has_no_kernel(case: str) -> None:
    make, x, message = WRONG[case]
    with pytest.raises(InputError, match=message):
        feature_kernel(make(), x)


def test_parameters_that_are_not_finite() -> None:
    model = chain(2, 4)
    model[0].inner.bias.data[0] = math.inf
    with pytest.raises(InputError, match=r"0\.inner\.bias has numbers that are not finite"):
        feature_kernel(model, X)
