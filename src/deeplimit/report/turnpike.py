"""What every layer achieves: figures over the layers n = 0 … N, and what to see in them."""

import html
import math
from collections.abc import Callable, Sequence

import plotly.graph_objects as go

from deeplimit.control.turnpike import TurnpikeProfile
from deeplimit.report.numbers import layers, percent, significant
from deeplimit.report.style import (
    DASHED,
    GRID,
    NETWORK,
    REFERENCE,
    TUBE,
    class_color,
    class_symbol,
    layer_figure,
    line,
    logarithmic,
    mark_layer,
    shade_tube,
)
from deeplimit.training.results import Cut, Profiles, Reference

Values = Callable[[TurnpikeProfile], Sequence[float | None]]
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
    test = profiles.test

    def values(profile: TurnpikeProfile) -> Sequence[float | None]:
        return _positive([v - profile.minimum for v in profile.loss]) if log else profile.loss

    if log:
        figure = layer_figure("Loss above its minimum", test.horizon, "nats, logarithmic", cut)
    else:
        figure = layer_figure("Loss", test.horizon, "nats", cut)
        figure.update_yaxes(rangemode="tozero")
        if math.isnan(test.minimum):  # of a loss without minimisers
            _add_networks(figure, profiles, reference, values)
            return figure
        figure.add_hline(y=test.minimum, line={"color": TUBE, "width": 1.5, "dash": "dot"})
        figure.add_annotation(
            x=1,
            xref="paper",
            y=test.minimum,
            text=f"minimum {significant(test.minimum)}",
            showarrow=False,
            xanchor="right",
            yanchor="top",
            font={"color": TUBE, "size": 12},
        )
    _add_networks(figure, profiles, reference, values)
    if log:
        logarithmic(figure, _drawn(figure))
    return _mark_entry(figure, profiles)


def accuracy_figure(
    profiles: Profiles, cut: Cut | None = None, reference: Reference | None = None
) -> go.Figure:
    """Accuracy over layers, in percent."""
    figure = layer_figure("Accuracy", profiles.test.horizon, "percent", cut)
    figure.update_yaxes(rangemode="tozero")
    _add_networks(
        figure, profiles, reference, lambda p: [100 * a for a in p.accuracy], "%{y:.2f} %"
    )
    return _mark_entry(figure, profiles)


def distance_figure(
    profiles: Profiles, cut: Cut | None = None, reference: Reference | None = None
) -> go.Figure:
    """Mean distance to the minimisers over layers, with the tube of radius δ shaded.

    Validation data are drawn besides: entry and exit are theirs.
    """
    validation = profiles.validation
    figure = layer_figure("Distance to the minimisers", validation.horizon, "mean distance", cut)
    figure.update_yaxes(rangemode="tozero")
    shade_tube(figure, validation.radius)
    _add_networks(figure, profiles, reference, lambda p: p.distance)
    layers = range(validation.horizon + 1)
    figure.add_trace(line(layers, validation.distance, "validation", TUBE, DASHED, "%{y:.4g}"))
    leaving = validation.exit()
    if leaving is not None and leaving < validation.horizon:
        mark_layer(figure, leaving, f"exit {leaving}")
    return _mark_entry(figure, profiles)


def update_figure(
    profiles: Profiles, cut: Cut | None = None, reference: Reference | None = None
) -> go.Figure:
    """Relative update ‖x_{n+1} − x_n‖ / ‖x_n‖ in percent, drawn half way between n and n + 1."""
    horizon = profiles.test.horizon
    figure = layer_figure("Relative update", horizon, "percent, logarithmic", cut)
    figure.update_xaxes(unifiedhovertitle={"text": "between layers, at %{x}"})
    _add_networks(
        figure,
        profiles,
        reference,
        lambda p: _positive([100 * u for u in p.relative_update]),
        "%{y:.3g} %",
        shift=0.5,
    )
    logarithmic(figure, _drawn(figure))
    return _mark_entry(figure, profiles)


def influence_figure(profiles: Profiles, cut: Cut | None = None) -> go.Figure:
    """Block influence 1 − cos(x_n, x_{n+1}), drawn half way between n and n + 1."""
    figure = layer_figure("Influence", profiles.test.horizon, "1 − cos", cut)
    figure.update_xaxes(unifiedhovertitle={"text": "between layers, at %{x}"})
    figure.update_yaxes(rangemode="tozero")
    _add_networks(figure, profiles, None, lambda p: p.influence or (), shift=0.5)
    return figure


def _add_networks(
    figure: go.Figure,
    profiles: Profiles,
    reference: Reference | None,
    values: Values,
    value: str = "%{y:.4g}",
    shift: float = 0.0,
) -> None:
    """Train solid, test dashed; the network trained without stage cost behind them."""
    drawn = [
        (profiles.train, "train", NETWORK, "solid"),
        (profiles.test, "test", NETWORK, DASHED),
    ]
    if reference is not None:
        drawn.insert(0, (reference.test, "no stage cost", REFERENCE, DASHED))
    for profile, name, color, dash in drawn:
        y = values(profile)
        figure.add_trace(line([n + shift for n in range(len(y))], y, name, color, dash, value))
    figure.update_layout(legend={"traceorder": "reversed"})


def _drawn(figure: go.Figure) -> list[float | None]:
    return [value for trace in figure.data for value in trace.y]


def _positive(values: Sequence[float]) -> list[float | None]:
    """What a logarithmic scale can show; the rest is left out."""
    return [v if v > 0 else None for v in values]


def _mark_entry(figure: go.Figure, profiles: Profiles) -> go.Figure:
    """That of validation data, on which the depth is chosen."""
    entry = profiles.validation.entry()
    if entry is not None:
        mark_layer(figure, entry, f"entry {entry}")
    return figure


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
    horizon = profile.horizon
    figure = layer_figure("Class by class", horizon, "mean distance")
    figure.update_yaxes(rangemode="tozero")
    shade_tube(figure, profile.radius)
    order = slowest_first(profile)
    named = sorted(order[:NAMED])
    layers = list(range(horizon + 1))
    crowd = sorted(order[NAMED:])
    if crowd:
        figure.add_trace(_crowd(profile, crowd, layers))
    for place, label in enumerate(named):
        y = [row[label] for row in profile.class_distance]
        name = html.escape(class_names[label], quote=False)
        trace = line(layers, y, name, class_color(label if not crowd else place))
        trace.update(marker_symbol=class_symbol(label if not crowd else place), line_width=1.6)
        figure.add_trace(trace)
    return figure


def _crowd(profile: TurnpikeProfile, labels: Sequence[int], layers: Sequence[int]) -> go.Scatter:
    """Many classes as one pale trace, interrupted between classes."""
    x: list[float | None] = []
    y: list[float | None] = []
    for label in labels:
        x += [*layers, None]
        y += [*(row[label] for row in profile.class_distance), None]
    return go.Scatter(
        x=x,
        y=y,
        mode="lines",
        name=f"{len(labels)} other classes",
        line={"color": GRID, "width": 1.2},
        hoverinfo="skip",
    )


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


def accuracy_caption(profiles: Profiles, cut: Cut | None, reference: Reference | None) -> str:
    """Accuracy read out at the layer of interest, against the network without stage cost."""
    test = profiles.test
    n = _interesting(profiles.validation, cut)
    text = (
        f"Read out after layer {n}, the network is right on "
        f"{percent(test.accuracy[n], test.samples)} of the test samples; after all "
        f"{test.horizon}, on {percent(test.accuracy[-1], test.samples)}."
    )
    if reference is not None and n <= reference.test.horizon:
        there = percent(reference.test.accuracy[n], reference.test.samples)
        text += f" Trained without stage cost, it is right on {there} there."
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
