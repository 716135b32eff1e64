import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import plotly.graph_objects as go
import pytest
from report_samples import moving_logits, profile

from deeplimit.control.turnpike import TurnpikeProfile
from deeplimit.report import (
    class_figure,
    controls_figure,
    distance_figure,
    loss_figure,
    quality_figure,
    training_figure,
    trajectory_figure,
    update_figure,
)
from deeplimit.report.numbers import SPACE
from deeplimit.report.page import layer_panels
from deeplimit.report.run import leaving, thin, view
from deeplimit.report.style import CLASSES, NETWORK, REFERENCE, TUBE
from deeplimit.report.turnpike import class_caption, class_entry, controls_caption, slowest_first
from deeplimit.training.results import Profiles, RunResults


def trace(figure: go.Figure, name: str) -> go.Scatter:
    (found,) = [t for t in figure.data if t.name == name]
    return found


def texts(figure: go.Figure) -> list[str]:
    return [a.text for a in figure.layout.annotations]


def with_distance(p: TurnpikeProfile, distance: list[float]) -> TurnpikeProfile:
    assert len(distance) == p.horizon + 1
    return replace(p, distance=tuple(distance))


def luminance(color: str) -> float:
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("color", [*CLASSES, NETWORK, REFERENCE, TUBE])
@pytest.mark.parametrize("card", ["#ffffff", "#1a1e23"])
def test_colors_show_on_light_and_on_dark(color: str, card: str) -> None:
    light, dark = sorted((luminance(color), luminance(card)), reverse=True)
    assert (light + 0.05) / (dark + 0.05) >= 2.2


def test_loss_is_drawn_for_train_solid_and_for_test_dashed(digits: RunResults) -> None:
    assert digits.profiles is not None
    figure = loss_figure(digits.profiles, digits.cut, digits.reference)
    train, test = trace(figure, "train"), trace(figure, "test")
    assert train.y == digits.profiles.train.loss
    assert test.y == digits.profiles.test.loss
    assert train.x == tuple(range(21))
    assert train.line.dash == "solid"
    assert test.line.dash != "solid"
    assert digits.reference is not None
    without = trace(figure, "no stage cost")
    assert without.y == digits.reference.test.loss
    assert without.line.color != test.line.color
    assert figure.layout.yaxis.type != "log"


def test_logarithmic_loss_is_the_excess_over_the_minimum(digits: RunResults) -> None:
    assert digits.profiles is not None
    test = digits.profiles.test
    figure = loss_figure(digits.profiles, log=True)
    assert figure.layout.yaxis.type == "log"
    np.testing.assert_allclose(trace(figure, "test").y, np.array(test.loss) - test.minimum)
    low, high = figure.layout.yaxis.range
    assert low < math.log10(min(v for t in figure.data for v in t.y))
    assert high > math.log10(max(v for t in figure.data for v in t.y))


def test_logarithmic_loss_leaves_out_what_has_no_logarithm(digits: RunResults) -> None:
    assert digits.profiles is not None
    test = digits.profiles.test
    reached = replace(test, loss=(*test.loss[:-1], test.minimum))
    figure = loss_figure(Profiles(reached, reached, reached), log=True)
    assert trace(figure, "test").y[-1] is None
    assert trace(figure, "test").y[-2] > 0


def test_quality_is_drawn_against_cost(digits: RunResults) -> None:
    assert digits.profiles is not None
    assert digits.reference is not None
    table = digits.profiles.test
    assert table.costs is not None
    figure = quality_figure(table, digits.reference)
    drawn, plain = trace(figure, "test"), trace(figure, "no stage cost")
    assert drawn.x == plain.x == table.costs.multiply_adds
    np.testing.assert_allclose(drawn.y, 100 * np.array(table.accuracy))
    np.testing.assert_allclose(drawn.error_y.array, 100 * np.array(table.accuracy_error))
    np.testing.assert_allclose(plain.y, 100 * np.array(digits.reference.test.accuracy))
    assert drawn.line.color != plain.line.color
    small = digits.reference.small
    assert small is not None
    (alone,) = [t for t in figure.data if t.name.endswith("from scratch")]
    assert alone.x == (table.costs.multiply_adds[small.horizon_before],)
    assert alone.y == (100 * small.accuracy_before,)
    depth = table.recommended_depth
    assert f"recommended: depth {depth}" in texts(figure)
    assert any(s.x0 == s.x1 == table.costs.multiply_adds[depth] for s in figure.layout.shapes)
    free = replace(table, costs=replace(table.costs, multiply_adds=(0,) * 21))
    for other in (free, replace(table, costs=None)):  # a network without products; an older file
        assert trace(quality_figure(other), "test").x == tuple(range(21))


def test_update_lies_between_its_layers(digits: RunResults) -> None:
    assert digits.profiles is not None
    drawn = trace(update_figure(digits.profiles), "train")
    assert drawn.x[0] == 0.5
    assert drawn.x[-1] == 19.5
    np.testing.assert_allclose(drawn.y, 100 * np.array(digits.profiles.train.relative_update))


def test_controls_lie_between_their_layers_and_zeros_are_marked(digits: RunResults) -> None:
    assert digits.profiles is not None
    norms = (3.0, 0.5, math.nan, *[0.0] * 17)
    profiles = replace(digits.profiles, control_norms=norms)
    figure = controls_figure(profiles, digits.cut)
    np.testing.assert_array_equal(trace(figure, "norm").y, norms)
    assert trace(figure, "norm").x[0] == 0.5
    assert list(trace(figure, "exactly 0").x) == [n + 0.5 for n in range(3, 20)]
    assert "The last 17 of 20 layers vanished" in controls_caption(profiles).replace(SPACE, " ")
    none = replace(digits.profiles, control_norms=(3.0,) * 20)
    assert not any(t.name == "exactly 0" for t in controls_figure(none).data)
    assert "no layer is exactly 0" in controls_caption(none)


def test_tube_entry_and_removed_layers_are_marked(digits: RunResults) -> None:
    assert digits.profiles is not None
    assert digits.cut is not None
    validation = digits.profiles.validation
    figure = distance_figure(digits.profiles, digits.cut)
    assert trace(figure, "validation").y == validation.distance
    tube = next(s for s in figure.layout.shapes if s.y1 == pytest.approx(validation.radius))
    assert (tube.type, tube.y0) == ("rect", 0)
    removed = next(s for s in figure.layout.shapes if s.x1 == 20)
    assert removed.x0 == digits.cut.report.horizon_after
    entry = validation.entry()
    assert f"entry {entry}" in texts(figure)
    assert any(s.type == "line" and s.x0 == s.x1 == entry for s in figure.layout.shapes)
    assert not any(text.startswith("exit") for text in texts(figure))


def test_exit_is_marked_only_where_states_leave(digits: RunResults) -> None:
    assert digits.profiles is not None
    test = digits.profiles.test
    leaving = with_distance(test, [3.0] * 4 + [0.1] * 14 + [2.0] * 3)
    figure = distance_figure(Profiles(leaving, leaving, leaving))
    assert {"entry 4", "exit 17"} <= set(texts(figure))
    outside = with_distance(test, [3.0] * 21)
    figure = distance_figure(Profiles(outside, outside, outside))
    assert not any(text.startswith(("entry", "exit")) for text in texts(figure))


def test_a_cut_from_the_middle_is_shaded_there(digits: RunResults) -> None:
    assert digits.profiles is not None
    assert digits.cut is not None
    cut = replace(digits.cut, removed=(5, 6, 7, 12))
    shaded = {(s.x0, s.x1) for s in loss_figure(digits.profiles, cut).layout.shapes}
    assert {(5, 8), (12, 13)} <= shaded


def test_classes_have_their_own_distances_and_names(digits: RunResults) -> None:
    assert digits.profiles is not None
    test = digits.profiles.test
    names = ("<b>zero</b> & co", *digits.class_names[1:])
    figure = class_figure(test, names)
    assert len(figure.data) == 10
    assert figure.data[3].y == tuple(row[3] for row in test.class_distance)
    assert figure.data[0].name == "&lt;b&gt;zero&lt;/b&gt; &amp; co"
    assert len({(t.line.color, t.marker.symbol) for t in figure.data}) == 10


def test_class_entry_is_the_layer_from_which_on_a_class_stays(digits: RunResults) -> None:
    assert digits.profiles is not None
    test = digits.profiles.test
    inside, outside = 0.5 * test.radius, 2 * test.radius
    columns = {0: [outside] * 3 + [inside] * 18, 1: [inside] * 20 + [outside]}
    rows = tuple(
        (columns[0][n], columns[1][n], *row[2:]) for n, row in enumerate(test.class_distance)
    )
    made = replace(test, class_distance=rows)
    assert class_entry(made, 0) == 3
    assert class_entry(made, 1) is None
    assert slowest_first(made)[0] == 1


def test_a_class_without_samples_is_left_out(digits: RunResults) -> None:
    assert digits.profiles is not None
    test = digits.profiles.test
    rows = tuple((*row[:9], math.nan) for row in test.class_distance)
    figure = class_figure(replace(test, class_distance=rows), digits.class_names)
    assert [t.name for t in figure.data] == list("012345678")


@pytest.mark.slow
def test_where_samples_are_tokens_there_is_nothing_class_by_class(digits: RunResults) -> None:
    assert digits.profiles is not None
    test = replace(digits.profiles.test, class_distance=())
    assert len(class_figure(test, digits.class_names).data) == 0
    assert class_caption(test, digits.class_names) == "No class has samples."
    shown = {panel.id for panel in layer_panels(digits)}
    profiles = replace(digits.profiles, test=test)
    assert shown - {p.id for p in layer_panels(replace(digits, profiles=profiles))} == {"classes"}


def test_of_many_classes_the_slowest_are_named() -> None:
    logits, labels = moving_logits(7, 500, 25, 12, 0.7)
    made = profile(logits, labels)
    figure = class_figure(made, tuple(f"class {c}" for c in range(25)))
    assert figure.data[0].name == "15 other classes"
    assert len(figure.data) == 11
    named = {int(t.name.split()[1]) for t in figure.data[1:]}
    assert named == set(slowest_first(made)[:10])
    assert sum(x is None for x in figure.data[0].x) == 15


def test_training_curves(digits: RunResults) -> None:
    loss = training_figure(digits.metrics)
    assert trace(loss, "train").y == tuple(row["loss"] for row in digits.metrics)
    assert trace(loss, "validation").y == tuple(row["validation_loss"] for row in digits.metrics)
    assert trace(loss, "validation").line.dash != "solid"
    accuracy = training_figure(digits.metrics, "accuracy")
    last = digits.metrics[-1]["validation_accuracy"]
    assert last is not None
    assert trace(accuracy, "validation").y[-1] == pytest.approx(100 * last)
    entry = training_figure(digits.metrics, "entry")
    assert entry.data[0].y[0] is None
    assert entry.data[0].y[-1] == digits.metrics[-1]["entry"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits", "spirals"])
def test_every_frame_shows_its_layer(name: str, request: pytest.FixtureRequest) -> None:
    results: RunResults = request.getfixturevalue(name)
    picture = results.picture
    assert picture is not None
    figure = trajectory_figure(picture, results.class_names)
    assert len(figure.frames) == len(picture.points)
    labels = np.array(picture.labels)
    for n in (0, 3, len(picture.points) - 1):
        for label, drawn in enumerate(figure.frames[n].data):
            there = np.array(picture.points[n])[labels == label]
            np.testing.assert_allclose(np.column_stack([drawn.x, drawn.y]), there, rtol=1e-4)
            moved = figure.data[figure.frames[n].traces[label]]
            assert moved.name == results.class_names[label]
    assert len(figure.layout.sliders[0].steps) == len(picture.points)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits", "spirals"])
def test_axes_are_equal_and_hold_all_layers(name: str, request: pytest.FixtureRequest) -> None:
    results: RunResults = request.getfixturevalue(name)
    assert results.picture is not None
    layout = trajectory_figure(results.picture, results.class_names).layout
    (x_low, x_high), (y_low, y_high) = layout.xaxis.range, layout.yaxis.range
    assert x_high - x_low == pytest.approx(y_high - y_low)
    assert layout.yaxis.scaleanchor == "x"
    points = np.array(results.picture.points)
    inside = ((points > (x_low, y_low)) & (points < (x_high, y_high))).all((0, 2))
    assert inside.mean() >= 0.99
    assert leaving(results.picture) == (~inside).sum()
    for ends in results.picture.minimisers:
        assert (np.mean(ends, 0) > (x_low, y_low)).all()
        assert (np.mean(ends, 0) < (x_high, y_high)).all()


def test_one_stray_sample_does_not_shrink_the_view(digits: RunResults) -> None:
    picture = digits.picture
    assert picture is not None
    astray = replace(picture, points=tuple(((1e3, -1e3), *layer[1:]) for layer in picture.points))
    (low, high), _ = view(astray)
    assert high - low < 20
    assert leaving(astray) >= 1
    assert leaving(replace(picture, points=picture.points[:1])) <= 3


@pytest.mark.slow
def test_minimisers_are_lines_in_the_state_plane(spirals: RunResults) -> None:
    assert spirals.picture is not None
    figure = trajectory_figure(spirals.picture, spirals.class_names)
    line = trace(figure, "minimisers of inner")
    assert line.mode == "lines"
    assert tuple(zip(line.x, line.y, strict=True)) == spirals.picture.minimisers[0]
    assert "plane" in figure.layout.title.text
    for note in figure.layout.annotations:  # names stand where their line is seen
        low, high = figure.layout.xaxis.range
        assert low < note.x < high
        low, high = figure.layout.yaxis.range
        assert low < note.y < high


@pytest.mark.slow
def test_minimisers_are_points_among_logits(digits: RunResults) -> None:
    picture = digits.picture
    assert picture is not None
    figure = trajectory_figure(picture, digits.class_names)
    ring = trace(figure, "minimisers of 4")
    assert ring.mode == "markers"
    assert ((ring.x[0], ring.y[0]),) == picture.minimisers[4][:1]
    assert f"({100 * picture.explained:.0f} % of the variance)" in figure.layout.title.text


def test_thinning_keeps_classes_and_order(digits: RunResults) -> None:
    picture = digits.picture
    assert picture is not None
    assert thin(picture) is picture
    few = thin(picture, most=50 * len(picture.points))
    assert len(few.labels) == 50
    assert {few.labels.count(c) for c in range(10)} == {5}
    place = [picture.points[0].index(p) for p in few.points[0]]
    assert all(a < b for a, b in pairwise(place))
    assert few.points[7] == tuple(picture.points[7][i] for i in place)
