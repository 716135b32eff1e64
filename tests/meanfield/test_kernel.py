"""The kernel of features against numpy, and the inequality that it gives, on real gradients."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from flow_networks import STATE, X, backward, chain, drawn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from deeplimit import InputError
from deeplimit.meanfield import slope
from deeplimit.meanfield.kernel import feature_kernel
from deeplimit.network import (
    Architecture,
    ConvolutionalResidual,
    ResidualChain,
    ResidualClassifier,
    TwoLayerResidual,
    anatomy,
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
    factors, lipschitz = [], 0.0
    states = [x.detach() for x in model.trajectory(X)]
    for n, block in enumerate(model):
        w, v = block.inner.weight.detach().numpy(), block.outer.weight.detach().numpy()
        derivatives = 1 - np.tanh(block.inner(states[n]).detach().numpy()) ** 2
        every = [v @ np.diag(s) @ w for s in derivatives]
        lipschitz += model.step * max(np.linalg.norm(j, 2) for j in every)
        least = [np.linalg.svd(np.eye(STATE) + model.step * j)[1][-1] for j in every]
        factors.append(np.array(least) ** 2)
    tails = [np.prod([np.ones(len(X)), *factors[n + 1 :]], axis=0) for n in range(4)]
    assert found.attenuation == pytest.approx([tail.min() for tail in tails], rel=1e-9)
    assert found.lipschitz == pytest.approx(lipschitz, rel=1e-9)
    by_sample = sum(value * tail for value, tail in zip(found.smallest, tails, strict=True)) / 4
    assert found.m == pytest.approx(by_sample.min() / len(X), rel=1e-9)


@pytest.mark.slow
def test_in_the_limit_the_attenuation_is_at_least_the_papers() -> None:
    """e^{−2 L_x}, up to O(1/N)."""
    for horizon in (8, 64):
        found = feature_kernel(chain(horizon, 9, size=2.0), X)
        assert min(found.attenuation) > math.exp(-2 * found.lipschitz) * (1 - 4 / horizon)
        assert found.attenuation[0] < found.attenuation[-1] == 1


@pytest.mark.parametrize("seed", range(4))
def test_the_slope_is_never_below_what_the_kernel_says(seed: int) -> None:
    """‖∇L‖² ≥ 2mL, from real gradients of networks with strong layers."""
    model = chain(5, 9, size=2.0, seed=seed)
    m = feature_kernel(model, X).m
    risk = backward(model)
    assert m > 0
    assert slope(model) ** 2 >= 2 * m * risk


def least_rate(model: ResidualChain, x: Tensor, *, of: str = "all") -> float:
    """The least m̂ = ‖∇L‖²/(2L) of all errors e: of G/D, for ‖∇L‖² = eᵀG e/D² and L = ‖e‖²/(2D).

    G is the Gram matrix of the gradients of the outputs, number by number, in the particles'
    metric: N·M·h² of ‖dV‖², 1/(N·M) of ‖dW‖² and ‖db‖².
    """
    count, rows = len(model), []
    for value in model(x).flatten():
        gradients = torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
        row = []
        for (name, _), g in zip(model.named_parameters(), gradients, strict=True):
            width = model[int(name.split(".")[0])].inner.out_features
            root = math.sqrt(count * width)
            scale = 1 / (model.step * root) if name.endswith("outer.weight") else root
            if of in ("all", name.split(".")[1]):
                row.append(scale * g.flatten())
        rows.append(torch.cat(row))
    every = torch.stack(rows)
    return float(torch.linalg.eigvalsh(every @ every.T)[0]) / len(x)


@torch.no_grad()
def kinks(inner: list[float], bias: list[float], outer: list[float], h: float) -> ResidualChain:
    """x + h v Σ_k tanh(w_k x + b_k), layer by layer of another v."""
    blocks = [TwoLayerResidual(1, len(inner), "tanh").double() for _ in outer]
    for block, v in zip(blocks, outer, strict=True):
        block.inner.weight.copy_(torch.tensor(inner)[:, None])
        block.inner.bias.copy_(torch.tensor(bias))
        block.outer.weight.fill_(v)
    return ResidualChain(blocks, step=h)


EXPANDING = {
    "the last": (kinks([100, 100], [0.5, -0.5], [0.0, 0.03], 0.5), 0.01),
    "order one": (kinks([1, 1], [0.5, -0.5], [0.0, 3.0], 0.5), 1.0),
}


@pytest.mark.parametrize("name", EXPANDING)
def test_layers_that_expand_lend_nothing_to_those_behind_them(name: str) -> None:
    """The last layer's gradient has passed no layer: it must not be counted as if it had."""
    model, size = EXPANDING[name]
    x = torch.tensor([[size], [-size]], dtype=torch.float64)
    assert 0 < feature_kernel(model, x).m <= least_rate(model, x, of="outer")
    assert least_rate(model, x, of="outer") <= least_rate(model, x)


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(st.integers(2, 4), st.integers(1, 3), st.floats(0.1, 5), st.integers(0, 10**6))
def test_of_mirrored_samples_and_an_expanding_layer_the_bound_is_sharp(
    horizon: int, pairs: int, v: float, seed: int
) -> None:
    """x and −x, neurons in pairs of b and −b: the worst error is the same in every layer."""
    w, b = drawn(pairs, seed=seed).abs() + 0.1, drawn(pairs, seed=seed + 1)
    neurons = torch.cat([w, w]).tolist(), torch.cat([b, -b]).tolist()
    model = kinks(*neurons, [0.0] * (horizon - 1) + [v], 1 / horizon)
    x = drawn(1, 1, seed=seed + 2).abs() * torch.tensor([[1.0], [-1.0]])
    found = feature_kernel(model, x)
    assert found.attenuation[0] > 1
    expected = least_rate(model, x, of="outer")
    assert found.m == pytest.approx(expected, rel=1e-6, abs=1e-14 * found.attenuation[0])


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.floats(-5, 20), st.floats(0.3, 3), st.integers(0, 10**6))
def test_m_is_a_lower_bound_whatever_the_error(
    horizon: int, growth: float, gain: float, seed: int
) -> None:
    """φ near growth · x: layers that expand, contract, or turn the state round."""
    model = chain(horizon, 9, size=0.5, gain=gain, seed=seed)
    x = drawn(4, STATE, seed=seed)
    with torch.no_grad():
        for block in model:
            block.outer.weight.add_(growth * torch.linalg.pinv(block.inner.weight))
    assert feature_kernel(model, x).m <= least_rate(model, x, of="outer") * (1 + 1e-9) + 1e-15


def test_the_bound_is_sharp_where_the_layers_are_alike_on_all_samples() -> None:
    """V = 0: every a_n is 1, and G's least eigenvalue that of the mean of the kernels."""
    model = chain(3, 9, size=0.0)
    with torch.no_grad():
        for block in model:
            block.inner.load_state_dict(model[0].inner.state_dict())
    assert feature_kernel(model, X).m == pytest.approx(least_rate(model, X, of="outer"), rel=1e-7)


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
    assert found.m == pytest.approx(s**2 * np.mean(found.smallest) / 6, rel=1e-12)
    assert (found.lipschitz, found.attenuation) == (0, (1, 1, 1))
    risk = (model(x) - drawn(6, 2, seed=3)).square().sum() / 12
    risk.backward()
    assert slope(model, others=0.0) ** 2 >= 2 * found.m * float(risk.detach()) > 0
    assert feature_kernel(classifier(4), x).m == 0
    assert "more outputs" in feature_kernel(classifier(4), x).verdict


def test_what_it_says() -> None:
    good = feature_kernel(chain(3, [9, 20, 20]), X)
    assert good.verdict.startswith(
        f"the width suffices for 7 samples at this start: m ≥ {good.m:.3g} (λ_min"
    )
    partly = feature_kernel(chain(3, [9, 6, 20]), X)
    assert partly.smallest[1] == 0 < partly.m
    assert partly.verdict.endswith("(λ_min = 0, in layer 1; 1 of 3 layers add nothing)")
    narrow = feature_kernel(chain(3, [4, 6, 5]), X)
    assert narrow.m == 0
    assert "no layer has more than 6 particles for 7 samples" in narrow.verdict


def test_a_width_that_was_not_shown_to_suffice_is_not_said_not_to() -> None:
    """Four layers of 6 particles, 7 samples: K of every layer is singular, their sum is not."""
    model = chain(4, [6, 6, 6, 6])
    found = feature_kernel(model, X)
    states = anatomy(model).states(X)[0]
    features = [b.activation(b.inner(x)) for b, x in zip(model, states, strict=False)]
    kernels = [(f @ f.T / 6).detach().numpy() for f in features]
    assert all(np.linalg.eigvalsh(k)[0] < 1e-12 for k in kernels)
    assert np.linalg.eigvalsh(sum(kernels))[0] > 1e-6
    assert found.m == 0
    assert found.verdict.startswith("no rate is guaranteed")
    assert "sufficient, not necessary" in found.verdict


def test_what_it_says_of_equal_samples() -> None:
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
    "state size": (lambda: chain(2, 4), drawn(6, 5), "shape .6, 5. given; .* takes .samples, 3."),
    "features": (lambda: classifier(2), drawn(6, 4), "shape .6, 4. given; .* takes .samples, 5."),
    "float32": (lambda: chain(2, 4), X.float(), r"torch.float32 given .*x.to\(torch.float64"),
    "float64": (lambda: classifier(2).float(), drawn(6, 5), r"x.to\(torch.float32"),
    "shared": (lambda: ResidualChain([chain(1, 9)[0]] * 2), X, "share their output weights"),
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


class PreNorm(nn.Module):
    """x ↦ V tanh(W n(x) + b) with a layer norm n that learns nothing."""

    def __init__(self, d: int, width: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(d, width), nn.Linear(width, d, bias=False)
        self.norm, self.activation = nn.LayerNorm(d, eps=0.0, elementwise_affine=False), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.activation(self.inner(self.norm(x))))


def test_a_norm_in_front_is_part_of_the_features() -> None:
    """Samples x and 3x, which the norm makes one: nothing tells them apart, and m says so."""
    torch.manual_seed(0)
    model = ResidualChain([PreNorm(4, 30) for _ in range(3)], step=0.3).double()
    x = drawn(3, 4)
    with torch.no_grad():
        states = anatomy(model).states(x)[0]
    found = feature_kernel(model, x)
    for block, state, value in zip(model, states, found.smallest, strict=False):
        features = torch.tanh(block.inner(block.norm(state))).detach().numpy()
        assert value == pytest.approx(np.linalg.eigvalsh(features @ features.T / 30)[0], rel=1e-8)
    twice = feature_kernel(ResidualChain([model[0]], step=0.3), torch.cat([x, 3 * x]))
    assert twice.smallest == (0.0,)
    assert twice.m == 0
