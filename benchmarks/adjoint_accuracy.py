"""How the gradient's error follows from the drift: the safety factor, on every network tried.

For each network (networks_tried.py) and e = 1 … 4 the relative error of the parameter gradients
against plain backpropagation, the drift that the backward pass itself measured, and the bound that
a warning goes by: SAFETY · drift, or KINKED · √drift where there are kinks. A case is silent if its
error is above the tolerance although the bound is not: there must be none.

    python benchmarks/adjoint_accuracy.py --out benchmarks/results/adjoint_accuracy.json
"""

import argparse
import itertools
import json
import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import transformers
from torch import nn

from deeplimit import ResidualChain, drift, use_adjoint, use_backprop
from deeplimit.gradient.meter import KINKED, SAFETY
from deeplimit.gradient.stand_ins import engines
from deeplimit.studies.harness import machine
from networks_tried import FAMILIES, Loss

TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4)
TOLERANCE = 1e-2  # use_adjoint's own
NOISE = 1e-11  # below it both figures are rounding, and their ratio says nothing
WITH_RELU = {name for name in FAMILIES if "relu" in name.lower()} | {"ResNet"}
DEEP = 64  # from here on one seed, to save time


@dataclass(frozen=True)
class Case:
    """One gradient."""

    family: str
    depth: int
    scale: float
    seed: int
    evaluations: int
    anchor_every: int | None
    error: float
    drift: float
    bound: float

    @property
    def ratio(self) -> float:
        """error/drift."""
        return self.error / self.drift if self.drift > 0 else math.inf

    def silent(self, tolerance: float) -> bool:
        """Wrong beyond the tolerance without a warning; an error that is no number counts too."""
        return not self.error <= tolerance and self.bound <= tolerance

    def telling(self) -> bool:
        """Neither rounding nor a gradient that has nothing to do with the true one any more."""
        return NOISE < self.error < 1


def gradient(model: nn.Module, loss: Loss, seed: int) -> torch.Tensor:
    """All parameter gradients, one after another, with dropout as the seed has it."""
    torch.manual_seed(seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss(model), parameters, allow_unused=True)
    return torch.cat([g.flatten() for g in found if g is not None])


def cases_of(family: str, depth: int, scale: float, seed: int) -> list[Case]:
    """One network, for each e, without anchors and with one at every eighth state."""
    model, loss = FAMILIES[family][0](depth, scale, seed)
    exact = gradient(use_backprop(model), loss, seed)
    found = []
    for evaluations in (1, 2, 3, 4):
        for every in (None, 8) if seed == 0 and depth > 8 else (None,):
            settings = {"evaluations": evaluations, "anchor_every": every, "on_drift": "ignore"}
            use_adjoint(model, **settings)
            if not isinstance(model, ResidualChain):
                loss(model)  # here blocks are found; some are rebuilt from the next pass on
            gap = gradient(model, loss, seed) - exact
            error = float(gap.norm() / exact.norm())
            off = drift(model)
            bound = max(engine.meter.error_bound(off) for engine in engines(model))
            found.append(Case(family, depth, scale, seed, evaluations, every, error, off, bound))
    return found


def summary(cases: Sequence[Case]) -> dict[str, object]:
    """Of one family, or of all."""
    telling = [case for case in cases if case.telling()]
    worst = max(telling, key=lambda case: case.ratio)
    return {
        "cases": len(cases),
        "error_over_drift": {
            "median": median(case.ratio for case in telling),
            "largest": worst.ratio,
            "at": {key: value for key, value in vars(worst).items() if key != "family"},
        },
        "largest_error_over_root_of_drift": max(c.error / math.sqrt(c.drift) for c in telling),
        "wrong": {f"{t:g}": sum(not c.error <= t for c in cases) for t in TOLERANCES},
        "silent": {f"{t:g}": sum(c.silent(t) for c in cases) for t in TOLERANCES},
        "warned_needlessly": sum(c.error <= TOLERANCE < c.bound for c in cases),
        "largest_error_over_bound": max(case.error / case.bound for case in telling),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--seeds-relu", type=int, default=8, help="more, since single units decide there"
    )
    parser.add_argument("--family", action="append", choices=list(FAMILIES))
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message=".*loss_type.*")
    cases: list[Case] = []
    for family in options.family or FAMILIES:
        start = time.perf_counter()
        seeds = options.seeds_relu if family in WITH_RELU else options.seeds
        mine = [
            case
            for depth, scale in itertools.product(options.depths, FAMILIES[family][1])
            for seed in range(1 if depth >= DEEP else seeds)
            for case in cases_of(family, depth, scale, seed)
        ]
        cases += mine
        of = summary(mine)
        ratio = of["error_over_drift"]
        print(
            f"{family}: {len(mine)} cases, error/drift {ratio['median']:.2g}, "
            f"at most {ratio['largest']:.2g}; silent {of['silent']['0.01']}; "
            f"error/bound at most {of['largest_error_over_bound']:.2g}; "
            f"{time.perf_counter() - start:.0f} s",
            flush=True,
        )
    families = {f: summary([c for c in cases if c.family == f]) for f in options.family or FAMILIES}
    result = {
        "machine": machine() | {"transformers": transformers.__version__},
        "safety": SAFETY, "kinked": KINKED, "tolerance": TOLERANCE, "depths": options.depths,
        "seeds": options.seeds, "seeds with ReLU": options.seeds_relu, "all": summary(cases),
        "without ReLU": summary([c for c in cases if c.family not in WITH_RELU] or cases),
        "with ReLU": summary([c for c in cases if c.family in WITH_RELU] or cases),
        "families": families,
    }  # fmt: skip
    for group in ("without ReLU", "with ReLU"):
        print(f"{group}:", json.dumps(result[group]))
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
