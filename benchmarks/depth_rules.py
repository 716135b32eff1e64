"""How often a rule chooses a depth that is truly worse than the tolerance, and how much it cuts.

    PYTHONPATH=tests/helpers python benchmarks/depth_rules.py -o benchmarks/results/depth_rules.json

Networks of 16 layers whose true accuracy without any of them is known, of one stage and of three
(tests/helpers/simulated_depths.py says how they are made): in one a single layer loses 1.05 times
the tolerance, in one each loses 0.15 of it, in one each also changes many answers.
Of each, validation samples are drawn again and again, and the package's own functions choose: the
rule as it is by default and the one with a confidence of 95 %, both also without their condition on
the loss. A rule is given the tolerance; it is not told what is true. Cells that the output has are
not made again.
"""

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

from simulated_depths import LAYERS, Draw, networks, removed

from deeplimit.studies.harness import machine

CASES = ((40, 0.005), (40, 0.1), (359, 0.005), (359, 0.02), (5000, 0.005))
RULES = {
    "default, accuracy alone": (None, False),
    "default": (None, True),
    "confidence 0.95, accuracy alone": (0.95, False),
    "confidence 0.95": (0.95, True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--draws", type=int, default=400)
    asked = parser.parse_args()
    rows: list[dict[str, Any]] = []
    if asked.out.exists():
        rows = json.loads(asked.out.read_text())["rows"]
    done = {(r["stages"], r["samples"], r["tolerance"], r["network"], r["rule"]) for r in rows}
    for stages in (1, 3):
        for samples, tolerance in CASES:
            for name, network in networks(tolerance, stages).items():
                for rule, (confidence, loss) in RULES.items():
                    if (stages, samples, tolerance, name, rule) in done:
                        continue
                    cuts = [
                        removed(Draw(network, samples, seed), tolerance, confidence, loss=loss)
                        for seed in range(asked.draws)
                    ]
                    rows.append(
                        {
                            "stages": stages,
                            "samples": samples,
                            "tolerance": tolerance,
                            "network": name,
                            "rule": rule,
                            "draws": asked.draws,
                            "worse": mean(network.lost(cut) > tolerance for cut in cuts),
                            "layers_kept": LAYERS - mean(map(len, cuts)),
                        }
                    )
                    result = {"machine": machine(), "layers": LAYERS, "rows": rows}
                    asked.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
                    print(*rows[-1].values(), sep="\t", flush=True)


if __name__ == "__main__":
    main()
