"""cot_geodesic: end points, constant speed, weighted atoms, merged depths, frames, alignment."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from measured_networks import (
    classifier,
    cloud,
    framed,
    inputs,
    output,
    relative,
    sequential_chain,
    smooth_chain,
)
from torch import nn

from deeplimit import InputError
from deeplimit.meanfield import LayerwiseMeasure, align_streams, cot_distance, cot_geodesic

SIZES = st.tuples(st.integers(1, 3), st.integers(1, 5))
TIMES = st.floats(0, 1)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(SIZES, SIZES, st.booleans(), st.integers(0, 10**6), TIMES, TIMES)
def test_constant_speed(
    one: tuple, other: tuple, weighted: bool, seed: int, s: float, t: float
) -> None:
    a, b = cloud(*one, 3, seed=seed), cloud(*other, 3, seed=seed + 1, weighted=weighted)
    d = cot_distance(a, b).distance
    at_s, at_t = cot_geodesic(a, b, s), cot_geodesic(a, b, t)
    assert cot_distance(at_s, at_t).distance == pytest.approx(abs(s - t) * d, rel=1e-9, abs=1e-12)
    assert cot_distance(a, at_t).distance == pytest.approx(t * d, rel=1e-9, abs=1e-12)
    assert cot_distance(at_t, b).distance == pytest.approx((1 - t) * d, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("hidden", [6, 4])
def test_end_points_compute_what_the_networks_do(hidden: int) -> None:
    a, b = framed(1), framed(2, hidden=hidden)
    x = inputs(a)
    for t, model in ((0.0, a), (1.0, b)):
        point = cot_geodesic(a, b, t)
        assert cot_distance(point, model).distance < 1e-14
        assert relative(output(point.network().eval(), x), output(model, x)) < 1e-12


def test_equal_widths_move_the_particles_of_the_first() -> None:
    a, b = framed(1), framed(2)
    start, end = LayerwiseMeasure.of(a), LayerwiseMeasure.of(b)
    assert torch.equal(cot_geodesic(a, b, 0.0).particles, start.particles)
    ends = cot_geodesic(a, b, 1.0)
    for mine, theirs in zip(ends.layers, end.layers, strict=True):
        assert sorted(mine.tolist()) == sorted(theirs.tolist())
    third = cot_geodesic(a, b, 0.3).particles
    straight = 0.7 * start.particles + 0.3 * ends.particles
    assert torch.allclose(third, straight, rtol=1e-15)
    assert [len(block.inner.bias) for block in cot_geodesic(a, b, 0.3).network().stages[0]] == [
        6
    ] * 3


def test_unequal_widths_are_weighted_atoms() -> None:
    point = cot_geodesic(cloud(2, 4, 3), cloud(2, 6, 3, seed=1), 0.5)
    for layer, mass in zip(point.layers, point.masses, strict=True):
        assert len(layer) <= 4 + 6 - 1
        assert mass.sum() == pytest.approx(1, rel=1e-14)
        # lcm(4, 6) = 12 equal atoms would do as well.
        assert torch.allclose(mass * 12, (mass * 12).round(), atol=1e-12)


@pytest.mark.slow
def test_unequal_depths_change_an_end_points_output_by_one_over_n() -> None:
    """The layers of two networks of one smooth curve, N and N + 1 of them."""
    changes = []
    for depth in (8, 16, 32):
        a, b = smooth_chain(depth, seed=1), smooth_chain(depth + 1, seed=2)
        point = cot_geodesic(a, b, 0.0, frame="interpolate")
        assert point.depth == 2 * depth
        assert cot_distance(point, a).distance < 1e-14
        changes.append(relative(output(point.network(), inputs(a)), output(a, inputs(a))))
    assert 1.7 < changes[0] / changes[1] < 2.3
    assert 1.7 < changes[1] / changes[2] < 2.3


def test_a_layer_in_two_parts_adds_what_is_said() -> None:
    """θ(1 − θ)h² φ′(x)φ(x): of one layer against layers of 0.3 and 0.7, the remainder O(h³)."""
    remainders = []
    for h in (0.02, 0.01):
        a = smooth_chain(1, seed=1)
        a.step, x = h, inputs(a)
        end = LayerwiseMeasure.of(smooth_chain(2, seed=2))
        b = LayerwiseMeasure(end.layers, breakpoints=(0.0, 0.3, 1.0), frame=end.frame)
        change = cot_geodesic(a, b, 0.0, frame="interpolate").network()(x) - a(x)
        _, slope = torch.autograd.functional.jvp(a[0], x, a[0](x))
        remainders.append(float((change - 0.21 * h**2 * slope).detach().abs().max()))
        assert float(change.detach().abs().max()) > 20 * remainders[-1]
    assert 7 < remainders[0] / remainders[1] < 9


def test_an_end_whose_layers_are_not_divided_is_exact() -> None:
    a, b = smooth_chain(2, seed=1), smooth_chain(4, seed=2)
    x = inputs(a)
    ends = [cot_geodesic(a, b, t, frame="interpolate").network() for t in (0.0, 1.0)]
    assert relative(output(ends[1], x), output(b, x)) < 1e-12
    assert relative(output(ends[0], x), output(a, x)) > 1e-3


def test_a_network_at_every_depth_and_width() -> None:
    a, b = framed(1, depths=(2,)), framed(2, depths=(3,), hidden=4)
    point = cot_geodesic(a, b, 0.4)
    network = point.network()
    assert network.architecture.depths == (4,)
    assert network.architecture.step == pytest.approx(0.4 * 2 / 4, rel=1e-15)
    x = inputs(a)
    state = a.stem(x)
    for layer, mass, length in zip(point.layers, point.masses, point.lengths, strict=True):
        u, w, b_ = layer.split([4, 4, 1], dim=1)
        state = state + length * (state @ w.T + b_.T).tanh() @ (mass[:, None] * u)
    assert relative(output(network, x), a.head(state)) < 1e-13


def test_plans_are_used_again() -> None:
    a, b = framed(1), framed(2)
    transport = cot_distance(a, b, plans=True)
    given = cot_geodesic(a, b, 0.3, transport=transport)
    assert torch.equal(given.particles, cot_geodesic(a, b, 0.3).particles)


A, WIDER = cloud(2, 4, 3), cloud(2, 5, 3, seed=4)
FOREIGN = {
    "another pair": (A, cloud(2, 4, 3, seed=1), A, cloud(2, 4, 3, seed=2)),
    "another first": (cloud(2, 4, 3, seed=3), WIDER, A, WIDER),
    "the other way round": (WIDER, A, A, WIDER),
    "other masses": (LayerwiseMeasure(A.layers, torch.tensor([[0.1, 0.2, 0.3, 0.4]] * 2)), A, A, A),
    "fewer particles": (A, cloud(2, 3, 3), A, WIDER),
    "another grid": (A, WIDER, LayerwiseMeasure(A.layers, breakpoints=(0.0, 0.3, 1.0)), WIDER),
    "layers elsewhere": (
        A,
        WIDER,
        *(LayerwiseMeasure(c.layers, None, (0.0, 0.3, 1.0)) for c in (A, WIDER)),
    ),
    "fewer layers": (cloud(1, 4, 3), cloud(1, 5, 3), A, WIDER),
    "smaller particles": (cloud(2, 4, 2), cloud(2, 5, 2), A, WIDER),
}


def test_breakpoints_that_differ_by_rounding_are_one() -> None:
    near, far = (LayerwiseMeasure(A.layers, breakpoints=(0.0, s, 1.0)) for s in (0.3, 0.1 + 0.2))
    assert near.breakpoints != far.breakpoints
    assert cot_distance(near, far).layers == ((0, 0), (1, 1))
    assert cot_geodesic(near, far, 0.5).depth == 2


@pytest.mark.parametrize("name", FOREIGN)
def test_plans_of_other_networks_are_refused(name: str) -> None:
    theirs_a, theirs_b, a, b = FOREIGN[name]
    transport = cot_distance(theirs_a, theirs_b, plans=True)
    with pytest.raises(InputError, match="these are couplings of other networks; leave transport"):
        cot_geodesic(a, b, 0.5, transport=transport)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(SIZES, SIZES, st.booleans(), st.integers(0, 10**6), st.sampled_from([1e-9, 1, 1e6]))
def test_plans_of_the_same_networks_are_taken(
    one: tuple, other: tuple, single: bool, seed: int, scale: float
) -> None:
    """In float32 too, by Sinkhorn, of measures that are near one another or far from 0."""
    dtype = torch.float32 if single else torch.float64
    a, b = (
        LayerwiseMeasure([(1e3 + scale * layer).to(dtype) for layer in c.layers], c.masses)
        for c in (cloud(*one, 3, seed=seed), cloud(*other, 3, seed=seed + 1, weighted=True))
    )
    for second in (a, b):
        for sinkhorn in (None, 0.1):
            transport = cot_distance(a, second, plans=True, sinkhorn=sinkhorn)
            point = cot_geodesic(a, second, 1.0, transport=transport)
            assert cot_distance(point, second).distance <= 1e-3 * scale + 1e-6


def test_frames_are_equal_or_interpolated() -> None:
    a, b = classifier(seed=1), classifier(seed=2)
    with pytest.raises(InputError, match=r'stem\.0\.mean, .* the frame "interpolate"'):
        cot_geodesic(a, b, 0.5)
    network = cot_geodesic(a, b, 0.25, frame="interpolate").network()
    expected = 0.75 * a.head.weight + 0.25 * b.head.weight
    assert torch.allclose(network.head.weight, expected, rtol=1e-15)
    x = inputs(a)
    end = cot_geodesic(a, b, 1.0, frame="interpolate").network().eval()
    assert relative(output(end, x), output(b, x)) < 1e-12


def test_output_biases_are_of_the_frame() -> None:
    a, b = (classifier("convolutional", seed=seed) for seed in (1, 2))
    b.stem, b.head = a.stem, a.head
    with pytest.raises(InputError, match="output biases"):
        cot_geodesic(a, b, 0.5)
    network = cot_geodesic(a, b, 0.5, frame="interpolate").network()
    for c, c_a, c_b in zip(*(m.stages[0] for m in (network, a, b)), strict=True):
        assert torch.allclose(c.conv2.bias, (c_a.conv2.bias + c_b.conv2.bias) / 2, rtol=1e-14)


def test_output_biases_are_densities_in_depth() -> None:
    """The one layer of a becomes two half steps; those of b stay, so that b is reached exactly."""
    a, b = sequential_chain(1, (3,)), sequential_chain(2, (3, 4))
    start, end = (cot_geodesic(a, b, t, frame="interpolate").network() for t in (0.0, 1.0))
    x = state = inputs(a)
    for _ in range(2):
        state = state + 0.25 * a[0](state)
    assert relative(output(start, x), state) < 1e-12
    assert relative(output(end, x), output(b, x)) < 1e-12


def turned(model: nn.Module, seed: int = 0) -> nn.Module:
    """The same network, its residual stream in another basis, by hand."""
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=generator))
    other = framed(1)
    other.load_state_dict(model.state_dict())
    other.stem = nn.Sequential(model.stem[0], nn.Linear(5, 4).double())
    other.head = nn.Linear(4, 3).double()
    with torch.no_grad():
        other.stem[1].weight.copy_(q @ model.stem[1].weight)
        other.stem[1].bias.copy_(q @ model.stem[1].bias)
        other.head.weight.copy_(model.head.weight @ q.T)
        other.head.bias.copy_(model.head.bias)
        for block in other.stages[0]:
            block.inner.weight.copy_(block.inner.weight @ q.T)
            block.outer.weight.copy_(q @ block.outer.weight)
    return other


@pytest.mark.slow
def test_align_finds_the_rotation_of_the_stream() -> None:
    a = framed(1)
    b = turned(a)
    x = torch.randn(50, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert relative(output(b, x), output(a, x)) < 1e-12
    assert cot_distance(a, b).distance > 0.1
    assert cot_distance(a, align_streams(a, b, x)).distance < 1e-12
    half = cot_geodesic(a, b, 0.5, align=True, batch=x, frame="interpolate").network().eval()
    assert relative(output(half, x), output(a, x)) < 1e-12
    unaligned = cot_geodesic(a, b, 0.5, frame="interpolate").network().eval()
    assert relative(output(unaligned, x), output(a, x)) > 0.01


@pytest.mark.parametrize("depth", [2, 4])
def test_the_end_has_the_batch_norms_of_the_other_network(depth: int) -> None:
    a, b = (
        classifier("convolutional", norm="batch", depths=(n,), hidden=m, seed=m)
        for n, m in ((2, 4), (depth, 6))
    )
    end = cot_geodesic(a, b, 1.0, frame="interpolate").network()
    x = inputs(a)
    assert relative(output(end, x), output(b, x)) < 1e-12
    assert relative(output(end.train(), x), output(b.train(), x)) < 1e-12


@pytest.mark.parametrize("kind", ["vector", "convolutional"])
def test_align_keeps_the_function(kind: str) -> None:
    a, b = classifier(kind, depths=(2,)), classifier(kind, depths=(3,), seed=1)
    x = inputs(a)
    other = align_streams(a, b, x)
    assert relative(output(other.network().eval(), x), output(b, x)) < 1e-12


FIXED = {
    "states that are logits": lambda: classifier("logit", width=3),
    "states that are data": lambda: classifier(width=5),
    "batch norms": lambda: classifier("convolutional", norm="batch"),
    "two stages": lambda: classifier("convolutional", depths=(1, 1)),
    "a chain": lambda: smooth_chain(2, seed=0),
}


@pytest.mark.parametrize("name", FIXED)
def test_align_where_the_basis_is_fixed(name: str) -> None:
    model = FIXED[name]()
    with pytest.raises(InputError, match="basis of this network's residual stream is fixed"):
        align_streams(model, model, inputs(model))


@pytest.mark.parametrize("t", [-0.1, 1.1, math.nan, math.inf])
def test_t_outside(t: float) -> None:
    with pytest.raises(InputError, match="t in"):
        cot_geodesic(cloud(1, 2, 3), cloud(1, 2, 3), t)


@pytest.mark.slow
def test_wrong_arguments() -> None:
    a, b = framed(1), framed(2)
    wrong: list[tuple[str, dict]] = [
        ("needs batch", {"align": True}),
        ("has no plans", {"transport": cot_distance(a, b)}),
        (
            "align_streams",
            {"align": True, "batch": inputs(a), "transport": cot_distance(a, b, plans=True)},
        ),
    ]
    for message, more in wrong:
        with pytest.raises(InputError, match=message):
            cot_geodesic(a, b, 0.5, **more)
    with pytest.raises(InputError, match="activation"):
        cot_geodesic(a, framed(2, activation="relu"), 0.5)
    with pytest.raises(InputError, match="ResidualClassifier and ResidualChain"):
        cot_geodesic(a, a.stages[0], 0.5)
    with pytest.raises(InputError, match="no frame"):
        cot_geodesic(a, LayerwiseMeasure(LayerwiseMeasure.of(b).particles), 0.5)
