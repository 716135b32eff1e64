"""What the adjoint saves: the answer in a sentence, a table of all methods, a figure."""

import math
from os.path import commonpath
from textwrap import wrap

import plotly.graph_objects as go
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from deeplimit.errors import several
from deeplimit.report.console import answered, table
from deeplimit.report.numbers import SPACE, count, memory, seconds, significant, superscript
from deeplimit.report.style import GRID, NETWORK, REFERENCE, TEXT, TUBE, plain_figure
from deeplimit.studies.gradient_cost import GradientCost, MethodCost

PLAIN = ("plain", "checkpointed")
REASONS = 5  # candidates that are named when no block is rebuilt
COLUMNS = ("method", "memory", "less ×", "time", "more ×", "error", "drift", "kept")
TITLE = 90  # characters in a line of the title


def gradient_summary(cost: GradientCost) -> RenderableType:
    """The answer, the table, what was measured, and a warning where nothing can be rebuilt."""
    reasons = []
    if len(cost.methods) == 1:
        more = len(cost.left_plain) - REASONS
        reasons = [f"{left.block}: {left.why}" for left in cost.left_plain[:REASONS]]
        reasons += [f"and {more} more"] if more > 0 else []
    drift = [_drift_table(cost)] if sum(len(chain) > 2 for chain in cost.chains) > 1 else []
    failed = [f"{method_name(m)}: {m.failed}" for m in cost.methods if m.failed]
    return answered(
        gradient_answer(cost),
        *(Text(reason, style="yellow") for reason in reasons),
        _table(cost),
        *drift,
        *(Text(failure, style="yellow") for failure in failed),
        note=_note(cost),
    )


def gradient_answer(cost: GradientCost) -> str:
    """Says in a sentence what would be saved, at what error and price."""
    best, plain = cost.best, cost.plain
    if len(cost.methods) == 1:
        return "Nothing to save: no blocks were found that keep the shape of a state."
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
        text += f". Within an error of {_percent(cost.tolerance)} nothing needs less"
    return text + "."


def method_name(method: MethodCost) -> str:
    """plain; checkpointed; adjoint with e = 2; coded in 4 bits; auto: 3 kept; 4 coded in 2 bits.

    A plan of a version before had anchors alone.
    """
    if method.method == "planned" and method.plan is not None:
        return f"auto: {method.plan}"
    if method.bits:
        return f"coded in {method.bits} bits"
    if method.evaluations is None:
        return method.method
    name = f"adjoint with e{SPACE}={SPACE}{method.evaluations}"
    if method.method != "planned":
        return name
    return f"{name} and {several(len(method.anchors), 'anchor')}"


def _short(method: MethodCost) -> str:
    """plain; checkpointed; adjoint e=2; coded 4 bits; auto."""
    if method.method == "planned" and method.plan is not None:
        return "auto"
    short = method_name(method).replace(" with ", " ").replace(" in ", " ").replace(" and ", ", ")
    return short.replace(f"{SPACE}={SPACE}", "=")


def _table(cost: GradientCost) -> Table:
    """Everything about each method, the best in bold."""
    rows = [
        (_short(m), "–", *[""] * 6)
        if m.failed
        else (
            _short(m),
            memory(m.memory or 0),
            _ratio(cost.plain.memory, m.memory),
            seconds(m.seconds or 0.0),
            _ratio(m.seconds, cost.plain.seconds),
            "–" if m.error is None else _percent(m.error),
            significant(max(m.drift), 2) if m.drift else "",
            str(m.kept),
        )
        for m in cost.methods
    ]
    made = table(COLUMNS, rows, left=COLUMNS[:1])
    for row, method in zip(made.rows, cost.methods, strict=True):
        row.style = "bold" if method is cost.best else None
    return made


def _drift_table(cost: GradientCost) -> Table:
    """One row for each chain that has states to rebuild, one column for each adjoint."""
    chains = {n: chain for n, chain in enumerate(cost.chains) if len(chain) > 2}
    paths = [block.replace(".", "/") for chain in chains.values() for block in chain]
    common = commonpath(paths).replace("/", ".")
    prefix = f"{common}." if common else ""
    adjoints = [m for m in cost.methods if m.drift]
    rows = (
        (
            f"{chain[0].removeprefix(prefix)} … {chain[-1].removeprefix(prefix)}",
            str(len(chain)),
            *(significant(method.drift[n], 2) for method in adjoints),
        )
        for n, chain in chains.items()
    )
    names = (_short(method).removeprefix("adjoint ") for method in adjoints)
    title = f"Drift of each chain{f' of {common}' if common else ''}"
    return table(("chain", "blocks", *names), rows, title, left=("chain",))


def _note(cost: GradientCost) -> str:
    chains = len(cost.chains)
    text = (
        f"{cost.model or 'The model'}: {count(cost.parameters)} parameters ({cost.dtype}, "
        f"{cost.weights or 'as given'}; {memory(cost.parameter_bytes)}, their gradients as much), "
        f"batch {cost.batch}, on {cost.device}. Memory: what forward and backward hold at their "
        f"peak beyond that. Time: of both, median of {cost.steps}. Error: ‖g{SPACE}−{SPACE}g*‖ / "
        "‖g*‖ over all parameters, on this batch, with g* from plain backpropagation."
    )
    plans = [method.plan for method in cost.methods if method.plan]
    if plans:
        text += f" Auto, planned for an error of {_percent(cost.tolerance)}: {plans[0]}."
    if chains:
        text += (
            f" Kept: inputs of {several(sum(map(len, cost.chains)), 'block')} in "
            f"{several(chains, 'chain')}; plain backpropagation also keeps what is inside."
        )
    if len(cost.methods) > 1 and "untrained" in cost.weights:
        text += " Errors are those of untrained weights; measure trained ones too."
    return text


def _ratio(large: int | float | None, small: int | float | None) -> str:
    return significant(large / small) if large and small else ""


def _percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{significant(100 * fraction, 2)}{SPACE}%"


def gradient_cost_figure(cost: GradientCost) -> go.Figure:
    """Bars for each method: memory, time, gradient error (logarithmic, with the tolerance)."""
    methods = [method for method in cost.methods if not method.failed]
    errors = [100 * method.error if method.error else None for method in methods]
    panels: dict[str, list[tuple[float | None, str]]] = {
        "memory at the peak": [(m.memory, memory(m.memory or 0)) for m in methods],
        "time of a step": [(m.seconds, seconds(m.seconds or 0.0)) for m in methods],
        f"gradient error (dotted: {100 * cost.tolerance:g} %)": [
            (error, f"{significant(error, 2)} %" if error else "") for error in errors
        ],
    }
    figure = plain_figure("<br>".join(wrap(gradient_answer(cost), TITLE)), "", "").set_subplots(
        1, 3, shared_yaxes=True, horizontal_spacing=0.06, subplot_titles=list(panels)
    )
    for column, bars in enumerate(panels.values(), start=1):
        figure.add_bar(
            x=[value for value, _ in bars],
            y=[_short(method) for method in methods],
            orientation="h",
            text=[text for _, text in bars],
            textposition="auto",
            cliponaxis=False,
            marker={
                "color": [REFERENCE if method.method in PLAIN else NETWORK for method in methods]
            },
            hovertemplate="%{y}: %{text}<extra></extra>",
            row=1,
            col=column,
        )
    figure.update_xaxes(showgrid=True, gridcolor=GRID, zeroline=False, showticklabels=False)
    figure.update_yaxes(autorange="reversed", automargin=True, showgrid=False)
    figure.update_annotations(font={"size": 13, "color": TEXT})
    _errors_axis(figure, cost, [e for e in errors if e])
    return figure.update_layout(
        showlegend=False, hovermode="closest", bargap=0.3, height=440, margin={"t": 110}
    )


def _errors_axis(figure: go.Figure, cost: GradientCost, errors: list[float]) -> None:
    """Powers of ten, and the tolerance as a line; exact gradients have no bar."""
    if not errors:
        return
    shown = [*errors, 100 * cost.tolerance]
    low, high = math.floor(math.log10(min(shown))) - 0.5, math.ceil(math.log10(max(shown))) + 0.3
    powers = range(math.ceil(low), math.floor(high) + 1, max(1, round((high - low) / 5)))
    axis = {"type": "log", "range": [low, high], "showticklabels": True}
    axis["tickvals"] = [10.0**power for power in powers]
    axis["ticktext"] = [f"10{superscript(power)} %" for power in powers]
    figure.update_xaxes(axis, row=1, col=3)
    dotted = {"color": TUBE, "width": 1.5, "dash": "dot"}
    figure.add_vline(x=100 * cost.tolerance, line=dotted, row=1, col=3)
