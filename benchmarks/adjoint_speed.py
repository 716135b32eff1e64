"""What a training step costs with each way to the gradient, paired in one run.

The limit: nothing that stores no activations can avoid one more forward pass, 4/3 of plain
backpropagation where a backward pass costs two forwards. Each method has its own copy of the same
model; the methods take turns, and a ratio is the median of the ratios within a round.

    python benchmarks/adjoint_speed.py --out benchmarks/results/adjoint_speed.json
    python benchmarks/adjoint_speed.py --device cuda --precision bf16 --out …
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch
import transformers
from torch import nn

from deeplimit.studies.harness import machine
from gradient_methods import (
    GAMMA,
    METHODS,
    SIZES,
    Loss,
    TrainingStep,
    convolutional_chain,
    dinov2,
    tiny_chain,
    wait,
)

WARM_UP = 2
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
RATIOS = {  # name: (method, against, at most)
    "e = 1 / checkpoint": ("adjoint, e = 1", "checkpoint", 1.05),
    "e = 1 / checkpoint, early stop": ("adjoint, e = 1", "checkpoint, early stop", 1.20),
    "e = 1 / plain": ("adjoint, e = 1", "plain", 1.50),
    "e = 2 / e = 1": ("adjoint, e = 2", "adjoint, e = 1", 1.40),
    "e = 3 / plain": ("adjoint, e = 3", "plain", None),
    "checkpoint / plain": ("checkpoint", "plain", None),
    "momentumnet / plain": ("momentumnet", "plain", None),
}
OVERHEAD = 150  # µs per block and step, at most


def seconds(
    steps: Mapping[str, Callable[[], object]], rounds: int, device: str, clock: str
) -> dict[str, list[float]]:
    """The times of each step, taken in turns so that all see the same machine."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    now = CLOCKS[clock]
    for round_ in range(rounds + WARM_UP):
        for name, step in steps.items():
            wait(device)
            start = now()
            step()
            wait(device)
            if round_ >= WARM_UP:
                taken[name].append(now() - start)
    return taken


def ratio(taken: dict[str, list[float]], method: str, against: str) -> float:
    """The median of the ratios within a round."""
    return median(a / b for a, b in zip(taken[method], taken[against], strict=True))


def compare(
    name: str, model: nn.Module, loss: Loss, options: argparse.Namespace
) -> dict[str, object]:
    """All methods on one model."""
    steps = {method: TrainingStep(method, model, loss, options.precision) for method in METHODS}
    taken = seconds(steps, options.rounds, options.device, options.clock)
    ratios = {
        key: {"ratio": ratio(taken, method, against), "at_most": limit}
        for key, (method, against, limit) in RATIOS.items()
    }
    for key, entry in ratios.items():
        limit = f" (at most {entry['at_most']:.2f})" if entry["at_most"] else ""
        print(f"{name}: {key}: {entry['ratio']:.3f}{limit}", flush=True)
    return {"model": name, "seconds": {k: median(v) for k, v in taken.items()}, "ratios": ratios}


def overhead(depth: int, options: argparse.Namespace) -> dict[str, float]:
    """Microseconds per block and step that e = 1 takes beyond plain backpropagation.

    Blocks of two 4 × 4 products: what is left is Python and the dispatcher, the block's own replay
    included. Beside it the same for torch's checkpoint, and a forward pass by itself.
    """
    model, loss = tiny_chain(options.device, depth)
    names = ("plain", "checkpoint", "adjoint, e = 1", "adjoint, e = 2")
    steps: dict[str, Callable[[], object]] = {
        name: TrainingStep(name, model, loss) for name in names
    }
    steps["forward"] = lambda: loss(model)
    taken = seconds(steps, 10 * options.rounds, options.device, options.clock)

    def beyond(name: str, base: str) -> float:
        differences = (a - b for a, b in zip(taken[name], taken[base], strict=True))
        return 1e6 * median(differences) / depth

    found = {f"{name}, beyond plain": beyond(name, "plain") for name in names[1:]}
    found["adjoint, e = 1, beyond checkpoint"] = beyond("adjoint, e = 1", "checkpoint")
    found["a forward pass"] = 1e6 * median(taken["forward"]) / depth
    print(f"µs per block (e = 1: at most {OVERHEAD}):", _rounded(found))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rounds", type=int, default=9, help="at least 5")
    parser.add_argument("--threads", type=int, default=None, help="on CPU; all cores by default")
    parser.add_argument(
        "--clock", choices=list(CLOCKS), default="wall", help="cpu: of this process, on a busy CPU"
    )
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device, options.rounds = options.device, max(options.rounds, 5)
    before = os.getloadavg()
    results = [
        compare(name, model, loss, options)
        for name, (model, loss) in {
            "64 convolutional blocks": convolutional_chain(device, 64, "none"),
            "64 convolutional blocks, GroupNorm": convolutional_chain(device, 64, "group"),
            "64 wider convolutional blocks": convolutional_chain(device, 64, "none", "wide"),
            "DINOv2, 24 blocks": dinov2(device, 24),
        }.items()
    ]
    versions = {"transformers": transformers.__version__, "momentumnet": version("momentumnet")}
    result = {
        "machine": machine() | versions,
        "load": {"before": before, "after": os.getloadavg()},
        "device": device, "precision": options.precision, "rounds": options.rounds,
        "clock": options.clock, "sizes": SIZES[device],
        "momentumnet": f"computes another function (momentum {GAMMA}) with the same blocks",
        "results": results,
        "overhead_us_per_block": {"at_most": OVERHEAD} | overhead(64, options),
    }  # fmt: skip
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


def _rounded(figures: dict[str, float]) -> dict[str, float]:
    return {name: round(figure, 1) for name, figure in figures.items()}


if __name__ == "__main__":
    main()
