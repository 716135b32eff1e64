"""Layers outside the tube at N, 2N and 4N, three seeds: python benchmarks/horizon.py.

The same as `deeplimit study horizon`, with the machine beside the figures.
"""

import json
from dataclasses import asdict, replace
from pathlib import Path

from deeplimit.studies import horizon_recipe, study_horizon
from machine import machine

RESULT = Path(__file__).parent / "results" / "horizon.json"


def main() -> None:
    recipe = replace(horizon_recipe("digits"), depth=(10,))
    study = study_horizon(recipe, seeds=(0, 1, 2), runs=Path("runs/benchmarks"), quiet=True)
    for depth in study.depths:
        print(f"N = {depth.horizon}: {depth.outside} layers outside, mean {depth.mean_outside:.2f}")
    result = {"machine": machine(), "growth": study.growth} | asdict(study) | {"folder": None}
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
