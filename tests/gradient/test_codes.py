"""Codes against a reference that goes number by number, and what feedback in depth is for."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_codes import naive_chain, naive_quantised
from torch import Tensor

from deeplimit.gradient.codes import BITS, GROUP, Code, Feedback, encode

SHAPES = [(64,), (5, 6), (3, 7, 11), (2, 8, 8, 8), (1,), (), (0,), (4, 0, 3), (2, 200)]
ROUNDING = {torch.float64: 1e-14, torch.float32: 3e-6, torch.bfloat16: 3e-6}


def states_of(
    shape: tuple[int, ...], depth: int, dtype: torch.dtype = torch.float64, seed: int = 0
) -> list[Tensor]:
    """A walk x_0, …, x_N whose steps are of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    found = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)]
    for n in range(depth):
        step = torch.randn(shape, generator=generator, dtype=torch.float64)
        found.append((found[-1] + (0.1 + n % 3) * step).to(dtype))
    return found


def rebuilt(states: list[Tensor], bits: int) -> tuple[list[Tensor], list[Code]]:
    """x̂_0, …, x̂_N and the codes."""
    feedback = Feedback(states[0])
    codes = [feedback.code(y, bits) for y in states[1:]]
    return [feedback.state(n) for n in reversed(range(len(states)))][::-1], codes


def numbers_of(code: Code) -> Tensor:
    """Q_b(v) in one row."""
    return (code.levels(torch.float64) * code.scales.double()).flatten()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize("shape", SHAPES)
def test_a_chain_is_that_of_the_reference(
    shape: tuple[int, ...], dtype: torch.dtype, bits: int
) -> None:
    states = states_of(shape, 9, dtype)
    got, _ = rebuilt(states, bits)
    for a, b in zip(got, naive_chain(states, bits), strict=True):
        assert a.shape == shape
        off = (a.double() - b).abs() > ROUNDING[dtype]
        # In float32 a number between two levels may be rounded to the other one.
        assert off.sum() <= (dtype != torch.float64) * (0.005 * off.numel() + 1)


@settings(deadline=None, max_examples=60)
@given(
    numbers=st.lists(
        st.floats(-1e30, 1e30) | st.floats(-1e-30, 1e-30) | st.just(0.0), min_size=1, max_size=150
    ),
    bits=st.sampled_from(BITS),
)
def test_the_error_is_half_a_quantum_at_most(numbers: list[float], bits: int) -> None:
    row = torch.zeros(-(-len(numbers) // GROUP) * GROUP, dtype=torch.float64)
    row[: len(numbers)] = torch.tensor(numbers, dtype=torch.float64)
    code, _ = encode(row.view(-1, GROUP).clone(), bits)
    error = row - numbers_of(code)
    expected, scale = naive_quantised(row, bits)
    whole = scale > 1e-34  # what is below counts as zero
    rounding = 1e-15 * row.abs()  # v/s may be rounded to the next level where it lies between two
    assert ((error.abs() - scale / 2)[whole] <= (scale * 1e-6 + rounding)[whole]).all()
    assert (error[~whole].abs() <= 1e-33).all()
    gap = (numbers_of(code) - expected).abs()
    between = ((row / scale) % 1 - 0.5).abs() < 1e-9
    assert (gap[whole] <= (1.001 * scale * between)[whole]).all()


@pytest.mark.parametrize("bits", BITS)
def test_codes_are_packed_and_unpacked_exactly(bits: int) -> None:
    """Every level at every place in a byte."""
    half = 2 ** (bits - 1)
    levels = torch.arange(1 - half, half, dtype=torch.float64).repeat(GROUP)
    k = levels[torch.randperm(len(levels))].view(-1, GROUP)
    k[:, 0] = (half - 0.5) * (1 - 2e-6)  # so that the scale is a power of two
    scale = 2.0 ** torch.randint(-9, 9, (len(k), 1)).double()
    left = k * scale
    code, steps = encode(left, bits)
    assert code.packed.dtype == torch.int8
    assert code.packed.numel() * 8 == k.numel() * bits
    assert code.scales.dtype == torch.bfloat16
    assert torch.equal(code.scales.double(), scale)
    assert torch.equal(steps, scale)
    assert torch.equal(code.levels(torch.float64)[:, 1:], k[:, 1:])
    assert torch.equal(code.levels(torch.float32)[:, 1:].double(), k[:, 1:])
    assert torch.equal(left, code.levels(torch.float64))


@pytest.mark.parametrize("bits", BITS)
def test_what_does_not_change_stays_as_it_is(bits: int) -> None:
    """Padding, or units that a ReLU holds at 0: exact among others that change."""
    states = states_of((4, 50), 9)
    for x in states:
        x[1] = 0
        x[:, ::3] = 7.5
    got, _ = rebuilt(states, bits)
    for x in got:
        assert (x[1, 1::3] == 0).all()
        assert (x[:, ::3] == 7.5).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("depth", [8, 32, 128])
def test_the_error_does_not_grow_with_depth(depth: int, bits: int) -> None:
    """x̂_n − x_n = −c_n, within half a quantum; the errors of codes by themselves add up."""
    states = states_of((GROUP,), depth)
    got, codes = rebuilt(states, bits)
    assert (got[0] - states[0]).abs().max() < 1e-12
    for n, code in enumerate(codes):
        assert (got[n + 1] - states[n + 1]).abs().max() <= float(code.scales[0]) * 0.50001
    alone = naive_chain(states, bits, feedback=False)
    usual = [float((a - x).norm()) for a, x in zip(got, states, strict=True)][depth // 2]
    assert usual < 0.5 * float((alone[0] - states[0]).norm()) * math.sqrt(32 / depth)


def test_an_outlier_channel_spoils_its_own_group_only() -> None:
    states = states_of((4, 4 * GROUP), 6)
    for n, x in enumerate(states):
        x[:, 7] *= 1e4 * (n + 1)
    got, _ = rebuilt(states, 4)
    clean, _ = rebuilt([x[:, GROUP:].contiguous() for x in states], 4)
    torch.testing.assert_close(got[3][:, GROUP:], clean[3], rtol=0, atol=1e-12)


@pytest.mark.parametrize("bits", BITS)
def test_a_huge_update_is_forgotten_by_the_feedback(bits: int) -> None:
    """c shrinks by 2^b − 1 from code to code, down to the quantum of the updates at hand."""
    states = states_of((GROUP,), 30)
    for x in states[10:]:
        x += 1e6 * torch.linspace(0, 1, GROUP)
    got, _ = rebuilt(states, bits)
    assert float((got[11] - states[11]).abs().max()) > 1e3 / 2**bits
    assert float((got[28] - states[28]).abs().max()) < 3


def test_states_keep_their_layout() -> None:
    states = [x.contiguous(memory_format=torch.channels_last) for x in states_of((2, 8, 4, 4), 5)]
    feedback = Feedback(states[0])
    feedback.code(states[1], 8)
    feedback.code(states[2], 8)
    assert states[2].stride() == feedback.state(2).stride() == feedback.state(1).stride()
    states = [x.T for x in states_of((5, 70), 5)]  # another order, and not whole groups
    got, _ = rebuilt(states, 8)
    assert (got[0] - states[0]).abs().max() < 1e-12
    cut = [x[:, ::2] for x in states_of((5, 70), 5)]  # with gaps between
    got, _ = rebuilt(cut, 8)
    assert (got[0] - cut[0]).abs().max() < 1e-12


def test_states_come_in_any_order_while_the_chain_goes_on() -> None:
    states = states_of((3, 50), 8)
    expected, _ = rebuilt(states, 4)
    feedback = Feedback(states[0])
    for n, y in enumerate(states[1:], 1):
        feedback.code(y, 4)
        for m in (0, n, n // 2, n // 2, n - 1):
            assert (feedback.state(m) - expected[m]).abs().max() < 1e-12


@pytest.mark.parametrize("bits", BITS)
def test_what_is_confined_is_within_half_a_quantum(bits: int) -> None:
    states = states_of((3, 50), 8)
    feedback = Feedback(states[0])
    codes = [feedback.code(y, bits) for y in states[1:]]
    x = feedback.state(7)
    for z in (states[7], x + 1e3, x - 1e3):
        near = feedback.confined(z, x, 7)
        assert float((near - x).abs().max()) <= float(codes[6].scales.max()) / 2 + 1e-14
        assert (near - states[7]).norm() <= (z - states[7]).norm() + 1e-14
    torch.testing.assert_close(feedback.confined(states[7], x, 7), states[7])
    assert feedback.confined(states[7], x, 0) is x


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e42])
def test_what_is_not_finite_is_seen(value: float, bits: int) -> None:
    row = torch.randn(3, GROUP, dtype=torch.float64)
    assert encode(row.clone(), bits)[0].largest().isfinite()
    row[1, 36] = value
    assert not encode(row, bits)[0].largest().isfinite()
