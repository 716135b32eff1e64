"""Distances where single particles are very far from the others, and what is proven of them."""

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from deeplimit.errors import RunError
from deeplimit.meanfield import LayerwiseMeasure, cot_distance, cot_geodesic, couplings, narrow
from deeplimit.meanfield.couplings import squared_distances

SHARE = 0.01  # of the mass, at the far particle


def measure(atoms: np.ndarray, masses: np.ndarray | None = None) -> LayerwiseMeasure:
    weights = None if masses is None else [torch.from_numpy(masses)]
    return LayerwiseMeasure([torch.from_numpy(atoms)], weights)


def naive(x: np.ndarray, y: np.ndarray, p: np.ndarray, q: np.ndarray) -> float:
    """W_2² by scipy's linear programming."""
    costs = ((x[:, None] - y[None]) ** 2).sum(-1)
    rows, columns = np.kron(np.eye(len(x)), np.ones(len(y))), np.tile(np.eye(len(y)), len(x))
    found = linprog(costs.ravel(), A_eq=np.r_[rows, columns], b_eq=np.r_[p, q], method="highs")
    return float(found.fun)


def shared(
    first: int, second: int, far: float, gap: float
) -> tuple[LayerwiseMeasure, LayerwiseMeasure, float]:
    """Two clouds with one particle each far from all others, and what d² is."""
    generator = np.random.default_rng(first)
    x, y = generator.normal(size=(first, 4)), generator.normal(size=(second, 4))
    p, q = np.full(first, 1 / first), np.full(second, 1 / second)
    a, b = np.r_[x, np.full((1, 4), far)], np.r_[y, np.full((1, 4), far + gap)]
    apart = float(((a[-1] - b[-1]) ** 2).sum())  # as it is in float64
    one, other = (measure(z, np.r_[(1 - SHARE) * w, SHARE]) for z, w in ((a, p), (b, q)))
    return one, other, (1 - SHARE) * naive(x, y, p, q) + SHARE * apart


@pytest.mark.slow
@pytest.mark.parametrize("far", [1e4, 1e7, 1e10])
@pytest.mark.parametrize("widths", [(31, 42), (60, 85)])
def test_a_far_particle_that_both_share_blurs_nothing(widths: tuple[int, int], far: float) -> None:
    a, b, square = shared(*widths, far, 0.1)
    found = cot_distance(a, b, plans=True)
    assert found.distance**2 == pytest.approx(square, rel=1e-9)
    assert found.lower == found.distance
    half = cot_geodesic(a, b, 0.5, transport=found)
    if far < 1e6:  # beyond, the half way itself is rounded
        for end in (a, b):
            assert cot_distance(half, end).distance == pytest.approx(square**0.5 / 2, rel=1e-9)
    bounds = cot_distance(a, b, sinkhorn=0.01)
    assert bounds.lower <= square**0.5 * (1 + 1e-12)
    assert bounds.distance >= square**0.5 * (1 - 1e-12)


def test_a_far_particle_in_an_assignment() -> None:
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(2, 40, 3))
    x[0], y[-1] = 1e9, 1e9 + 1
    p = np.full(39, 1 / 39)
    square = (39 * naive(x[1:], y[:-1], p, p) + 3) / 40
    found = cot_distance(measure(x), measure(y))
    assert found.distance**2 == pytest.approx(square, rel=1e-9)
    assert found.lower == found.distance


def test_mass_that_has_to_go_far_leaves_the_rest_exact() -> None:
    """1e-9 of the mass moves by 1e4: a tenth of d², which is not resolved beside the rest."""
    generator = np.random.default_rng(3)
    x, y = generator.normal(size=(20, 2)), generator.normal(size=(30, 2))
    y[0] = 1e4
    p, q = np.full(20, 1 / 20), np.full(30, (1 - 1e-9) / 29)
    q[0] = 1e-9
    found = cot_distance(measure(x, p), measure(y, q))
    # The far particle takes its mass from the nearest; what that changes of the rest is below 1e-8.
    far = 1e-9 * ((x - y[0]) ** 2).sum(1).min()
    rest = naive(x, y[1:], p, q[1:] / q[1:].sum())
    assert found.distance**2 == pytest.approx(rest + far, rel=1e-7)
    assert found.lower == found.distance


def test_near_costs_are_exact_beside_far_particles() -> None:
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(30, 5)), generator.normal(size=(20, 5))
    x[:3] += 1e12
    expected = ((x[3:, None] - y[None]) ** 2).sum(-1)
    assert np.max(np.abs(squared_distances(x, y)[3:] / expected - 1)) < 1e-10


def test_narrow_says_how_far_it_is_beside_a_far_particle() -> None:
    x = np.random.default_rng(0).normal(size=(60, 3))
    x[0] = 1e6
    found = narrow(measure(x), 59)
    assert found.distance == pytest.approx(
        cot_distance(measure(x), found.measure).distance, rel=1e-9
    )


@pytest.mark.slow
def test_a_wrong_coupling_is_found_out_and_solved_again(monkeypatch) -> None:
    a, b, square = shared(15, 22, 10.0, 0.1)
    right, answers = couplings._transport, []

    def independent(costs: np.ndarray, p: np.ndarray, q: np.ndarray) -> tuple:
        i, j = np.indices(costs.shape).reshape(2, -1)
        return i, j, np.outer(p, q).ravel()

    def first_wrong(costs: np.ndarray, p: np.ndarray, q: np.ndarray) -> tuple:
        answers.append(costs)
        return (right if len(answers) > 1 else independent)(costs, p, q)

    monkeypatch.setattr(couplings, "_transport", first_wrong)
    assert cot_distance(a, b).distance ** 2 == pytest.approx(square, rel=1e-9)
    assert len(answers) == 2
    monkeypatch.setattr(couplings, "_transport", independent)
    with pytest.raises(RunError, match=r"of \(16, 23\) atoms: the coupling found costs .*proven"):
        cot_distance(a, b)


@pytest.mark.parametrize("seed", range(5))
def test_potentials_are_feasible_for_any_coupling_and_tight_for_the_best(seed: int) -> None:
    generator = np.random.default_rng(seed)
    x, y = generator.normal(size=(12, 2)), generator.normal(size=(17, 2))
    costs = squared_distances(x, y)
    p, q = generator.dirichlet(np.ones(12)), generator.dirichlet(np.ones(17))
    i, j = generator.integers(0, 12, 25), generator.integers(0, 17, 25)
    best = couplings._transport(costs, p, q)[:2]
    for rows, columns in ((i, j), best):
        f, g = couplings.potentials(costs, rows, columns, np.zeros(12))
        assert (costs - f[:, None] - g[None]).min() >= -1e-9 * np.abs(f).max()
        assert p @ f + q @ g <= naive(x, y, p, q) * (1 + 1e-9)
    assert p @ f + q @ g == pytest.approx(naive(x, y, p, q), rel=1e-9)
