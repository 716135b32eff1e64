r"""Gradient error of the adjoint against depth, smooth and independent controls, in one plot.

The figures are those of adjoint_orders.py; here they are drawn, and their slopes held against the
orders: with h = 1/N the relative error of all parameter gradients is O(N^−e) for Euler whatever the
controls, O(N^−(e+3)) for Heun with smooth controls and O(N^−(e+1)) with independent ones.

    python benchmarks/adjoint_smoothness.py --orders benchmarks/results/adjoint_orders.json \
        --figure benchmarks/results/adjoint_smoothness.svg
"""

import argparse
import json
from math import log10
from pathlib import Path

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from drawing import write

RESULTS = Path(__file__).parent / "results"
METHODS = (("Euler", 1, "#2f80c8"), ("Euler", 2, "#d5722a"), ("Heun", 1, "#1f9d84"))
DASHES = {"tanh": "solid", "gelu": "dash", "relu": "dot"}
CONTROLS = ("smooth", "independent")
TOLERANCE = 0.15  # of a slope over N = 16 … 128


def order(scheme: str, evaluations: int, controls: str) -> int:
    """Minus the slope, for φ twice differentiable in x."""
    if scheme == "Euler":
        return evaluations
    return evaluations + (3 if controls == "smooth" else 1)


def drawn(orders: dict) -> go.Figure:
    """Smooth controls on the left, independent ones on the right."""
    titles = [f"{controls} controls" for controls in CONTROLS]
    figure = make_subplots(
        1, 2, subplot_titles=titles, shared_yaxes=True, horizontal_spacing=0.03,
        x_title="layers N, h = 1/N", y_title="relative error of the gradient",
    )  # fmt: skip
    for scheme, evaluations, color in METHODS:
        for column, controls in enumerate(CONTROLS, start=1):
            for row in chosen(orders, scheme, evaluations, controls):
                activation = row["activation"]
                figure.add_scatter(
                    x=orders["depths"], y=row["errors"], row=1, col=column, mode="lines+markers",
                    line={"color": color, "dash": DASHES[activation]}, marker={"size": 5},
                    name=f"{scheme}, e = {evaluations}, {activation}", showlegend=column == 1,
                )  # fmt: skip
                if activation == "tanh":
                    expected = order(scheme, evaluations, controls)
                    slope = f"order −{expected}, tanh −{-row['slope']:.2f}"
                    below = scheme == "Heun"
                    figure.add_annotation(
                        x=log10(orders["depths"][2]), y=log10(row["errors"][2]), text=slope,
                        row=1, col=column, showarrow=False, font={"color": color, "size": 13},
                        yshift=-14 if below else 14, xanchor="right" if below else "left",
                    )  # fmt: skip
    figure.update_xaxes(type="log", tickvals=orders["depths"])
    figure.update_yaxes(type="log", dtick=1, exponentformat="power")
    return figure.update_layout(
        template="plotly_white", width=1000, height=520, margin={"t": 40, "b": 60}
    )


def chosen(orders: dict, scheme: str, evaluations: int, controls: str) -> list[dict]:
    asked = {"scheme": scheme, "evaluations": evaluations, "controls": controls}
    return [row for row in orders["rows"] if asked.items() <= row.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--orders", type=Path, default=RESULTS / "adjoint_orders.json")
    parser.add_argument("--figure", type=Path, default=RESULTS / "adjoint_smoothness.svg")
    options = parser.parse_args()
    orders = json.loads(options.orders.read_text())
    for scheme, evaluations, _ in METHODS:
        for controls in CONTROLS:
            for row in chosen(orders, scheme, evaluations, controls):
                expected = -order(scheme, evaluations, controls)
                smooth = row["activation"] != "relu"
                right = abs(row["slope"] - expected) <= TOLERANCE
                print(
                    f"{scheme}, e = {evaluations}, {controls}, {row['activation']}: "
                    f"{row['slope']:+.2f}, "
                    + (f"order {expected}: {'yes' if right else 'no'}" if smooth else "ReLU")
                )
    write(drawn(orders), options.figure)


if __name__ == "__main__":
    main()
