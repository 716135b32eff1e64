"""Figures over the layers n = 0 … N: what every layer's state achieves."""

import math
from collections.abc import Callable, Sequence

import plotly.graph_objects as go

from deeplimit.control.turnpike import TurnpikeProfile
from deeplimit.report.figures.marks import layer_figure, logarithmic, mark_layer, shade_tube
from deeplimit.report.figures.style import DASHED, NETWORK, REFERENCE, TUBE, line
from deeplimit.report.numbers import significant
from deeplimit.training.results import Cut, Profiles, Reference

Values = Callable[[TurnpikeProfile], Sequence[float | None]]


def loss_figure(
    profiles: Profiles,
    cut: Cut | None = None,
    reference: Reference | None = None,
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
