"""How long the command takes to answer with help or a refusal, and the package to be imported.

Each in a process of its own, the least of several times; torch's own import stands beside the first
public name. On a busy machine processor time says more than time.

    python benchmarks/start_time.py [-o benchmarks/results/start_time.json]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from deeplimit.studies.harness import machine

COMMANDS = (
    "--help",
    "train --help",
    "crop no/such/folder",
    "train no-such-data",
    "profile transformers:nowhere",
    "gradient transformers:nowhere",
    "crop RUN --bad",
)
SCRIPTS = {
    "nothing": "",
    "import deeplimit": "import deeplimit",
    "import torch": "import torch",
    "import deeplimit, StageCost": "import deeplimit; deeplimit.StageCost",
    "import deeplimit, use_adjoint": "import deeplimit; deeplimit.use_adjoint",
}


def measured(args: list[str], times: int) -> dict[str, float]:
    """The least wall and processor time of a process, in seconds."""
    found = []
    with tempfile.TemporaryDirectory() as here:
        for _ in range(times):
            before, start = os.times(), time.perf_counter()
            subprocess.run([sys.executable, *args], cwd=here, capture_output=True, check=False)
            wall, after = time.perf_counter() - start, os.times()
            used = sum(after[2:4]) - sum(before[2:4])
            found.append((wall, used))
    return {
        "seconds": round(min(wall for wall, _ in found), 3),
        "processor_seconds": round(min(used for _, used in found), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-n", type=int, default=5, help="times each")
    parser.add_argument("-o", type=Path, help="write the figures here")
    args = parser.parse_args()
    found = {
        f"deeplimit {words}": measured(["-m", "deeplimit", *words.split()], args.n)
        for words in COMMANDS
    }
    found |= {name: measured(["-c", script], args.n) for name, script in SCRIPTS.items()}
    for name, times in found.items():
        print(
            f"{name:40} {times['seconds']:7.3f} s {times['processor_seconds']:7.3f} s of processor"
        )
    if args.o is not None:
        text = json.dumps({"machine": machine(), "n": args.n, "times": found}, indent=1)
        args.o.write_text(text + "\n")


if __name__ == "__main__":
    main()
