"""What consistency.py and convergence.py share: options, the figures, and what is kept of them."""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import torch
from rich.console import Console

from deeplimit.records import to_plain
from drawing import write
from machine import machine
from rates import RESULTS, line


def keep_study(
    name: str,
    study: Callable[..., Any],
    figures: Callable[[Any], Sequence[tuple[str, go.Figure, str]]],
    table: Callable[[Any], Any],
    kept: Callable[[Any], Any] = to_plain,
) -> None:
    """Runs a study; writes OUT.json, with the machine, and OUT.svg, OUT-NAME.svg of its figures.

    `kept` says what of the study is in OUT.json; all of it is in the study's own folder.
    """
    parser = argparse.ArgumentParser(description=f"The study of {name}.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tiny", action="store_true", help="a minute's worth, to try the script")
    parser.add_argument("--out", type=Path, default=RESULTS / f"{name}.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sizes = TINY[name] if options.tiny else {}
    runs = Path("runs/benchmarks")
    found = study(seeds=tuple(options.seeds), runs=runs, tell=line(), **sizes)
    result = {"machine": machine()} | kept(found) | {"folder": ""}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    Console().print(table(found))
    for k, (title, figure, _) in enumerate(figures(found)[:DRAWN]):
        place = options.out if k == 0 else options.out.with_stem(f"{options.out.stem}-{title}")
        write(figure.update_layout(width=1000), place.with_suffix(".svg"))


DRAWN = 3  # figures; those of single certificates are in the study's page
TINY: dict[str, dict[str, Any]] = {
    "consistency": {"depths": (2, 4, 8), "widths": (16, 32, 64), "draws": 2, "time": 0.3},
    "convergence": {"widths": (4, 64), "distances": (0.03, 3.0), "time": 3.0},
}
