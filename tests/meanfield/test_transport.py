"""cot_distance: against plain POT, metric properties, unequal widths and depths, Sinkhorn."""

import math
import tracemalloc
from importlib.util import find_spec

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from measured_networks import classifier, cloud

from deeplimit import InputError
from deeplimit.meanfield import LayerwiseMeasure, cot_distance, couplings
from deeplimit.meanfield.couplings import squared_distances

SEEDS = st.integers(0, 10**6)
SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 6))  # layers, particles
P = 3


def naive(a: LayerwiseMeasure, b: LayerwiseMeasure) -> float:
    """On the common refinement of both grids by least common multiple, one emd2 per cell."""
    cells = math.lcm(a.depth, b.depth)
    total = 0.0
    for c in range(cells):
        n, m = c * a.depth // cells, c * b.depth // cells
        costs = ot.dist(a.layers[n].numpy(), b.layers[m].numpy())
        total += ot.emd2(a.masses[n].numpy(), b.masses[m].numpy(), costs) / cells
    return math.sqrt(total)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(SHAPES, SHAPES, st.booleans(), SEEDS)
def test_equal_to_plain_pot(one: tuple, other: tuple, weighted: bool, seed: int) -> None:
    a, b = cloud(*one, P, seed=seed), cloud(*other, P, seed=seed + 1, weighted=weighted)
    found = cot_distance(a, b)
    assert found.distance == pytest.approx(naive(a, b), rel=1e-9)
    assert found.lower == found.distance


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(SHAPES, SHAPES, SHAPES, SEEDS)
def test_metric(one: tuple, two: tuple, three: tuple, seed: int) -> None:
    a, b = cloud(*one, P, seed=seed), cloud(*two, P, seed=seed + 1, weighted=True)
    c = cloud(*three, P, seed=seed + 2)
    ab, ba, bc, ac = (cot_distance(*pair).distance for pair in ((a, b), (b, a), (b, c), (a, c)))
    assert cot_distance(a, a).distance == 0
    assert cot_distance(b, b).distance <= 1e-15
    assert ab == pytest.approx(ba, rel=1e-12)
    assert ac <= ab + bc + 1e-12
    generator = torch.Generator().manual_seed(seed)
    mixed = [layer[torch.randperm(len(layer), generator=generator)] for layer in a.layers]
    assert cot_distance(LayerwiseMeasure(mixed), b).distance == pytest.approx(ab, rel=1e-12)
    assert cot_distance(LayerwiseMeasure(mixed), a).distance == 0


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), SEEDS)
def test_at_least_the_distance_of_the_joint_laws(layers: int, particles: int, seed: int) -> None:
    """W_2 of (s, ω), s in the middle of a layer: layers may mix, at the price of |s − r|²."""
    a, b = (cloud(layers, particles, P, seed=seed + k) for k in (0, 1))
    depth = (torch.arange(layers, dtype=torch.float64) + 0.5) / layers

    def joint(measure: LayerwiseMeasure) -> np.ndarray:
        rows = [
            torch.cat([s.expand(particles, 1), layer], dim=1)
            for s, layer in zip(depth, measure.layers, strict=True)
        ]
        return torch.cat(rows).numpy()

    w2 = math.sqrt(ot.emd2([], [], ot.dist(joint(a), joint(b))))
    assert w2 <= cot_distance(a, b).distance * (1 + 1e-12)


@pytest.mark.slow
def test_64_against_63_layers_are_126_cells() -> None:
    found = cot_distance(cloud(64, 2, P), cloud(63, 2, P, seed=1), plans=True)
    assert len(found.per_layer) == len(found.lengths) == len(found.plans) == 126
    assert found.distance == pytest.approx(
        naive(cloud(64, 2, P), cloud(63, 2, P, seed=1)), rel=1e-9
    )
    assert sum(found.lengths) == pytest.approx(1, rel=1e-14)
    squares = [h * w**2 for h, w in zip(found.lengths, found.per_layer, strict=True)]
    assert math.sqrt(sum(squares)) == pytest.approx(found.distance, rel=1e-14)


@pytest.mark.parametrize("spread", [0.0, 1.0, 2.0])
def test_lap_and_scipy_find_the_same(spread: float) -> None:
    """Particles of one size and of mixed ones; costs above 10⁶, which `lap` calls infinite."""
    pytest.importorskip("lap")
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(2, 150, 9)) * np.exp(spread * generator.normal(size=(2, 150, 1)))
    costs = couplings._reduced(100 * squared_distances(x, y))
    rows, mine, theirs = np.arange(150), couplings.by_lap(costs), couplings.by_scipy(costs)
    assert sorted(mine) == list(rows)
    assert costs[rows, mine].sum() == pytest.approx(costs[rows, theirs].sum(), rel=1e-12)


def test_a_distance_of_mixed_sizes_is_proven_with_and_without_lap(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    sizes = torch.randn(2, 1, 60, 1, dtype=torch.float64).mul(1.5).exp()
    a, b = map(LayerwiseMeasure, torch.randn(2, 1, 60, 5, dtype=torch.float64) * sizes)
    solved = []
    for name in ("by_lap", "by_scipy"):
        solve = getattr(couplings, name)
        monkeypatch.setattr(couplings, name, lambda c, n=name, f=solve: solved.append(n) or f(c))
    found = cot_distance(a, b)
    monkeypatch.setattr(couplings, "find_spec", lambda _: None)
    other = cot_distance(a, b)
    assert found.distance == pytest.approx(other.distance, rel=1e-12)
    assert found.lower == found.distance
    expected = "by_scipy" if find_spec("lap") is None else "by_lap"
    assert (solved[0], solved[-1]) == (expected, "by_scipy")


def test_layers_that_meet_again_are_solved_once(monkeypatch) -> None:
    from deeplimit.meanfield import transport

    calls = []
    solve = transport._solve
    monkeypatch.setattr(
        transport, "_solve", lambda *pair, **how: calls.append(pair) or solve(*pair, **how)
    )
    a, b = cloud(2, 4, P), cloud(2, 4, P, seed=1)
    split = LayerwiseMeasure(
        [a.layers[n] for n in (0, 0, 1, 1)], [a.masses[n] for n in (0, 0, 1, 1)]
    )
    assert cot_distance(split, b).distance == pytest.approx(cot_distance(a, b).distance, rel=1e-14)
    assert len(calls) == 2 + 2


def test_layers_of_the_same_particles_and_other_masses_are_other_layers() -> None:
    a, b = cloud(1, 4, P), cloud(2, 4, P, seed=1)
    masses = [torch.tensor(m, dtype=torch.float64) for m in ([0.1, 0.2, 0.3, 0.4], [0.7, 0.1] * 2)]
    twice = LayerwiseMeasure([a.layers[0]] * 2, [m / m.sum() for m in masses])
    same = LayerwiseMeasure([b.layers[0]] * 2)
    for pair in ((twice, same), (same, twice)):
        assert cot_distance(*pair).distance == pytest.approx(naive(*pair), rel=1e-9)
    first, second = cot_distance(twice, same).per_layer
    assert abs(first - second) > 0.01


@pytest.mark.parametrize("scale", [1e-12, 1e-7, 1e-3])
@pytest.mark.parametrize("shift", [0.0, 1e4])
def test_no_cancellation_when_networks_are_close(scale: float, shift: float) -> None:
    """A tiny move of well separated particles: the distance is the size of the move."""
    a = cloud(2, 5, P)
    move = scale * cloud(2, 5, P, seed=1).particles
    far, near = (LayerwiseMeasure(a.particles + shift + k * move) for k in (0, 1))
    made = near.particles - far.particles
    expected = float(made.square().sum(dim=(1, 2)).mean() / 5) ** 0.5
    assert cot_distance(far, near).distance == pytest.approx(expected, rel=1e-12)


def test_costs_are_relatively_accurate() -> None:
    generator = np.random.default_rng(0)
    x = generator.normal(size=(30, 7)) * np.logspace(-6, 3, 30)[:, None]
    y = np.concatenate([x + 1e-9 * generator.normal(size=x.shape), generator.normal(size=(5, 7))])
    exact = ((x[:, None] - y[None]) ** 2).sum(-1)
    assert np.max(np.abs(squared_distances(x, y) / exact - 1)) < 1e-10


def test_plans_are_couplings_of_that_cost() -> None:
    a, b = cloud(2, 4, P), cloud(3, 5, P, seed=1, weighted=True)
    found = cot_distance(a, b, plans=True)
    for (n, m), plan, w in zip(found.layers, found.plans, found.per_layer, strict=True):
        dense = np.zeros((4, 5))
        dense[plan.rows, plan.columns] = plan.masses
        assert np.allclose(dense.sum(1), 1 / 4, rtol=1e-12)
        assert np.allclose(dense.sum(0), b.masses[m].numpy(), rtol=1e-12)
        assert len(plan.rows) <= 4 + 5 - 1
        costs = ((a.layers[n][:, None] - b.layers[m][None]) ** 2).sum(-1).numpy()
        assert math.sqrt((dense * costs).sum()) == pytest.approx(w, rel=1e-12)
    assert cot_distance(a, b).plans is None


@pytest.mark.slow
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("epsilon", [1.0, 0.1, 0.01])
def test_sinkhorn_encloses_the_distance(epsilon: float, weighted: bool) -> None:
    a, b = cloud(3, 30, P), cloud(2, 40 if weighted else 30, P, seed=1, weighted=weighted)
    exact = cot_distance(a, b).distance
    found = cot_distance(a, b, sinkhorn=epsilon, plans=True)
    assert found.lower <= exact <= found.distance
    assert found.error == found.distance - found.lower
    assert found.error < 6 * epsilon * exact
    for (n, m), plan in zip(found.layers, found.plans, strict=True):
        sums = np.bincount(plan.rows, plan.masses), np.bincount(plan.columns, plan.masses)
        assert np.allclose(sums[0], a.masses[n], rtol=1e-9)
        assert np.allclose(sums[1], b.masses[m], rtol=1e-9)


def test_sinkhorn_of_one_place() -> None:
    one = LayerwiseMeasure(torch.ones(2, 3, P))
    assert cot_distance(one, one, sinkhorn=0.1).distance == 0


def test_a_particle_without_mass_counts_for_nothing() -> None:
    a, b = cloud(1, 3, P), cloud(1, 4, P, seed=1)
    more = torch.cat([a.particles, 1e3 * torch.ones(1, 1, P)], dim=1)
    padded = LayerwiseMeasure(more, torch.tensor([[1 / 3, 1 / 3, 1 / 3, 0.0]], dtype=torch.float64))
    found = cot_distance(padded, b, plans=True)
    assert found.distance == pytest.approx(cot_distance(a, b).distance, rel=1e-12)
    assert set(found.plans[0].rows) == {0, 1, 2}
    assert cot_distance(padded, a).distance < 1e-15


def test_networks_are_taken_as_they_are() -> None:
    a, b = classifier(depths=(3,)), classifier(depths=(2,), hidden=4, seed=1)
    expected = cot_distance(LayerwiseMeasure.of(a), LayerwiseMeasure.of(b)).distance
    assert cot_distance(a, b).distance == expected > 0


def test_what_cannot_be_compared() -> None:
    with pytest.raises(InputError, match=r"\(u \[4\], .* \(u \[3\]"):
        cot_distance(classifier(), classifier(width=3))
    with pytest.raises(InputError, match=r"Tanh\(\), .* ReLU\(\)"):
        cot_distance(classifier(), classifier(activation="relu"))
    with pytest.raises(InputError, match=r"of 3 numbers, .* of 2"):
        cot_distance(cloud(1, 2, 3), cloud(1, 2, 2))
    for wrong in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(InputError, match="sinkhorn is"):
            cot_distance(cloud(1, 2, 3), cloud(1, 2, 3), sinkhorn=wrong)


@pytest.mark.slow
def test_equal_particles_take_no_more_memory_than_the_costs() -> None:
    """A fifth of the neurons is dead in both: 40,000 pairs of equal particles."""
    x = torch.randn(1000, 300, generator=torch.Generator().manual_seed(0)).double().numpy()
    y = x[::-1].copy()
    x[:200] = y[:200] = 0
    squared_distances(x, y)
    tracemalloc.start()
    costs = squared_distances(x, y)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert not costs[:200, :200].any()
    expected = ((x[500] - y) ** 2).sum(1)
    assert np.allclose(costs[500], expected, rtol=1e-10)
    assert peak < 8 * costs.nbytes
