r"""Time and memory of a training step against depth, for each way to the gradient.

Times are taken in turns within one process. Peak memory, by the allocator's own accounting, has a
process of its own for each figure; parameters and their gradients, there before the step, are not
in it, nor is what a first step allocates for good.

    python benchmarks/adjoint_depth.py --out benchmarks/results/adjoint_depth.json \
        --figure benchmarks/results/adjoint_depth.svg
    python benchmarks/adjoint_depth.py --device cuda --precision bf16 --depths 8 32 128 512 --out …
"""

import argparse
import json
import os
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots

from adjoint_speed import CLOCKS, seconds
from deeplimit.gradient.accuracy import peak_memory
from deeplimit.studies.harness import machine
from drawing import write
from gradient_methods import GAMMA, METHODS, SIZES, TrainingStep, convolutional_chain

MEBIBYTE = 2**20


def memory_of(method: str, depth: int, options: argparse.Namespace) -> int:
    """Peak bytes of the second step of one method, in a process that does only this."""
    torch.set_num_threads(1)
    model, loss = convolutional_chain(options.device, depth)
    step = TrainingStep(method, model, loss, options.precision)
    step()
    return peak_memory(step, step.model, torch.device(options.device))


def memory(depths: list[int], options: argparse.Namespace) -> dict[str, list[float]]:
    """MiB of each method at each depth."""
    server = get_context("forkserver")  # imports once, and starts each process from there
    server.set_forkserver_preload(["deeplimit.gradient", "deeplimit.studies", "transformers"])
    found: dict[str, list[float]] = {method: [] for method in METHODS}
    with ProcessPoolExecutor(1, mp_context=server, max_tasks_per_child=1) as pool:
        for depth in depths:
            for method, column in found.items():
                column.append(pool.submit(memory_of, method, depth, options).result() / MEBIBYTE)
    return found


def times(depths: list[int], options: argparse.Namespace) -> dict[str, list[float]]:
    """Median seconds of a step of each method at each depth."""
    found: dict[str, list[float]] = {method: [] for method in METHODS}
    for depth in depths:
        model, loss = convolutional_chain(options.device, depth)
        steps = {method: TrainingStep(method, model, loss, options.precision) for method in METHODS}
        taken = seconds(steps, options.rounds, options.device, options.clock)
        for method, column in found.items():
            column.append(median(taken[method]))
    return found


def figure(result: dict) -> go.Figure:
    """Memory and time against depth, logarithmic, one line for each method."""
    titles = ("Peak memory of a step, MiB", "Time of a step, s")
    drawn = make_subplots(1, 2, subplot_titles=titles, horizontal_spacing=0.1)
    colours = ("#555", "#0072B2", "#56B4E9", "#D55E00", "#E69F00", "#CC79A7", "#009E73")
    for column, key in ((1, "mebibytes"), (2, "seconds")):
        for colour, (method, values) in zip(colours, result[key].items(), strict=True):
            line = {"color": colour, "dash": "dot" if method == "momentumnet" else "solid"}
            drawn.add_scatter(
                x=result["depths"], y=values, name=method, line=line, row=1, col=column,
                legendgroup=method, showlegend=column == 1, mode="lines+markers",
            )  # fmt: skip
    drawn.update_xaxes(type="log", title="blocks", tickvals=result["depths"])
    drawn.update_yaxes(type="log", dtick=1)
    return drawn.update_layout(
        template="plotly_white", width=1000, height=420, margin={"t": 40, "b": 50}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--figure", type=Path, help="html, svg or png")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--depths", type=int, nargs="+", default=[8, 32, 128, 512])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    options = parser.parse_args()
    before = os.getloadavg()
    result = {
        "machine": machine() | {"momentumnet": version("momentumnet")},
        "model": "convolutional chain with GroupNorm",
        "state": SIZES[options.device]["chain"],
        "momentumnet": f"computes another function (momentum {GAMMA}) with the same blocks",
        "device": options.device, "precision": options.precision, "clock": options.clock,
        "rounds": options.rounds, "depths": options.depths,
        "mebibytes": memory(options.depths, options), "seconds": times(options.depths, options),
        "load": {"before": before, "after": os.getloadavg()},
    }  # fmt: skip
    for key in ("mebibytes", "seconds"):
        for method, column in result[key].items():
            print(f"{key}, {method}:", [round(value, 3) for value in column])
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")
    if options.figure:
        write(figure(result), options.figure)


if __name__ == "__main__":
    main()
