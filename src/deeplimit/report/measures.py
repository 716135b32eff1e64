"""Networks as measures, compared, interpolated, merged: answers, tables, figures."""

import math
from collections.abc import Callable, Sequence

import plotly.graph_objects as go
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from deeplimit.errors import several
from deeplimit.report import style
from deeplimit.report.console import answered, table, verdict_line
from deeplimit.report.numbers import layers, percent, significant
from deeplimit.studies.comparison import ComparedLayer, ComparedPair, Comparison
from deeplimit.studies.interpolation import Interpolation
from deeplimit.training.results import MergedRuns, Score

ROWS = 24  # of a table of layers; a longer one shows the largest distances
PROVEN = 1e-9  # relative, up to which a distance is one number
EQUAL = 1e-6  # relative, below which the coupling does no better than the neurons' numbers
LAYERS = (
    "W₂: particles matched at the least cost; by number: neuron i with neuron i. Unmoved: the part "
    "that is matched with the neuron of its own number. Size: distance to the network of zeros."
)
CURVES = "W₂ of every layer: particles matched at the least cost; dashed: neuron i with neuron i."
COLUMNS = ("depth s", "layers", "W₂", "by number", "pairs", "unmoved", "longest way")
FRAMES = {
    "equal": "stem and head are shared",
    "interpolate": "stem and head move linearly, which is not part of the geodesic",
}


def comparison_summary(found: Comparison) -> RenderableType:
    """The answer; of two networks their layers, of more every two of them."""
    rows = [
        (
            network.name,
            str(network.depth),
            " … ".join(str(n) for n in sorted({min(network.widths), max(network.widths)})),
            " ".join(map(str, network.numbers)),
            significant(network.size),
        )
        for network in found.networks
    ]
    headings = ("network", "layers", "particles", "numbers each", "size")
    parts: list[RenderableType] = [table(headings, rows, left=headings[:1])]
    if len(found.pairs) == 1:
        parts += [_layer_table(found.pairs[0]), Text(LAYERS, style="dim")]
    else:
        names = [network.name for network in found.networks]
        cells = (
            (name, *("" if d is None else significant(d) for d in row))
            for name, row in zip(names, _distances(found), strict=True)
        )
        parts.append(table(("", *names), cells, "Distances"))
    note = ""
    if found.sinkhorn is not None or any(p.lower < p.distance * (1 - PROVEN) for p in found.pairs):
        how = "In float64" if found.sinkhorn is None else f"By Sinkhorn, ε = {found.sinkhorn:g}"
        note = f"{how}: d is at least {', '.join(significant(pair.lower) for pair in found.pairs)}."
    return answered(comparison_answer(found), *parts, note=note)


def comparison_answer(found: Comparison) -> str:
    """The distance of two, or the nearest two of more."""
    nearest = min(found.pairs, key=lambda pair: pair.distance)
    a, b = (found.networks[n] for n in (nearest.first, nearest.second))
    size = max(a.size, b.size)
    share = f", {percent(nearest.distance / size)} of the larger one's size" if size else ""
    distance = _proven(nearest.distance, nearest.lower, nearest.by_number)
    if len(found.pairs) > 1:
        names = f"{a.name} and {b.name}"
        return f"The nearest two of {len(found.networks)}: {names}, {distance}{share}."
    text = f"{a.name} and {b.name}: {distance}{share}."
    if nearest.by_number is None:
        return text
    if nearest.by_number <= nearest.lower * (1 + EQUAL):  # d itself but for Sinkhorn
        return f"{text} Their neurons already stand in matching order."
    by_number = significant(nearest.by_number)
    return f"{text} With neurons matched by their numbers it would be {by_number}."


def _distances(found: Comparison) -> list[list[float | None]]:
    every = range(len(found.networks))
    return [[None if i == j else found.distance(i, j) for j in every] for i in every]


def _proven(distance: float, lower: float | None, by_number: float | None = None) -> str:
    """The distance as it is known: one number, or between two where no more is proven."""
    if lower is None or lower >= distance * (1 - PROVEN):
        return f"d = {significant(distance)}"
    most = min(distance, by_number or math.inf)
    return f"{significant(lower)} ≤ d ≤ {significant(most)}"


def _layer_table(pair: ComparedPair) -> Table:
    title, shown = "Layer by layer", pair.layers
    if len(shown) > ROWS:
        title = f"The {ROWS} largest of {len(shown)} distances, in depth"
        kept = sorted(shown, key=lambda layer: -layer.distance)[:ROWS]
        shown = tuple(sorted(kept, key=lambda layer: layer.start))
    rows = (
        (
            f"{layer.start:.3g} – {layer.end:.3g}",
            f"{layer.first + 1}, {layer.second + 1}",
            significant(layer.distance),
            "–" if layer.by_number is None else significant(layer.by_number),
            str(layer.atoms),
            "–" if layer.unmoved is None else percent(layer.unmoved),
            significant(layer.largest),
        )
        for layer in shown
    )
    return table(COLUMNS, rows, title)


def comparison_figures(found: Comparison) -> list[tuple[str, go.Figure, str]]:
    """The distance in depth: of two networks against their neurons' numbers, of more every two."""
    answer = comparison_answer(found)
    if len(found.pairs) == 1:
        figure = layer_distance_figure(found.pairs[0].layers)
        return [("distance", figure, f"{answer} {CURVES}")]
    figure = _over_depth()
    for k, pair in enumerate(found.pairs):
        name = " – ".join(found.networks[n].name for n in (pair.first, pair.second))
        values = [layer.distance for layer in pair.layers]
        _add_steps(figure, pair.layers, style.Curve(name, values, style.class_look(k)[0]))
    return [
        ("distances", distance_map_figure(found), answer),
        ("distance", figure, "W₂ of every layer, for every two networks."),
    ]


def interpolation_answer(found: Interpolation) -> str:
    """The barriers, and how they compare."""
    text = f"On the geodesic the loss rises by {_barrier(found.barrier)} above its ends' line"
    if found.naive_barrier is None:
        return f"{text}; an average of parameters does not exist: {found.no_naive}."
    naive = f"on the way of averaged parameters by {_barrier(found.naive_barrier)}"
    ratio = "" if found.ratio is None else f": {percent(found.ratio)} of it"
    return f"{text}, {naive}{ratio}."


def _barrier(value: float) -> str:
    return "nothing" if value <= 0 else f"at most {significant(value)}"


def interpolation_summary(found: Interpolation) -> RenderableType:
    """The answer, loss and accuracy at every t, and what is saved where."""
    ways = [found.geodesic, *([found.naive] if found.naive else [])]
    rows = (
        (f"{t:.3g}", *(text for way in ways for text in _score(way[k], found.samples)))
        for k, t in enumerate(found.ts)
    )
    headings = ("t", "loss", "accuracy", "averaged: loss", "accuracy")[: 1 + 2 * len(ways)]
    title = f"{found.names[0]} → {found.names[1]}, {_proven(found.distance, found.lower)}"
    notes = [Text(_circumstances(found), style="dim")]
    if found.saved is not None:
        notes.append(Text(f"The network at t = {found.saved_at:g} is at {found.saved}"))
        notes.append(Text(_saved(found), style="dim"))
    return answered(interpolation_answer(found), table(headings, rows, title), *notes)


def _score(score: Score, samples: int) -> tuple[str, str]:
    return significant(score.loss), percent(score.accuracy, samples)


def _circumstances(found: Interpolation) -> str:
    first, last = (significant(score.loss) for score in found.ends)
    own = f"the networks themselves have the losses {first} and {last}"
    if any(layer.first != layer.second for layer in found.layers):
        # Another grid: x + hφ in two steps of h/2 is not quite the same, O(1/N).
        own += ", the path's ends are they with layers divided in steps that fit both depths"
    turned = "; the second network was turned into the first one's basis" if found.aligned else ""
    return (
        f"{several(found.samples, 'test sample')}, soft cross-entropy (ε = {found.softness:g}); "
        f"{own}; between them up to {found.width} neurons in a layer; "
        f"{FRAMES[found.frame]}{turned}."
    )


def _saved(found: Interpolation) -> str:
    """Says how far what was written is from both ends, and how far the geodesic's point is."""
    if found.saved_distances is None or found.saved_at is None:
        return ""
    t, size = found.saved_at, found.distance
    point = (t * size, (1 - t) * size)
    (first, last), (here, there) = (map(significant, d) for d in (found.saved_distances, point))
    text = (
        f"The saved network, at t = {t:g}, has the distances {first} and {last} to the ends; the "
        f"point of the geodesic has {here} and {there}."
    )
    pairs = zip(found.saved_distances, point, strict=True)
    if all(math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-3 * size) for a, b in pairs):
        return text
    return (
        f"{text} It computes what that point does, but its neurons have no weights: as a "
        "measure it is off the geodesic."
    )


def interpolation_figures(found: Interpolation) -> list[tuple[str, go.Figure, str]]:
    """Loss and accuracy along the way, distance in depth."""
    best = max(found.geodesic, key=lambda score: score.accuracy)
    middle = found.geodesic[len(found.geodesic) // 2]
    accuracy = (
        f"In the middle of the geodesic {percent(middle.accuracy, found.samples)} of the test "
        f"samples are right, at its best point {percent(best.accuracy, found.samples)}."
    )
    distance = (
        f"{_proven(found.distance, found.lower)}. Matched at the least cost, layer by layer; "
        f"dashed, where it exists, neurons matched by their numbers. {_saved(found)}".rstrip()
    )
    answer = f"{interpolation_answer(found)} {_circumstances(found)}"
    loss = _paths(found, "Loss", "nats", lambda score: score.loss, "%{y:.4g}")
    right = _paths(found, "Accuracy", "percent", lambda score: 100 * score.accuracy, "%{y:.2f} %")
    return [
        ("loss", loss, answer[0].upper() + answer[1:]),
        ("accuracy", right, accuracy),
        ("distance", layer_distance_figure(found.layers), distance),
    ]


def merge_summary(found: MergedRuns) -> RenderableType:
    """Loss and accuracy of the networks and of what was made of them."""
    n = found.samples
    parents = zip(found.names, found.weights, found.distances, found.parents, strict=True)
    rows = [
        (name, f"{weight:.3g}", significant(distance), *_score(score, n))
        for name, weight, distance, score in parents
    ]
    rows.append(("merged", "", "", *_score(found.merged, n)))
    if found.averaged is not None:
        rows.append(("parameters averaged", "", "", *_score(found.averaged, n)))
    headings = ("network", "weight", "distance", "loss", "accuracy")
    title = f"Merged: {len(found.runs)} networks → 1"
    note = (
        f"{several(n, 'test sample')}; {layers(found.depth)} of up to "
        f"{several(found.width, 'neuron')}."
    )
    for name, d, lower in zip(found.names, found.distances, found.lower or (), strict=False):
        if lower < d * (1 - PROVEN):
            note += f" Of the distance to {name} only this is proven: {_proven(d, lower)}."
    if found.narrowed is not None:
        note += f" Narrowed by {significant(found.narrowed)}, which is off the barycentre."
    made = table(headings, rows, title, left=headings[:1])
    return answered("", made, *verdict_line(found.verdict), note=note)


def _paths(
    found: Interpolation, what: str, unit: str, value: Callable[[Score], float], hover: str
) -> go.Figure:
    way = "t, from the first network to the second"
    figure = _over("t", way, f"{what} between the networks", unit, zero=False)
    curves = [style.Curve("geodesic", [*map(value, found.geodesic)])]
    if found.naive is not None:
        curves.append(style.reference("parameters averaged", [*map(value, found.naive)]))
    return style.draw(figure, found.ts, *curves, value=hover)


def layer_distance_figure(layers: tuple[ComparedLayer, ...]) -> go.Figure:
    """W_2 over the depth s, constant in each cell; dashed with neurons matched by their numbers."""
    figure = _over_depth()
    _add_steps(figure, layers, style.Curve("matched", [layer.distance for layer in layers]))
    by_number = [layer.by_number for layer in layers]
    if any(value is not None for value in by_number):
        _add_steps(figure, layers, style.reference("by their numbers", by_number))
    return figure


def distance_map_figure(found: Comparison) -> go.Figure:
    """The distance of every two networks."""
    names = [network.name for network in found.networks]
    z = _distances(found)
    texts = [["" if d is None else significant(d) for d in row] for row in z]
    largest = max(pair.distance for pair in found.pairs) or 1
    hover = "%{y} and %{x}: d = %{text}<extra></extra>"
    figure = style.plain_figure("Distances", "", "")
    style.heat_map(figure, names, names, z, texts, largest, hover)
    figure.update_yaxes(autorange="reversed")
    return figure.update_layout(height=100 + 44 * len(names), margin={"t": 56})


def _over(axis: str, x_title: str, title: str, y_title: str, *, zero: bool = True) -> go.Figure:
    """An empty figure over what goes from 0 to 1."""
    figure = style.plain_figure(title, x_title, y_title, at=f"{axis} = %{{x:.3g}}", zero=zero)
    return figure.update_xaxes(range=[-0.03, 1.03])


def _over_depth() -> go.Figure:
    return _over("s", "depth s, from the input to the output", "Distance in depth", "W<sub>2</sub>")


def _add_steps(figure: go.Figure, layers: Sequence[ComparedLayer], curve: style.Curve) -> None:
    """One value for each cell, held until the next."""
    x, values = [*(layer.start for layer in layers), layers[-1].end], curve.values
    style.draw(figure, x, curve._replace(values=[*values, values[-1]]))
    figure.data[-1].update(mode="lines", line_shape="hv")
