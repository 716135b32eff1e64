"""merge, widen and narrow: barycentres, functions kept, distances reported."""

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from measured_networks import NETWORKS, classifier, cloud, framed, inputs, output, relative
from scipy.optimize import linear_sum_assignment
from torch import nn

from deeplimit import InputError
from deeplimit._anatomy.checks import check_count
from deeplimit.meanfield import (
    LayerwiseMeasure,
    cot_distance,
    cot_geodesic,
    merge,
    narrow,
    widen,
)


@pytest.mark.parametrize("share", [0.5, 0.2])
def test_two_networks_of_one_width_meet_on_the_geodesic(share: float) -> None:
    a, b = framed(1), framed(2)
    merged = merge([a, b], [1 - share, share])
    point = cot_geodesic(a, b, share)
    assert torch.allclose(merged.measure.particles, point.particles, rtol=1e-12)
    d = cot_distance(a, b).distance
    assert merged.distances == pytest.approx((share * d, (1 - share) * d), rel=1e-12)
    assert merged.lower == pytest.approx(merged.distances, rel=1e-9)
    # Nothing is nearer to both: the objective is λ(1 − λ) d².
    assert merged.objectives[-1] == pytest.approx(share * (1 - share) * d * d, rel=1e-12)
    x = inputs(a)
    networks = merged.measure.network(), point.network()
    assert relative(output(networks[0], x), output(networks[1], x)) < 1e-12


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(1, 5)), min_size=2, max_size=4),
    st.integers(0, 10**6),
)
def test_the_objective_never_rises_and_is_what_it_says(sizes: list, seed: int) -> None:
    clouds = [cloud(*size, 3, seed=seed + k, weighted=k > 1) for k, size in enumerate(sizes)]
    merged = merge(clouds)
    assert all(b <= a for a, b in zip(merged.objectives, merged.objectives[1:], strict=False))
    found = [cot_distance(merged.measure, c).distance for c in clouds]
    assert merged.distances == pytest.approx(found, rel=1e-9, abs=1e-12)
    mean = sum(d * d for d in found) / len(found)
    assert merged.objectives[-1] == pytest.approx(mean, rel=1e-9, abs=1e-15)


def naive_barycentre(clouds: list, shares: list, steps: int) -> tuple[list, list]:
    """ν ← Σ_k λ_k T_k(ν) of one layer of equal atoms, and Σ_k λ_k W_2² before every step."""
    atoms, objectives = clouds[0].layers[0], []
    for _ in range(steps):
        target, objective = torch.zeros_like(atoms), 0.0
        for other, share in zip(clouds, shares, strict=True):
            costs = (atoms[:, None] - other.layers[0][None]).square().sum(-1)
            rows, columns = linear_sum_assignment(costs)
            objective += share * float(costs[rows, columns].mean())
            target += share * other.layers[0][columns]
        objectives.append(objective)
        atoms = target
    return atoms, objectives


def test_every_step_of_the_iteration_is_the_naive_one() -> None:
    """Four clouds and a start that takes several steps, each of which moves atoms to others."""
    clouds = [cloud(1, 12, 3, seed=k) for k in range(4)]
    shares = [0.1, 0.2, 0.3, 0.4]
    merged = merge(clouds, shares, tolerance=0.0)
    count = len(merged.objectives)
    assert count >= 4
    atoms, objectives = naive_barycentre(clouds, shares, count)
    assert merged.objectives == pytest.approx(objectives, rel=1e-12)
    assert merged.objectives[2] < 0.999 * merged.objectives[1]
    assert torch.allclose(merged.measure.particles[0], atoms, rtol=1e-12)
    first = merge(clouds, shares, iterations=1)
    assert first.objectives == merged.objectives[:2]


@pytest.mark.parametrize("start", [0, 1, 2])
def test_the_frame_is_the_mean_of_the_networks_weights(start: int) -> None:
    networks, shares = [classifier(seed=k) for k in (1, 2, 3)], [0.5, 0.3, 0.2]
    network = merge(networks, shares, frame="interpolate", start=start).measure.network()
    for path in ("head.weight", "head.bias", "stem.1.weight", "stem.1.bias"):
        every = [model.get_parameter(path) for model in networks]
        expected = sum(w * p for w, p in zip(shares, every, strict=True))
        assert torch.allclose(network.get_parameter(path), expected, rtol=1e-14, atol=1e-15)


def test_gaussian_clouds_meet_in_their_mean() -> None:
    """Translates of one cloud: the barycentre is the cloud at the mean of the translations."""
    base = cloud(2, 5, 3)
    moves = torch.tensor([[5, 0, 0], [0, 5, 0], [1, 1, -8]]).double()
    merged = merge([LayerwiseMeasure(base.particles + move) for move in moves])
    expected = LayerwiseMeasure(base.particles + moves.mean(0))
    assert cot_distance(merged.measure, expected).distance < 1e-12


def test_an_atom_goes_to_the_mean_of_where_it_is_sent() -> None:
    a, b = cloud(2, 1, 3), cloud(2, 5, 3, seed=1, weighted=True)
    mean = (b.weights[..., None] * b.particles).sum(1, keepdim=True)
    merged = merge([a, b], [0.75, 0.25])
    assert torch.allclose(merged.measure.particles, 0.75 * a.particles + 0.25 * mean, rtol=1e-12)


def test_networks_of_other_widths_and_depths() -> None:
    a, b = framed(1, depths=(2,)), framed(2, depths=(3,), hidden=4)
    network = merge([a, b], start=1).measure.network()
    assert network.architecture.depths == (4,)
    assert network.architecture.hidden == 4
    assert output(network, inputs(a)).isfinite().all()


WRONG = {
    "one": ({"networks": [cloud(1, 2, 3)]}, "two networks or more"),
    "weights' sum": ({"weights": [0.5, 0.6]}, "of sum 1"),
    "weights' number": ({"weights": [1.0]}, "of sum 1"),
    "negative": ({"weights": [-1.0, 2.0]}, "of sum 1"),
    "start": ({"start": 2}, "start is 2; expected a whole number from 0 to 1"),
    "iterations": ({"iterations": 0}, "iterations is 0; expected a whole number ≥ 1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_merges(name: str) -> None:
    more, message = WRONG[name]
    given = {"networks": [cloud(1, 2, 3), cloud(1, 2, 3, seed=1)]} | more
    with pytest.raises(InputError, match=message):
        merge(given.pop("networks"), **given)


@pytest.mark.parametrize("name", NETWORKS)
def test_widening_keeps_function_and_measure(name: str) -> None:
    model = NETWORKS[name]().eval()
    wide = widen(model, 3).eval()
    x = inputs(model)
    assert relative(output(wide, x), output(model, x)) < 1e-12
    measure = widen(LayerwiseMeasure.of(model), 3)
    widths = [len(layer) for layer in LayerwiseMeasure.of(model).layers]
    assert [len(layer) for layer in measure.layers] == [3 * width for width in widths]
    size = max(float(layer.norm(dim=1).max()) for layer in measure.layers)
    assert cot_distance(measure, model).distance < 1e-12 * size
    if len(set(widths)) == 1:  # otherwise the network has neurons of zeros
        assert cot_distance(wide, model).distance < 1e-12 * size


@pytest.mark.slow
def test_narrowing_reports_the_distance() -> None:
    model = framed(1, hidden=24)
    distances = []
    for width in (2, 6, 12, 23):
        narrowed = narrow(model, width)
        exact = cot_distance(model, narrowed.measure)
        assert narrowed.distance == pytest.approx(exact.distance, rel=1e-9)
        assert narrowed.per_layer == pytest.approx(exact.per_layer, rel=1e-9)
        assert narrowed.measure.network().architecture.hidden == width
        distances.append(narrowed.distance)
    assert distances == sorted(distances, reverse=True)
    whole = narrow(model, 24)
    assert whole.distance == 0
    assert torch.equal(whole.measure.particles, LayerwiseMeasure.of(model).particles)


def test_narrowing_one_atom_is_the_mean() -> None:
    a = cloud(2, 5, 3, weighted=True)
    narrowed = narrow(a, 1)
    mean = (a.weights[..., None] * a.particles).sum(1, keepdim=True)
    assert torch.allclose(narrowed.measure.particles, mean, rtol=1e-12)
    variance = (a.weights * (a.particles - mean).square().sum(-1)).sum(1).mean()
    assert narrowed.distance == pytest.approx(float(variance) ** 0.5, rel=1e-12)


def test_narrowing_undoes_widening() -> None:
    model = framed(1)
    narrowed = narrow(widen(model, 3), 6)
    assert narrowed.distance < 1e-12
    x = inputs(model)
    assert relative(output(narrowed.measure.network(), x), output(model, x)) < 1e-12


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True])
def test_wrong_widths(wrong: object) -> None:
    with pytest.raises(InputError, match="expected a whole number ≥ 1"):
        check_count("width", wrong)


KEPT: dict[str, Callable[[nn.Module], nn.Module]] = {
    "widen": lambda model: widen(model, 3),
    "narrow": lambda model: narrow(widen(model, 2), 6).measure.network(),
    "merge": lambda model: merge([model, widen(model, 2)]).measure.network(),
    "geodesic": lambda model: cot_geodesic(model, widen(model, 2), 0.4).network(),
}


@pytest.mark.parametrize("name", KEPT)
def test_batch_norms_are_kept_in_training_mode(name: str) -> None:
    model = classifier("convolutional", norm="batch", depths=(3,))
    other = KEPT[name](model)
    x = inputs(model)
    assert relative(output(other, x), output(model, x)) < 1e-12
    assert relative(output(other.train(), x), output(model.train(), x)) < 1e-12
    # The statistics of that batch have moved alike.
    assert relative(output(other.eval(), x), output(model.eval(), x)) < 1e-12


@pytest.mark.slow
def test_channels_of_joined_neurons_are_averaged() -> None:
    model = classifier("convolutional", norm="batch", depths=(1,))
    other = copy.deepcopy(model)
    with torch.no_grad():
        norm = other.stages[0][0].norm1
        norm.weight *= 3
        norm.running_var.copy_(9 * (norm.running_var + norm.eps) - norm.eps)
    found = merge([model, other]).measure.network().stages[0][0].norm1
    mine = model.stages[0][0].norm1
    assert cot_distance(model, other).distance < 1e-12
    assert relative(found.weight, 2 * mine.weight.abs()) < 1e-12
    assert relative(found.running_var, (mine.running_var + norm.running_var) / 2) < 1e-12
