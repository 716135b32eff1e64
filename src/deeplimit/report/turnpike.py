"""What every layer achieves: figures over the layers n = 0 … N, and what to see in them."""

import html
import math
from collections.abc import Callable, Sequence

import plotly.graph_objects as go

from deeplimit.control.depth_table import DepthTable
from deeplimit.control.turnpike import TurnpikeProfile
from deeplimit.report import style
from deeplimit.report.answer import vanished_sentence
from deeplimit.report.numbers import layers, percent, perplexity, significant
from deeplimit.training.results import Cut, Profiles, Reference

NAMED = 10  # so many classes can be told apart by colour and symbol
STILL = 0.01  # a relative update below which a layer hardly moves the state


def loss_figure(
    profiles: Profiles,
    cut: Cut | None = None,
    reference: Reference | None = None,
    *,
    log: bool = False,
) -> go.Figure:
    """Loss over layers; with `log` its excess over the minimum H(q), on a logarithmic scale.

    The excess ℓ − H(q) is what a layer can still gain; on the linear scale H(q) is a dotted line.
    """

    def values(profile: TurnpikeProfile) -> style.Values:
        return [v - profile.minimum for v in profile.loss] if log else profile.loss

    title, unit = ("Loss above its minimum", "nats, logarithmic") if log else ("Loss", "nats")
    figure = _over_layers(title, unit, profiles, cut, reference, values, log=log)
    minimum = profiles.test.minimum
    if not log and not math.isnan(minimum):  # as it is of a loss without minimisers
        style.mark_value(figure, minimum, f"minimum {significant(minimum)}")
    return figure


def quality_figure(depths: DepthTable, reference: Reference | None = None) -> go.Figure:
    """Accuracy, or the loss, of every depth against its multiply-adds, on test data.

    Behind it the network trained without stage cost, at the same depths, and the one of the cut's
    depth from scratch.
    """
    (trace,) = depths.plot().data
    cost = "depth" if trace.x[-1] == depths.horizon else "multiply-adds a sample"
    figure = style.plain_figure("Quality against cost", cost, trace.name, at=f"%{{x:,}} {cost}")
    plain = reference and reference.test
    if plain and plain.horizon == depths.horizon:
        values = [100 * a for a in plain.accuracy] if depths.accuracy else plain.loss
        style.draw(figure, trace.x, style.reference("no stage cost", values), value="%{y:.4g}")
    small = reference and reference.small
    if small and depths.accuracy and small.horizon_before <= depths.horizon:
        name = f"no stage cost, {layers(small.horizon_before)} from scratch"
        place, height = [trace.x[small.horizon_before]], [100 * small.accuracy_before]
        point = style.line(place, style.Curve(name, height, style.REFERENCE))
        figure.add_trace(point.update(mode="markers", marker={"symbol": "diamond", "size": 10}))
    trace.update(name="test", line={"color": style.NETWORK, "width": 2.2}, marker={"size": 5})
    figure.add_trace(trace.update(error_y={"thickness": 1, "width": 2}))
    depth = depths.recommended_depth
    style.mark_layer(figure, trace.x[depth], f"recommended: depth {depth}")
    return figure


def distance_figure(
    profiles: Profiles, cut: Cut | None = None, reference: Reference | None = None
) -> go.Figure:
    """Mean distance to the minimisers over layers, with the tube of radius δ shaded.

    Validation data are drawn besides: entry and exit are theirs.
    """
    title, unit, measured = "Distance to the minimisers", "mean distance", profiles.validation
    figure = _over_layers(title, unit, profiles, cut, reference, lambda profile: profile.distance)
    style.shade_tube(figure, measured.radius)
    validation = style.Curve("validation", measured.distance, style.TUBE, style.DASHED)
    style.draw(figure, range(measured.horizon + 1), validation, value="%{y:.4g}")
    leaving = measured.exit()
    if leaving is not None and leaving < measured.horizon:
        style.mark_layer(figure, leaving, f"exit {leaving}")
    return figure


def update_figure(
    profiles: Profiles, cut: Cut | None = None, reference: Reference | None = None
) -> go.Figure:
    """Relative update ‖x_{n+1} − x_n‖ / ‖x_n‖ in percent, drawn half way between n and n + 1."""

    def values(profile: TurnpikeProfile) -> style.Values:
        return [100 * update for update in profile.relative_update]

    title, unit, hover = "Relative update", "percent, logarithmic", "%{y:.3g} %"
    return _over_layers(
        title, unit, profiles, cut, reference, values, hover, between=True, log=True
    )


def influence_figure(profiles: Profiles, cut: Cut | None = None) -> go.Figure:
    """Block influence 1 − cos(x_n, x_{n+1}), drawn half way between n and n + 1."""

    def values(profile: TurnpikeProfile) -> style.Values:
        return profile.influence or ()

    return _over_layers("Influence", "1 − cos", profiles, cut, None, values, between=True)


def controls_figure(profiles: Profiles, cut: Cut | None = None) -> go.Figure:
    """Norm of each layer's controls, drawn half way between n and n + 1; crosses where it is 0."""
    norms = profiles.control_norms or ()
    title, unit = "Controls", "norm of the last layer of each branch"
    figure = style.layer_figure(title, profiles.test.horizon, unit, cut, between=True, zero=True)
    places = [n + 0.5 for n in range(len(norms))]
    style.draw(figure, places, style.Curve("norm", norms), value="%{y:.4g}")
    gone = profiles.vanished
    if gone:
        cross, at = {"color": style.TUBE, "symbol": "x"}, [n + 0.5 for n in gone]
        figure.add_scatter(x=at, y=[0] * len(at), mode="markers", name="exactly 0", marker=cross)
    return figure


def controls_caption(profiles: Profiles) -> str:
    """How many layers have vanished, and the largest norm."""
    norms = [norm for norm in profiles.control_norms or () if not math.isnan(norm)]
    if not norms:
        return "The last layers of the residual branches are not known."
    largest = f"The largest norm is {significant(max(norms))}"
    if not profiles.vanished:
        return f"{largest}, the smallest {significant(min(norms))}: no layer is exactly 0."
    return f"{largest}. {vanished_sentence(profiles)}"


def _over_layers(
    title: str,
    unit: str,
    profiles: Profiles,
    cut: Cut | None,
    reference: Reference | None,
    values: Callable[[TurnpikeProfile], style.Values],
    value: str = "%{y:.4g}",
    *,
    between: bool = False,
    log: bool = False,
) -> go.Figure:
    """Train solid, test dashed; the network trained without stage cost behind them.

    The entry is that of validation data, on which the depth is chosen.
    """
    horizon, entry = profiles.test.horizon, profiles.validation.entry()
    figure = style.layer_figure(title, horizon, unit, cut, between=between, zero=not log)
    drawn = [] if reference is None else [style.reference("no stage cost", values(reference.test))]
    drawn += [
        style.Curve("train", values(profiles.train)),
        style.Curve("test", values(profiles.test), dash=style.DASHED),
    ]
    for curve in drawn:
        places = [n + 0.5 * between for n in range(len(curve.values))]
        style.draw(figure, places, curve, value=value, log=log)
    if entry is not None:
        style.mark_layer(figure, entry, f"entry {entry}")
    return figure.update_layout(legend={"traceorder": "reversed"})


def class_entry(profile: TurnpikeProfile, label: int) -> int | None:
    """First layer from which on a class stays in the tube up to layer N; None if it ends outside.

    A class without samples has no distances and so no entry.
    """
    entry = None
    for n in range(profile.horizon, -1, -1):
        if not profile.class_distance[n][label] <= profile.radius:
            break
        entry = n
    return entry


def slowest_first(profile: TurnpikeProfile) -> list[int]:
    """Classes with samples, the last to stay in the tube first; ties by the distance at layer N."""
    if not profile.class_distance:  # of tokens there is none
        return []
    last = profile.class_distance[-1]
    present = [c for c in range(profile.classes) if not math.isnan(last[c])]

    def key(label: int) -> tuple[float, float]:
        entry = class_entry(profile, label)
        return (math.inf if entry is None else float(entry), last[label])

    return sorted(present, key=key, reverse=True)


def class_figure(profile: TurnpikeProfile, class_names: Sequence[str]) -> go.Figure:
    """Mean distance to the minimisers of every class over layers.

    Beyond ten classes the ten that enter the tube last are named, the others drawn in grey.
    """
    figure = style.layer_figure("Class by class", profile.horizon, "mean distance", zero=True)
    style.shade_tube(figure, profile.radius)
    order = slowest_first(profile)
    places = list(range(profile.horizon + 1))
    distances = {c: [row[c] for row in profile.class_distance] for c in order}
    crowd = sorted(order[NAMED:])
    if crowd:  # many classes as one pale trace, interrupted between classes
        figure.add_scatter(
            x=[*places, None] * len(crowd),
            y=[value for label in crowd for value in (*distances[label], None)],
            mode="lines",
            name=f"{len(crowd)} other classes",
            line={"color": style.GRID, "width": 1.2},
            hoverinfo="skip",
        )
    for place, label in enumerate(sorted(order[:NAMED])):
        color, symbol = style.class_look(place if crowd else label)
        name = html.escape(class_names[label], quote=False)
        trace = style.line(places, style.Curve(name, distances[label], color))
        figure.add_trace(trace.update(marker_symbol=symbol, line_width=1.6))
    return figure


def loss_caption(profiles: Profiles, cut: Cut | None, *, log: bool) -> str:
    """The fall of the loss, and how little is left after the layer of interest."""
    test = profiles.test
    n = _interesting(profiles.validation, cut)
    if not log:
        more = test.horizon - n
        rest = f"; the remaining {layers(more)} take it to {significant(test.loss[-1])}"
        return (
            f"Test loss falls from {significant(test.loss[0])} at the input to "
            f"{significant(test.loss[n])} at layer {n}{rest if more else ''}. The dotted line "
            "is the least value that the soft cross-entropy can take."
        )
    left, left_at_end, train, train_at_end = (
        significant(profile.loss[at] - profile.minimum)
        for profile in (test, profiles.train)
        for at in (n, test.horizon)
    )
    return (
        f"What is left to gain on test data: {left} nats above the minimum at layer {n}, "
        f"{left_at_end} at layer {test.horizon}; on training data {train} and {train_at_end}. "
        "Where a line is flat, layers gain nothing."
    )


def quality_caption(depths: DepthTable, reference: Reference | None) -> str:
    """What the recommended depth reaches, against all layers and the network without stage cost."""
    n = depths.recommended_depth

    def reached(profile: TurnpikeProfile, at: int) -> str:
        if profile.accuracy:
            return f"an accuracy of {percent(profile.accuracy[at], profile.samples)}"
        return f"a perplexity of {perplexity(profile.loss[at])}"

    text = f"At depth {n} the network has {reached(depths, n)}, at {depths.horizon} "
    text += f"{reached(depths, depths.horizon)}."
    if reference is not None and n <= reference.test.horizon:
        text += f" Trained without stage cost, it has {reached(reference.test, n)} at depth {n}."
    return text


def distance_caption(profiles: Profiles) -> str:
    """When the tube is entered, left, or missed; on validation data."""
    validation = profiles.validation
    radius = significant(validation.radius)
    entry, leaving = validation.entry(), validation.exit()
    if entry is None or leaving is None:
        return (
            f"On validation data no layer lies in the tube of radius δ = {radius}: the smallest "
            f"mean distance to the minimisers is {significant(min(validation.distance))}. There is "
            "no turnpike at this radius."
        )
    text = (
        f"On validation data the states stay in the tube of radius δ = {radius} around the "
        f"minimisers from layer {entry}, the entry, to layer {leaving}: this stretch is the "
        "turnpike."
    )
    if leaving < validation.horizon:
        text += f" After layer {leaving}, the exit, they leave it again."
    outside = validation.outside()
    return text + f" Of layers 0 to {validation.horizon}, {outside} lie outside the tube."


def influence_caption(profile: TurnpikeProfile) -> str:
    """Which layer turns the states least."""
    influence = profile.influence or ()
    if not influence:
        return "The network has no layers."
    least, most = (pick(range(len(influence)), key=influence.__getitem__) for pick in (min, max))
    return (
        f"1 − cos of the states before and after a layer (ShortGPT, arXiv 2403.03853): layer "
        f"{least + 1}, counted from 1, turns them least, layer {most + 1} most."
    )


def update_caption(profiles: Profiles) -> str:
    """From where on layers hardly move the state."""
    updates = profiles.test.relative_update
    if not updates:
        return "The network has no layers."
    still = len(updates)
    while still > 0 and updates[still - 1] < STILL:
        still -= 1
    start = f"On test data the first layer moves the state by {percent(updates[0])} of its length"
    if still == len(updates):
        return f"{start}, the last still by {percent(updates[-1])}."
    return (
        f"{start}; from layer {still} on none moves it by as much as {percent(STILL)}: "
        "such layers do next to nothing and can be left out."
    )


def class_caption(profile: TurnpikeProfile, class_names: Sequence[str]) -> str:
    """The last and the first class to stay in the tube."""
    order = slowest_first(profile)
    if not order:
        return "No class has samples."
    slow, fast = order[0], order[-1]
    entry = class_entry(profile, slow)
    if entry is None:
        last = significant(profile.class_distance[-1][slow])
        outside = sum(class_entry(profile, label) is None for label in order)
        return (
            f"On test data {outside} of {len(order)} classes end{'s' if outside == 1 else ''} "
            f"outside the tube at layer {profile.horizon}; furthest is "
            f"“{class_names[slow]}”, at a distance of {last}."
        )
    if class_entry(profile, fast) == entry:
        return f"On test data all {len(order)} classes are in the tube from layer {entry} on."
    return (
        f"On test data “{class_names[fast]}” stays in the tube from layer "
        f"{class_entry(profile, fast)} on, “{class_names[slow]}”, the last, from layer {entry}."
    )


def _interesting(profile: TurnpikeProfile, cut: Cut | None) -> int:
    """The layer to talk about: where the network was cut, or the entry."""
    if cut is not None and cut.removed:
        return min(cut.removed)
    entry = profile.entry()
    return profile.recommended_depth if entry is None else entry
