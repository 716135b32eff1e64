"""Entry, exit, tube and recommended depth on profiles made by hand."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import profile

from deeplimit import InputError


@pytest.mark.parametrize(
    ("distance", "entry", "last", "outside"),
    [
        ([5, 3, 1, 0.5, 0.2], 2, 4, 2),  # the plain turnpike
        ([5, 1, 0.5, 1, 4], 1, 3, 2),  # a leaving arc
        ([5, 1, 4, 1, 0.5, 3], 3, 4, 3),  # in, out, in again: entry is the last stay's
        ([0.5, 5, 5, 5], 0, 0, 3),  # in the tube at the start only
        ([1, 1, 1], 0, 2, 0),  # the radius itself is inside
        ([5, 4, 3, 2], None, None, 4),  # never
        ([5, 5, 1], 2, 2, 2),  # the output alone
        ([0.5], 0, 0, 0),
        ([math.nan, 2, 0.5], 2, 2, 2),  # what is no number is outside
        ([0.5, math.inf, 0.5], 2, 2, 1),
    ],
)
def test_entry_exit_and_layers_outside(distance, entry, last, outside) -> None:
    made = profile([float(d) for d in distance])
    assert made.entry(1.0) == entry
    assert made.exit(1.0) == last
    assert made.outside(1.0) == outside
    assert made.horizon == len(distance) - 1


@pytest.mark.slow
@given(
    st.lists(st.floats(0, 3), min_size=1, max_size=12),
    st.floats(0, 3),
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_entry_and_exit_are_their_definitions(distance: list[float], radius: float) -> None:
    made = profile(distance)
    inside = [n for n, d in enumerate(distance) if d <= radius]
    assert made.outside(radius) == len(distance) - len(inside)
    if not inside:
        assert made.entry(radius) is None
        assert made.exit(radius) is None
        return
    last = max(inside)
    stays = [n for n in inside if all(distance[k] <= radius for k in range(n, last + 1))]
    assert made.exit(radius) == last
    assert made.entry(radius) == min(stays)


@pytest.mark.parametrize("classes", [2, 10])
def test_the_default_radius_is_a_fifth_of_the_distance_at_zero_logits(classes: int) -> None:
    radius = 0.2 * math.log(0.95 * (classes - 1) / 0.05) * math.sqrt(1 - 1 / classes)
    made = profile([9.0, radius * 1.001, radius * 0.999, radius * 0.5], classes=classes)
    assert made.radius == pytest.approx(radius, rel=1e-14)
    assert (made.entry(), made.exit(), made.outside()) == (2, 3, 2)


@pytest.mark.parametrize("radius", [-1.0, math.nan])
def test_a_radius_that_is_no_number_at_least_zero_is_refused(radius: float) -> None:
    made = profile([1.0, 0.0])
    for method in (made.entry, made.exit, made.outside):
        with pytest.raises(InputError, match="tube radius"):
            method(radius)
    assert made.entry(0.0) == 1


def test_half_a_point_is_the_tolerance_and_its_edge_is_inside() -> None:
    assert profile(accuracy=[0.1, 0.90, 0.9749, 0.9751, 0.98]).recommended_depth == 3
    assert profile(accuracy=[0.0, 0.5, 0.5, 0.75, 0.75]).depth_within(accuracy=0.25) == 1


def test_a_shallower_network_may_be_better() -> None:
    assert profile(accuracy=[0.2, 0.99, 0.90, 0.95]).recommended_depth == 1


def test_the_standard_error_counts() -> None:
    accuracy = [0.1, 0.976, 0.98, 0.98]
    sure = profile(accuracy=accuracy, accuracy_error=[0.0, 0.0005, 0.0, 0.0])
    unsure = profile(accuracy=accuracy, accuracy_error=[0.0, 0.0015, 0.0, 0.0])
    assert (sure.recommended_depth, unsure.recommended_depth) == (1, 2)


def test_the_loss_must_be_near_too() -> None:
    base = profile([0.0]).minimum
    scale = math.log(10) - base
    loss = [base + 2, base + 0.011 * scale, base + 0.0099 * scale, base]
    assert profile(loss=loss).recommended_depth == 2
    assert profile(loss=loss).depth_within(loss=0.02) == 1
    unsure = profile(loss=loss, loss_error=[0.0, 0.0, 0.0002 * scale, 0.0])
    assert unsure.recommended_depth == 3
    better = [base + 1, base + 0.5, base + 1]
    assert profile(loss=better).recommended_depth == 0


def test_a_tolerance_is_taken_as_it_is_given_however_few_the_samples() -> None:
    # One of 100 samples lost: a drop of 0.01 with standard error √(0.01·0.99/100).
    error = math.sqrt(0.01 * 0.99 / 100)
    one_lost = {"accuracy": [0.1, 0.97, 0.98], "accuracy_error": [0.0, error, 0.0]}
    assert profile(**one_lost, samples=100).recommended_depth == 2
    assert profile(**one_lost, samples=100).depth_within(0.0263) == 2
    assert profile(**one_lost, samples=100).depth_within(0.0265) == 1  # 0.01 + 1.645·error


def test_the_loss_may_rise_by_as_much_as_the_accuracy_and_one_percent_at_least() -> None:
    scale = profile(accuracy=[1.0]).loss_range
    base = profile(accuracy=[1.0]).minimum
    for rise, asked, depth in (
        (0.0199, 0.02, 0),
        (0.0201, 0.02, 1),
        (0.0099, 0.001, 0),
        (0.0101, 0.001, 1),
    ):
        made = profile(loss=[base + rise * scale, base])
        assert made.depth_within(asked) == depth


def test_no_depth_but_the_full_one() -> None:
    assert profile(accuracy=[0.1, 0.2, 0.3, 0.98]).recommended_depth == 3
    assert profile(accuracy=[0.5, math.nan, 0.9]).recommended_depth == 2
    assert profile(accuracy=[0.9]).recommended_depth == 0
