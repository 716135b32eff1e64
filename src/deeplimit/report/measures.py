"""Networks as measures, compared, interpolated, merged: answers, tables, figures."""

import math
from collections.abc import Callable

import plotly.graph_objects as go
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from deeplimit.errors import several
from deeplimit.report.console import verdict_line
from deeplimit.report.numbers import layers, percent, significant
from deeplimit.report.style import CLASSES, DASHED, NETWORK, REFERENCE, SHADE, line, plain_figure
from deeplimit.studies.comparison import ComparedLayer, ComparedNetwork, ComparedPair, Comparison
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


def comparison_summary(found: Comparison) -> RenderableType:
    """The answer; of two networks their layers, of more every two of them."""
    parts: list[RenderableType] = [Text(comparison_answer(found), style="bold")]
    parts.append(_network_table(found))
    if len(found.pairs) == 1:
        parts.append(_layer_table(found.pairs[0]))
        parts.append(Text(LAYERS, style="dim"))
    else:
        parts.append(_pair_table(found))
    if found.sinkhorn is not None or any(p.lower < p.distance * (1 - PROVEN) for p in found.pairs):
        how = "In float64" if found.sinkhorn is None else f"By Sinkhorn, ε = {found.sinkhorn:g}"
        least = ", ".join(significant(pair.lower) for pair in found.pairs)
        parts.append(Text(f"{how}: d is at least {least}.", "dim"))
    return Group(*parts)


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


def _network_table(found: Comparison) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("network", "layers", "particles", "numbers each", "size"):
        table.add_column(name, justify="left" if name == "network" else "right", no_wrap=True)
    for network in found.networks:
        table.add_row(
            network.name,
            str(network.depth),
            _widths(network),
            " ".join(map(str, network.numbers)),
            significant(network.size),
        )
    return table


def _widths(network: ComparedNetwork) -> str:
    low, high = min(network.widths), max(network.widths)
    return str(low) if low == high else f"{low} … {high}"


def _proven(distance: float, lower: float | None, by_number: float | None = None) -> str:
    """The distance as it is known: one number, or between two where no more is proven."""
    if lower is None or lower >= distance * (1 - PROVEN):
        return f"d = {significant(distance)}"
    most = min(distance, by_number or math.inf)
    return f"{significant(lower)} ≤ d ≤ {significant(most)}"


def _pair_table(found: Comparison) -> Table:
    table = Table(title="Distances", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("")
    for network in found.networks:
        table.add_column(network.name, justify="right", no_wrap=True)
    for i, network in enumerate(found.networks):
        row = (
            "" if i == j else significant(found.distance(i, j)) for j in range(len(found.networks))
        )
        table.add_row(network.name, *row)
    return table


def _layer_table(pair: ComparedPair) -> Table:
    table = Table(title="Layer by layer", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("depth s", "layers", "W₂", "by number", "pairs", "unmoved", "longest way"):
        table.add_column(name, justify="right", no_wrap=True)
    shown = pair.layers
    if len(shown) > ROWS:
        table.title = f"The {ROWS} largest of {len(shown)} distances, in depth"
        kept = sorted(shown, key=lambda layer: -layer.distance)[:ROWS]
        shown = tuple(sorted(kept, key=lambda layer: layer.start))
    for layer in shown:
        table.add_row(*_layer_row(layer))
    return table


def _layer_row(layer: ComparedLayer) -> tuple[str, ...]:
    return (
        f"{layer.start:.3g} – {layer.end:.3g}",
        f"{layer.first + 1}, {layer.second + 1}",
        significant(layer.distance),
        "–" if layer.by_number is None else significant(layer.by_number),
        str(layer.atoms),
        "–" if layer.unmoved is None else percent(layer.unmoved),
        significant(layer.largest),
    )


def comparison_figures(found: Comparison) -> list[tuple[str, go.Figure, str]]:
    """The distance in depth: of two networks against their neurons' numbers, of more every two."""
    if len(found.pairs) == 1:
        figure = layer_distance_figure(found.pairs[0].layers)
        return [("distance", figure, f"{comparison_answer(found)} {CURVES}")]
    return [
        ("distances", distance_map_figure(found), comparison_answer(found)),
        ("distance", comparison_figure(found), "W₂ of every layer, for every two networks."),
    ]


def interpolation_answer(found: Interpolation) -> str:
    """The barriers, and how they compare."""
    text = f"On the geodesic the loss rises by {_barrier(found.barrier)} above its ends' line"
    if found.naive_barrier is None:
        return f"{text}; an average of parameters does not exist: {found.no_naive}."
    naive = f"on the way of averaged parameters by {_barrier(found.naive_barrier)}"
    if found.ratio is None:
        return f"{text}, {naive}."
    return f"{text}, {naive}: {percent(found.ratio)} of it."


def _barrier(value: float) -> str:
    return "nothing" if value <= 0 else f"at most {significant(value)}"


def interpolation_summary(found: Interpolation) -> RenderableType:
    """The answer, loss and accuracy at every t, and what is saved where."""
    title = f"{found.names[0]} → {found.names[1]}, {_proven(found.distance, found.lower)}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    names = ["t", "loss", "accuracy"]
    if found.naive is not None:
        names += ["averaged: loss", "accuracy"]
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for k, t in enumerate(found.ts):
        scores = [found.geodesic[k], *([found.naive[k]] if found.naive else [])]
        cells = ((significant(s.loss), percent(s.accuracy, found.samples)) for s in scores)
        table.add_row(f"{t:.3g}", *(text for pair in cells for text in pair))
    parts: list[RenderableType] = [Text(interpolation_answer(found), style="bold"), table]
    parts.append(Text(_circumstances(found), style="dim"))
    if found.saved is not None:
        parts.append(Text(f"The network at t = {found.saved_at:g} is at {found.saved}"))
        parts.append(Text(_saved(found), style="dim"))
    return Group(*parts)


def _circumstances(found: Interpolation) -> str:
    first, last = (significant(score.loss) for score in found.ends)
    own = f"the networks themselves have the losses {first} and {last}"
    if any(layer.first != layer.second for layer in found.layers):
        # Another grid: x + hφ in two steps of h/2 is not quite the same, O(1/N).
        own += ", the path's ends are they with layers divided in steps that fit both depths"
    frame = {
        "equal": "stem and head are shared",
        "interpolate": "stem and head move linearly, which is not part of the geodesic",
    }[found.frame]
    turned = "; the second network was turned into the first one's basis" if found.aligned else ""
    return (
        f"{several(found.samples, 'test sample')}, soft cross-entropy (ε = {found.softness:g}); "
        f"{own}; "
        f"between them up to {found.width} neurons in a layer; {frame}{turned}."
    )


def _saved(found: Interpolation) -> str:
    """How far what was written is from both ends, and how far the geodesic's point is."""
    if found.saved_distances is None or found.saved_at is None:
        return ""
    t = found.saved_at
    first, last = (significant(d) for d in found.saved_distances)
    here, there = significant(t * found.distance), significant((1 - t) * found.distance)
    text = (
        f"The saved network, at t = {t:g}, has the distances {first} and {last} to the ends; the "
        f"point of the geodesic has {here} and {there}."
    )
    pairs = zip(found.saved_distances, (t * found.distance, (1 - t) * found.distance), strict=True)
    if all(math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-3 * found.distance) for a, b in pairs):
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
    return [
        ("loss", path_loss_figure(found), answer[0].upper() + answer[1:]),
        ("accuracy", path_accuracy_figure(found), accuracy),
        ("distance", layer_distance_figure(found.layers), distance),
    ]


def merge_summary(found: MergedRuns) -> RenderableType:
    """Loss and accuracy of the networks and of what was made of them."""
    table = Table(
        title=Text(f"Merged: {len(found.runs)} networks → 1", style="bold"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    for name in ("network", "weight", "distance", "loss", "accuracy"):
        table.add_column(name, justify="left" if name == "network" else "right", no_wrap=True)
    n = found.samples
    rows = zip(found.names, found.weights, found.distances, found.parents, strict=True)
    for name, weight, distance, score in rows:
        cells = (significant(score.loss), percent(score.accuracy, n))
        table.add_row(name, f"{weight:.3g}", significant(distance), *cells)
    scores = [("merged", found.merged)]
    if found.averaged is not None:
        scores.append(("parameters averaged", found.averaged))
    for name, score in scores:
        table.add_row(name, "", "", significant(score.loss), percent(score.accuracy, n))
    note = (
        f"{several(n, 'test sample')}; {layers(found.depth)} of up to "
        f"{several(found.width, 'neuron')}."
    )
    for name, d, lower in zip(found.names, found.distances, found.lower or (), strict=False):
        if lower < d * (1 - PROVEN):
            note += f" Of the distance to {name} only this is proven: {_proven(d, lower)}."
    if found.narrowed is not None:
        note += f" Narrowed by {significant(found.narrowed)}, which is off the barycentre."
    return Group(table, *verdict_line(found.verdict), Text(note, style="dim"))


def path_loss_figure(found: Interpolation) -> go.Figure:
    """Test loss over t: the geodesic solid, the averages of parameters dashed."""
    figure = _over_t("Loss between the networks", "nats")
    return _add_paths(figure, found, lambda score: score.loss)


def path_accuracy_figure(found: Interpolation) -> go.Figure:
    """Test accuracy over t, likewise."""
    figure = _over_t("Accuracy between the networks", "percent")
    return _add_paths(figure, found, lambda score: 100 * score.accuracy, "%{y:.2f} %")


def _add_paths(
    figure: go.Figure,
    found: Interpolation,
    value: Callable[[Score], float],
    *hover: str,
) -> go.Figure:
    curves = [("geodesic", found.geodesic, NETWORK, "solid")]
    if found.naive is not None:
        curves.append(("parameters averaged", found.naive, REFERENCE, DASHED))
    for name, scores, color, dash in curves:
        figure.add_trace(line(found.ts, [value(s) for s in scores], name, color, dash, *hover))
    return figure


def layer_distance_figure(
    layers: tuple[ComparedLayer, ...], title: str = "Distance in depth"
) -> go.Figure:
    """W_2 over the depth s, constant in each cell; dashed with neurons matched by their numbers."""
    figure = _over_depth(title)
    figure.add_trace(_steps(layers, [layer.distance for layer in layers], "matched", NETWORK))
    by_number = [layer.by_number for layer in layers]
    if any(value is not None for value in by_number):
        trace = _steps(layers, by_number, "by their numbers", REFERENCE)
        figure.add_trace(trace.update(line={"dash": DASHED}))
    return figure


def comparison_figure(found: Comparison) -> go.Figure:
    """W_2 over the depth s, a curve for every two networks."""
    figure = _over_depth("Distance in depth")
    for k, pair in enumerate(found.pairs):
        names = [found.networks[n].name for n in (pair.first, pair.second)]
        values = [layer.distance for layer in pair.layers]
        color = CLASSES[k % len(CLASSES)]
        figure.add_trace(_steps(pair.layers, values, " – ".join(names), color))
    return figure


def distance_map_figure(found: Comparison) -> go.Figure:
    """The distance of every two networks."""
    names = [network.name for network in found.networks]
    every = range(len(names))
    z = [[found.distance(i, j) if i != j else None for j in every] for i in every]
    texts = [["" if d is None else significant(d) for d in row] for row in z]
    figure = plain_figure("Distances", "", "")
    figure.add_trace(
        go.Heatmap(
            z=z,
            x=names,
            y=names,
            text=texts,
            texttemplate="%{text}",
            zmin=0,
            zmax=max(pair.distance for pair in found.pairs) or 1,
            colorscale=[[0, SHADE], [1, NETWORK]],
            showscale=False,
            xgap=2,
            ygap=2,
            hoverongaps=False,
            hovertemplate="%{y} and %{x}: d = %{text}<extra></extra>",
        )
    )
    figure.update_xaxes(type="category")
    figure.update_yaxes(type="category", showgrid=False, autorange="reversed")
    return figure.update_layout(hovermode="closest", height=100 + 44 * len(names), margin={"t": 56})


def _over_t(title: str, y_title: str) -> go.Figure:
    figure = plain_figure(title, "t, from the first network to the second", y_title)
    return figure.update_xaxes(range=[-0.03, 1.03], unifiedhovertitle={"text": "t = %{x:.3g}"})


def _over_depth(title: str) -> go.Figure:
    figure = plain_figure(title, "depth s, from the input to the output", "W<sub>2</sub>")
    figure.update_yaxes(rangemode="tozero")
    return figure.update_xaxes(range=[-0.03, 1.03], unifiedhovertitle={"text": "s = %{x:.3g}"})


def _steps(
    layers: tuple[ComparedLayer, ...],
    values: list[float] | list[float | None],
    name: str,
    color: str,
) -> go.Scatter:
    """One value for each cell, held until the next."""
    x = [*(layer.start for layer in layers), layers[-1].end]
    trace = line(x, [*values, values[-1]], name, color, "solid", "%{y:.3g}")
    return trace.update(mode="lines", line={"shape": "hv"})
