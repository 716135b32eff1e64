"""The soft cross-entropy against its definition, PyTorch's label smoothing, and 50-digit sums."""

import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from bare_process import BareProcess
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deeplimit import InputError, SoftCrossEntropy

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True)
SIZES = [-12.0, -8.0, -6.0, -4.0, -2.0, 0.0, 1.0, 2.0]


@st.composite
def problems(draw: st.DrawFn) -> tuple[SoftCrossEntropy, Tensor, Tensor]:
    """A loss, logits of any size and targets; C = 2 … 20 and ε over its whole range."""
    classes = draw(st.integers(2, 20))
    part = draw(st.floats(1e-4, 0.999))
    loss = SoftCrossEntropy(classes, part * (1 - 1 / classes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    size = 10 ** draw(st.sampled_from(SIZES))
    noise = size * torch.randn(5, classes, generator=generator, dtype=torch.float64)
    targets = torch.randint(classes, (5,), generator=generator)
    return loss, loss.minimiser(targets, torch.float64) + noise, targets


def distribution(loss: SoftCrossEntropy, target: int) -> np.ndarray:
    q = np.full(loss.classes, loss.softness / (loss.classes - 1))
    q[target] = 1 - loss.softness
    return q


def naive(loss: SoftCrossEntropy, z: Tensor, y: Tensor) -> list[float]:
    """−Σ_c q_c log(e^{z_c} / Σ e^{z_k}), a sample at a time."""
    values = []
    for row, target in zip(z.numpy(), y.tolist(), strict=True):
        top = row.max()
        log_softmax = row - top - math.log(np.exp(row - top).sum())
        values.append(-float(distribution(loss, target) @ log_softmax))
    return values


def exact_excess(loss: SoftCrossEntropy, z: list[float], target: int) -> Decimal:
    """KL(q ‖ softmax z) with 50 digits."""
    with localcontext() as context:
        context.prec = 50
        softness = Decimal(loss.softness)
        q = [softness / (loss.classes - 1)] * loss.classes
        q[target] = 1 - softness
        logits = [Decimal(value) for value in z]
        log_sum = sum(value.exp() for value in logits).ln()
        return sum(
            weight * (weight.ln() - value + log_sum)
            for weight, value in zip(q, logits, strict=True)
        )


@given(problems())
@SETTINGS
def test_it_is_its_definition(problem: tuple[SoftCrossEntropy, Tensor, Tensor]) -> None:
    loss, z, y = problem
    expected = torch.tensor(naive(loss, z, y), dtype=torch.float64)
    assert torch.allclose(loss(z, y), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("smoothing", [0.01, 0.1, 0.7])
def test_it_is_label_smoothing_under_the_stated_map(classes: int, smoothing: float) -> None:
    loss = SoftCrossEntropy(classes, smoothing * (classes - 1) / classes)
    generator = torch.Generator().manual_seed(0)
    z = 3 * torch.randn(50, classes, generator=generator, dtype=torch.float64)
    y = torch.randint(classes, (50,), generator=generator)
    theirs = F.cross_entropy(z, y, reduction="none", label_smoothing=smoothing)
    assert torch.allclose(loss(z, y), theirs, rtol=1e-12, atol=1e-12)
    expected = torch.tensor(naive(loss, z, y), dtype=torch.float64)
    assert torch.allclose(theirs, expected, rtol=1e-12, atol=1e-12)


@given(problems(), st.floats(-50, 50))
@SETTINGS
def test_the_minimum_is_the_entropy_on_the_whole_line(
    problem: tuple[SoftCrossEntropy, Tensor, Tensor], alpha: float
) -> None:
    loss, z, y = problem
    q = distribution(loss, 0)
    entropy = -float((q * np.log(q)).sum())
    assert loss.minimum == pytest.approx(entropy, rel=1e-13)
    assert loss.contrast == pytest.approx(math.log(q[0] / q[1]), rel=1e-9, abs=1e-12)
    on_line = loss.minimiser(y, torch.float64) + alpha
    assert torch.allclose(
        loss(on_line, y), torch.tensor(entropy, dtype=torch.float64), rtol=1e-12, atol=1e-13
    )
    assert loss(z, y).min() >= loss.minimum - 1e-12
    assert loss.minimiser(y, torch.float64).exp().sum(-1).numpy() == pytest.approx(1, rel=1e-14)


@given(problems())
@SETTINGS
def test_the_excess_is_a_divergence(problem: tuple[SoftCrossEntropy, Tensor, Tensor]) -> None:
    loss, z, y = problem
    excess = loss.excess(z, y)
    assert excess.min() >= -1e-28  # each term is ≥ 0 up to the rounding of expm1
    assert torch.allclose(excess, loss(z, y) - loss.minimum, rtol=1e-11, atol=1e-12)
    q = torch.stack([torch.from_numpy(distribution(loss, t)) for t in y.tolist()])
    divergence = F.kl_div(z.log_softmax(-1), q, reduction="none").sum(-1)
    assert torch.allclose(excess, divergence, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("size", [1e-2, 1e-4, 1e-6, 1e-8])
def test_the_excess_is_accurate_near_the_minimisers(classes: int, size: float) -> None:
    loss = SoftCrossEntropy(classes, 0.07)
    generator = torch.Generator().manual_seed(1)
    y = torch.randint(classes, (20,), generator=generator)
    delta = size * torch.randn(20, classes, generator=generator, dtype=torch.float64)
    z = loss.minimiser(y, torch.float64) + delta
    excess = loss.excess(z, y)
    for row, target, value in zip(z.tolist(), y.tolist(), excess.tolist(), strict=True):
        exact = float(exact_excess(loss, row, target))
        # The logits carry rounding of about 1e-15, and KL is quadratic in their distance.
        assert value == pytest.approx(exact, rel=1e-13 + 2e-14 / size)
        # ℓ − H itself would be lost: it is a difference of numbers of size 1.
    q = torch.stack([torch.from_numpy(distribution(loss, t)) for t in y.tolist()])
    apart = delta - delta.mean(-1, keepdim=True)
    quadratic = 0.5 * ((q * apart**2).sum(-1) - (q * apart).sum(-1) ** 2)
    assert torch.allclose(excess, quadratic, rtol=4 * size + 2e-14 / size, atol=0)


@pytest.mark.slow
@given(problems(), st.floats(-100, 100))
@SETTINGS
def test_values_and_distance_do_not_see_a_shift(
    problem: tuple[SoftCrossEntropy, Tensor, Tensor], shift: float
) -> None:
    loss, z, y = problem
    for measure in (loss, loss.excess, loss.distance):
        assert torch.allclose(measure(z + shift, y), measure(z, y), rtol=1e-9, atol=1e-11)


@pytest.mark.slow
@given(problems(), st.floats(-100, 100))
@SETTINGS
def test_the_distance_is_zero_on_the_line_alone(
    problem: tuple[SoftCrossEntropy, Tensor, Tensor], alpha: float
) -> None:
    loss, z, y = problem
    on_line = loss.minimiser(y, torch.float64) + alpha
    assert loss.distance(on_line, y).max() < 1e-12
    assert loss.excess(on_line, y).max() < 1e-24
    apart = z - loss.minimiser(y, torch.float64)
    spread = apart.amax(-1) - apart.amin(-1)
    # max − min is at most √2 times the distance, and the distance at most √C/2 times it.
    distance = loss.distance(z, y)
    assert (spread <= 2**0.5 * distance + 1e-12).all()
    assert (distance <= loss.classes**0.5 / 2 * spread + 1e-12).all()


@given(problems())
@SETTINGS
def test_the_distance_is_a_least_squares_over_the_line(
    problem: tuple[SoftCrossEntropy, Tensor, Tensor],
) -> None:
    loss, z, y = problem
    ones = np.ones((loss.classes, 1))
    for row, target, distance in zip(z.numpy(), y.tolist(), loss.distance(z, y), strict=True):
        apart = row - np.log(distribution(loss, target))
        alpha, *_ = np.linalg.lstsq(ones, apart, rcond=None)
        assert float(distance) == pytest.approx(
            np.linalg.norm(apart - alpha[0]), rel=1e-10, abs=1e-13
        )


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_far_away_the_excess_grows_linearly(classes: int) -> None:
    loss = SoftCrossEntropy(classes, 0.1)
    direction = torch.randn(classes, generator=torch.Generator().manual_seed(2)).double()
    y = torch.tensor([1])
    near, far, farther = (loss.excess(t * direction[None], y) for t in (1e3, 2e3, 3e3))
    q = torch.from_numpy(distribution(loss, 1))
    slope = direction.max() - q @ direction  # of log Σ e^{z} − Σ q z
    assert torch.allclose(far - near, 1e3 * slope, rtol=1e-12)
    assert torch.allclose(farther - far, 1e3 * slope, rtol=1e-12)
    steps = loss.distance(2e3 * direction[None], y) - loss.distance(1e3 * direction[None], y)
    assert torch.allclose(steps, 1e3 * (direction - direction.mean()).norm(), rtol=1e-4)


@pytest.mark.parametrize("name", ["forward", "excess", "distance"])
def test_gradients(name: str) -> None:
    loss = SoftCrossEntropy(5, 0.2)
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    y = torch.randint(5, (3, 4), generator=generator)
    assert torch.autograd.gradcheck(lambda z: getattr(loss, name)(z, y), (z,))


def test_the_gradient_is_softmax_minus_q() -> None:
    loss = SoftCrossEntropy(4, 0.1)
    z = torch.randn(3, 4, generator=torch.Generator().manual_seed(4)).double().requires_grad_()
    y = torch.tensor([0, 3, 1])
    (gradient,) = torch.autograd.grad(loss(z, y).sum(), z)
    q = torch.stack([torch.from_numpy(distribution(loss, t)) for t in y.tolist()])
    assert torch.allclose(gradient, z.softmax(-1) - q, rtol=1e-13, atol=1e-14)
    on_line = (loss.minimiser(y, torch.float64) + 2).requires_grad_()
    (gradient,) = torch.autograd.grad(loss.distance(on_line, y).sum(), on_line)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 1, 3), (0,), (4, 0)])
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    loss = SoftCrossEntropy(4, 0.3)
    generator = torch.Generator().manual_seed(5)
    z = torch.randn(*shape, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(4, shape, generator=generator)
    for measure in (loss, loss.excess, loss.distance):
        values = measure(z, y)
        assert values.shape == shape
        flat = measure(z.reshape(-1, 4), y.reshape(-1))
        assert torch.equal(values.reshape(-1), flat)
    assert loss.minimiser(y, torch.float64).shape == (*shape, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_keep_the_logits_precision(dtype: torch.dtype) -> None:
    loss = SoftCrossEntropy(3)
    z, y = torch.zeros(2, 3, dtype=dtype), torch.tensor([0, 1])
    assert {m(z, y).dtype for m in (loss, loss.excess, loss.distance)} == {dtype}
    # d_0 = log((1−ε)(C−1)/ε)·√(1−1/C), the distance at zero logits
    d_0 = math.log(0.95 * 2 / 0.05) * math.sqrt(2 / 3)
    assert float(loss.distance(z, y)[0]) == pytest.approx(d_0, rel=1e-6)


@pytest.mark.parametrize("softness", [0.0, -0.1, 0.75, 0.8, 1.0, float("nan"), float("inf")])
def test_a_softness_out_of_range_is_refused(softness: float) -> None:
    with pytest.raises(InputError, match=r"softness .* between 0 and 1 − 1/C = 0\.75"):
        SoftCrossEntropy(4, softness)


@pytest.mark.parametrize("classes", [1, 0, -3])
def test_too_few_classes_are_refused(classes: int) -> None:
    with pytest.raises(InputError, match="needs at least 2"):
        SoftCrossEntropy(classes)


def test_logits_of_other_classes_are_refused() -> None:
    loss, y = SoftCrossEntropy(4), torch.tensor([0, 1])
    for measure in (loss, loss.excess, loss.distance):
        with pytest.raises(InputError, match=r"shape \(2, 5\) given; expected \[\.\.\., 4\]"):
            measure(torch.zeros(2, 5), y)


@pytest.mark.slow
def test_targets_of_another_shape_are_refused(bare_process: BareProcess) -> None:
    """In a process without the suite's own shape checks, which would answer first."""
    script = """
import torch
from deeplimit import InputError, SoftCrossEntropy
loss = SoftCrossEntropy(4)
for measure in (loss, loss.excess, loss.distance):
    for shape in ((6,), (3, 2), (1, 3), (3,), ()):
        try:
            measure(torch.zeros(2, 3, 4), torch.zeros(shape, dtype=torch.long))
        except InputError as error:
            print(error)
"""
    lines = bare_process.run(script).stdout.splitlines()
    assert len(lines) == 15
    assert lines[0] == (
        "targets of shape (6,) given for logits of shape (2, 3, 4); expected (2, 3), "
        "a class per sample"
    )


def test_repr_says_what_it_is() -> None:
    assert repr(SoftCrossEntropy(10, 0.05)) == "SoftCrossEntropy(classes=10, softness=0.05)"


@pytest.mark.parametrize("wrong", [-1, 4, -99])
def test_a_target_that_is_no_class(wrong: int) -> None:
    loss, z, y = SoftCrossEntropy(4), torch.randn(3, 4), torch.tensor([0, wrong, -100])
    for function in (loss, loss.mean, loss.excess, loss.distance):
        with pytest.raises(InputError, match=r"expected classes, 0 … 3, or -100"):
            function(z, y)
