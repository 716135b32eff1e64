"""What the adjoint saves: the answer in a sentence, a table of all methods, a figure."""

import math
from collections.abc import Sequence
from itertools import takewhile
from textwrap import wrap

import plotly.graph_objects as go
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from deeplimit.errors import several
from deeplimit.report.numbers import SPACE, count, memory, seconds, significant, superscript
from deeplimit.report.style import GRID, NETWORK, REFERENCE, TEXT, TUBE, plain_figure
from deeplimit.studies.gradient_cost import GradientCost
from deeplimit.studies.gradient_methods import MethodCost

REASONS = 5  # candidates that are named when no block is rebuilt
PANELS = ("memory at the peak", "time of a step", "gradient error")
TITLE = 90  # characters in a line of the title


def gradient_summary(cost: GradientCost) -> RenderableType:
    """The answer, the table, what was measured, and a warning where nothing can be rebuilt."""
    parts: list[RenderableType] = [Text(gradient_answer(cost), style="bold")]
    if len(cost.methods) == 1:
        parts.append(Text(_reasons(cost), style="yellow"))
    parts.append(_table(cost))
    if sum(len(chain) > 2 for chain in cost.chains) > 1:
        parts.append(_drift_table(cost))
    parts += [
        Text(f"{method_name(m)}: {m.failed}", style="yellow") for m in cost.methods if m.failed
    ]
    return Group(*parts, Text(_note(cost), style="dim"))


def gradient_answer(cost: GradientCost) -> str:
    """What would be saved, at what error and price: one sentence."""
    best, plain = cost.best, cost.plain
    if len(cost.methods) == 1:
        return "Nothing to save: no block was found whose input can be rebuilt from its output."
    if cost.loss != cost.loss:  # NaN: there is no exact gradient
        return (
            f"Plain backpropagation: {plain.failed}. So there is no gradient to compare with; "
            "a smaller batch tells the errors."
        )
    if best is None:
        return (
            "Nothing to save: no method needs less memory than plain backpropagation at a gradient "
            f"error within {_percent(cost.tolerance)}."
        )
    name = method_name(best)
    text = f"{name[0].upper()}{name[1:]}: "
    if plain.memory and best.memory:
        text += f"{plain.memory / best.memory:.1f} times less memory than plain backpropagation"
    exact = best.method == "checkpointed"
    text += ", the gradient exact" if exact else f" at a gradient error of {_percent(best.error)}"
    if plain.seconds and best.seconds:
        text += f", for {best.seconds / plain.seconds:.2g} times the time"
    if exact:
        text += f". Within an error of {_percent(cost.tolerance)} no adjoint needs less"
    return text + "."


def method_name(method: MethodCost) -> str:
    """plain; checkpointed; adjoint with e = 2; adjoint with e = 2 and 3 anchors."""
    if method.evaluations is None:
        return method.method
    name = f"adjoint with e{SPACE}={SPACE}{method.evaluations}"
    if method.method != "planned":
        return name
    return f"{name} and {several(len(method.anchors), 'anchor')}"


def short_name(method: MethodCost) -> str:
    """plain; checkpointed; adjoint e=2; adjoint e=2, 3 anchors."""
    short = method_name(method).replace(" with ", " ").replace(" and ", ", ")
    return short.replace(f"{SPACE}={SPACE}", "=")


def _table(cost: GradientCost) -> Table:
    """Everything about each method, the best in bold."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("method", min_width=12)
    for name in ("memory", "less ×", "time", "more ×", "error", "drift", "kept"):
        table.add_column(name, justify="right", no_wrap=True)
    for method in cost.methods:
        if method.failed:
            table.add_row(short_name(method), "–")
            continue
        table.add_row(
            short_name(method),
            memory(method.memory or 0),
            _ratio(cost.plain.memory, method.memory),
            seconds(method.seconds or 0.0),
            _ratio(method.seconds, cost.plain.seconds),
            "–" if method.error is None else _percent(method.error),
            significant(max(method.drift), 2) if method.drift else "",
            str(method.kept),
            style="bold" if method is cost.best else "",
        )
    return table


def _drift_table(cost: GradientCost) -> Table:
    """One row for each chain that has states to rebuild, one column for each adjoint."""
    chains = {n: chain for n, chain in enumerate(cost.chains) if len(chain) > 2}
    paths = [block.split(".") for chain in chains.values() for block in chain]
    common = [
        parts[0]
        for parts in takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    ]
    prefix = ".".join([*common, ""]) if common else ""
    title = f"Drift of each chain{f' of {prefix[:-1]}' if prefix else ''}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("chain")
    table.add_column("blocks", justify="right")
    adjoints = [m for m in cost.methods if m.drift and (m.anchors or m.method == "adjoint")]
    for method in adjoints:
        table.add_column(short_name(method).removeprefix("adjoint "), justify="right")
    for n, chain in chains.items():
        drifts = (significant(method.drift[n], 2) for method in adjoints)
        name = f"{chain[0].removeprefix(prefix)} … {chain[-1].removeprefix(prefix)}"
        table.add_row(name, str(len(chain)), *drifts)
    return table


def _note(cost: GradientCost) -> str:
    chains = len(cost.chains)
    text = (
        f"{cost.model or 'The model'}: {count(cost.parameters)} parameters ({cost.dtype}, "
        f"{cost.weights or 'as given'}; {memory(cost.parameter_bytes)}, their gradients as much), "
        f"batch {cost.batch}, on {cost.device}. Memory: what forward and backward hold at their "
        f"peak beyond that. Time: of both, median of {cost.steps}. Error: ‖g{SPACE}−{SPACE}g*‖ / "
        "‖g*‖ over all parameters, on this batch, with g* from plain backpropagation."
    )
    if chains:
        text += (
            f" Kept: inputs of {several(sum(map(len, cost.chains)), 'block')} in "
            f"{several(chains, 'chain')}; plain backpropagation also keeps what is inside."
        )
    if len(cost.methods) > 1 and "untrained" in cost.weights:
        text += " Errors are those of untrained weights; measure trained ones too."
    return text


def _reasons(cost: GradientCost) -> str:
    told = [f"{left.block}: {left.why}" for left in cost.left_plain[:REASONS]]
    more = len(cost.left_plain) - len(told)
    return "\n".join([*told, *([f"and {more} more"] if more else [])])


def _ratio(large: int | float | None, small: int | float | None) -> str:
    return significant(large / small) if large and small else ""


def _percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{significant(100 * fraction, 2)}{SPACE}%"


def gradient_cost_figure(cost: GradientCost) -> go.Figure:
    """Bars for each method: memory, time, gradient error (logarithmic, with the tolerance)."""
    methods = [method for method in cost.methods if not method.failed]
    names = [short_name(method) for method in methods]
    colors = [NETWORK if method.evaluations else REFERENCE for method in methods]
    figure = plain_figure("<br>".join(wrap(gradient_answer(cost), TITLE)), "", "")
    titles = (*PANELS[:2], f"{PANELS[2]} (dotted: {100 * cost.tolerance:g} %)")
    figure.set_subplots(1, 3, shared_yaxes=True, horizontal_spacing=0.06, subplot_titles=titles)
    errors = [100 * method.error if method.error else None for method in methods]
    panels: Sequence[tuple[list[float | None], list[str]]] = (
        ([m.memory for m in methods], [memory(m.memory or 0) for m in methods]),
        ([m.seconds for m in methods], [seconds(m.seconds or 0.0) for m in methods]),
        (errors, [f"{significant(e, 2)} %" if e else "" for e in errors]),
    )
    for column, (values, texts) in enumerate(panels, start=1):
        bars = go.Bar(
            x=values,
            y=names,
            orientation="h",
            text=texts,
            textposition="auto",
            cliponaxis=False,
            marker={"color": colors},
            hovertemplate="%{y}: %{text}<extra></extra>",
        )
        figure.add_trace(bars, row=1, col=column)
    figure.update_xaxes(showgrid=True, gridcolor=GRID, zeroline=False, showticklabels=False)
    figure.update_yaxes(autorange="reversed", automargin=True, showgrid=False)
    figure.update_annotations(font={"size": 13, "color": TEXT})
    _errors_axis(figure, cost, [e for e in errors if e])
    figure.update_layout(
        showlegend=False, hovermode="closest", bargap=0.3, height=440, margin={"t": 110}
    )
    return figure


def _errors_axis(figure: go.Figure, cost: GradientCost, errors: list[float]) -> None:
    """Powers of ten, and the tolerance as a line; exact gradients have no bar."""
    if not errors:
        return
    shown = [*errors, 100 * cost.tolerance]
    low, high = math.floor(math.log10(min(shown))) - 0.5, math.ceil(math.log10(max(shown))) + 0.3
    powers = range(math.ceil(low), math.floor(high) + 1, max(1, round((high - low) / 5)))
    figure.update_xaxes(
        type="log",
        range=[low, high],
        tickvals=[10.0**power for power in powers],
        ticktext=[f"10{superscript(power)} %" for power in powers],
        showticklabels=True,
        row=1,
        col=3,
    )
    figure.add_vline(
        x=100 * cost.tolerance,
        line={"color": TUBE, "width": 1.5, "dash": "dot"},
        row=1,
        col=3,
    )
