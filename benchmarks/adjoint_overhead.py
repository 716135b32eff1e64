"""What the adjoint costs in Python: frames per block, forward and backward, and microseconds.

Frames are counted by sys.setprofile over one step of a chain of 20 blocks less one of 10, by ten:
every function of ours that is entered, generators each time that they are resumed, and beside them
those of torch. Microseconds are those per block and step that one evaluation (e = 1) takes beyond
torch's non-reentrant checkpoint around the same block, which runs it as often: least times of steps
that take turns, the median over processes. With --against, the sources of another checkout are
measured in turns with these.

    python benchmarks/adjoint_overhead.py --out benchmarks/results/adjoint_overhead.json
    python benchmarks/adjoint_overhead.py --against ../other/src
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import deeplimit
from deeplimit import use_adjoint

DEPTHS = 20, 10
DEEP = 64  # where time is taken
LIMITS = {"forward": 40, "backward": 28, "microseconds": 90}
OURS = str(Path(deeplimit.__file__).parent)


class Block(nn.Module):
    """So small that only what Python and the dispatcher do is left."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        """One residual step."""
        return x + 0.1 * self.second(self.first(x).tanh())


def switched(method: str, depth: int) -> nn.Module:
    """Blocks one after the other, with one of the ways to the gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(depth)))
    if method == "checkpoint":
        for block in model:
            block.forward = partial(
                checkpoint, block.forward, use_reentrant=False, early_stop=False
            )
    elif method != "plain":
        use_adjoint(model, evaluations=int(method[-1]), on_drift="ignore")
    x = torch.randn(2, 4)
    for _ in range(3):
        model(x).sum().backward()
    return model


def frames(run: Callable[[], Any]) -> tuple[Any, Counter[str]]:
    """What a function returns, and how many Python frames it entered, by whose they are."""
    found: Counter[str] = Counter()

    def count(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            file = frame.f_code.co_filename
            found[
                "ours" if file.startswith(OURS) else "torch" if "/torch/" in file else "rest"
            ] += 1

    sys.setprofile(count)
    try:
        return run(), found
    finally:
        sys.setprofile(None)


def hops(method: str) -> dict[str, dict[str, float]]:
    """Python frames per block, forward and backward."""
    x = torch.randn(2, 4)
    counts = []
    for depth in DEPTHS:
        loss, forward = frames(partial(lambda model: model(x).sum(), switched(method, depth)))
        counts.append((forward, frames(loss.backward)[1]))
    more = DEPTHS[0] - DEPTHS[1]
    return {
        way: {whose: round((deep[whose] - flat[whose]) / more, 1) for whose in ("ours", "torch")}
        for way, deep, flat in zip(("forward", "backward"), *counts, strict=True)
    }


def microseconds(rounds: int) -> dict[str, float]:
    """Per block and step beyond the checkpoint: the least CPU time of so many rounds."""
    x = torch.randn(2, 4)
    methods = ("plain", "checkpoint", "adjoint, e = 1", "adjoint, e = 2")
    models = {method: switched(method, DEEP) for method in methods}
    taken: dict[str, list[float]] = {method: [] for method in methods}
    for _ in range(rounds):
        for method, model in models.items():
            start = time.process_time()
            model(x).sum().backward()
            taken[method].append(time.process_time() - start)
    least = {method: 1e6 * min(times) / DEEP for method, times in taken.items()}
    return {
        "checkpoint, beyond plain": least["checkpoint"] - least["plain"],
        "adjoint, e = 1, beyond checkpoint": least["adjoint, e = 1"] - least["checkpoint"],
        "adjoint, e = 2, beyond checkpoint": least["adjoint, e = 2"] - least["checkpoint"],
    }


def measured(sources: Path, rounds: int) -> dict[str, Any]:
    """The figures of one process that imports deeplimit from there."""
    command = [sys.executable, __file__, "--once", "--rounds", str(rounds)]
    environment = os.environ | {"PYTHONPATH": str(sources)}
    return json.loads(subprocess.run(command, env=environment, check=True, stdout=-1).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--against", type=Path, help="the src folder of another checkout")
    parser.add_argument("--rounds", type=int, default=40, help="steps of each method in a process")
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.once:  # of whatever checkout
        ways = {
            method: hops(method) for method in ("checkpoint", "adjoint, e = 1", "adjoint, e = 2")
        }
        print(json.dumps({"frames": ways, "microseconds": microseconds(options.rounds)}))
        return
    from deeplimit.studies.harness import machine

    sources = {"": Path(OURS).parent} | ({"before": options.against} if options.against else {})
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in sources}
    for _ in range(options.processes):
        for name, folder in sources.items():
            runs[name].append(measured(folder, options.rounds))
    result: dict[str, Any] = {"machine": machine(), "limits": LIMITS, "load": os.getloadavg()}
    for name, found in runs.items():
        times = [run["microseconds"] for run in found]
        figures = {
            "frames": found[0]["frames"],
            "microseconds": {key: round(median(t[key] for t in times), 1) for key in times[0]},
        }
        result |= {name: figures} if name else figures
        print(name or "now", json.dumps(figures, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
