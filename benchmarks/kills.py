"""Kills verbs at random moments; whether the command, repeated, gives what an unbroken one does.

    python benchmarks/kills.py [--out FILE] [--only VERB]

Every third kill is a SIGTERM, the others are SIGKILL. Its moment is drawn from the first 85 % of
the shortest time that the command took; one that came to its end before is drawn again and not
counted. In between `deeplimit report` must find a run that is whole. Weights are compared by bytes,
results by value, all but times. Kills of the same commit that the file holds already are not
repeated.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

from deeplimit.cli import main as deeplimit_main
from deeplimit.files import write_text
from deeplimit.studies.harness import machine

KILLS = {"train": 60, "crop": 50, "heal": 40, "refine": 40, "two": 10}
SMALL = ["--depth", "4", "--hidden", "8", "--epochs", "4", "--batch-size", "64"]
SMALL += ["--learning-rate", "0.03", "--device", "cpu"]
COMMANDS = {
    "train": ["train", "digits", *SMALL, "--runs", ".", "--name", "run"],
    "crop": ["crop", "run", "--to", "3"],
    "heal": ["heal", "run", "--epochs", "2"],
    "refine": ["refine", "run", "--epochs", "2"],
    "two": ["train", "digits", *SMALL, "--runs", ".", "--name", "run", "--devices", "2"],
}
WEIGHTS = ("model", "cropped", "healed")
RESULTS = ("profile", "crop", "heal", "refine", "trajectories")
APART = (
    "latency",
    "seconds",
    "source",
    "trained",
)  # a refinement that was stopped has no `trained`


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/kills.json"))
    parser.add_argument("--only", choices=sorted(KILLS))
    given = parser.parse_args()
    out = given.out.resolve()
    found = begun(out)
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        for verb in [given.only] if given.only else KILLS:
            done = [kill for kill in found["kills"] if kill["verb"] == verb]
            if len(done) < KILLS[verb]:
                start, wanted, lasts = prepared(verb)
            for k in range(len(done), KILLS[verb]):
                row, lasts = killed(verb, k, start, wanted, lasts)
                found["kills"].append(row)
                found["verbs"] = {name: counted(name, found["kills"]) for name in KILLS}
                write_text(out, json.dumps(found, indent=1) + "\n")
            print(verb, counted(verb, found["kills"]), flush=True)


def begun(out: Path) -> dict[str, Any]:
    """What the file holds of this commit."""
    head = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    commit = subprocess.run(head, capture_output=True, text=True, check=True).stdout.strip()
    found = json.loads(out.read_text()) if out.exists() else {}
    if found.get("commit") == commit:
        return found
    return {"machine": machine(), "commit": commit, "verbs": {}, "kills": []}


def counted(verb: str, kills: list[dict[str, Any]]) -> dict[str, int]:
    """Kills of a verb: planned, done, those that broke it off, and the same in the end."""
    mine = [kill for kill in kills if kill["verb"] == verb]
    return {
        "planned": KILLS[verb],
        "done": len(mine),
        "interrupted": sum(kill["code"] != 0 for kill in mine),
        "as_unbroken": sum(kill["same"] for kill in mine),
        "drawn_again": sum(kill["drawn_again"] for kill in mine),
    }


def prepared(verb: str) -> tuple[Path, dict[str, Any], float]:
    """The folder to begin with, what the unbroken command leaves in it, its shortest time."""
    start = Path(f"{verb}-start").resolve()
    start.mkdir()
    if verb not in ("train", "two"):
        finish(start, COMMANDS["train"])
    if verb == "heal":
        finish(start, COMMANDS["crop"])
    times = []
    for k in range(3):
        whole = Path(shutil.copytree(start, f"{verb}-whole-{k}")).resolve()
        began = time.monotonic()
        finish(whole, COMMANDS[verb], alone=verb != "two")
        times.append(time.monotonic() - began)
    return start, outcome(whole), min(times)


def broken_off(verb: str, k: int, start: Path, lasts: float) -> tuple[Path, dict[str, Any], float]:
    """The folder of a command that a signal ended, what was seen, and the shortest time by now."""
    draw = random.Random(f"{verb} {k}")
    number = signal.SIGTERM if k % 3 == 2 else signal.SIGKILL
    for again in count():
        folder = Path(shutil.copytree(start, f"{verb}-{k}")).resolve()
        after, began = draw.uniform(0, 0.85) * lasts, time.monotonic()
        process = begin(folder, COMMANDS[verb], alone=verb != "two")
        time.sleep(after)
        with suppress(ProcessLookupError):
            os.kill(process.pid, number)
        if code := process.wait():
            if verb == "two" and number is signal.SIGKILL:
                time.sleep(1.5)  # the worker sees that the first one is gone
            row = {"verb": verb, "signal": number.name, "after": round(after / lasts, 3)}
            return folder, row | {"code": code, "drawn_again": again}, lasts
        lasts = min(lasts, time.monotonic() - began)
        shutil.rmtree(folder)
    raise AssertionError


def killed(
    verb: str, k: int, start: Path, wanted: dict[str, Any], lasts: float
) -> tuple[dict[str, Any], float]:
    """One kill, and whether the repeated command led to the same; the shortest time by now."""
    folder, row, lasts = broken_off(verb, k, start, lasts)
    run = folder / "run"
    whole = not run.exists() or finish(folder, ["report", "run"], check=False) == 0
    again = following(verb, folder)
    last = finish(folder, again, alone=verb != "two", check=False)
    verified = all(
        finish(folder, ["verify", path.name], check=False) == 0 for path in folder.glob("run*")
    )
    seen = outcome(folder)
    left = [str(p.relative_to(folder)) for p in folder.rglob(".*") if p.name != ".lock"]
    same = seen == wanted and whole and last == 0 and verified and not left
    row |= {"again": " ".join(again[:2]), "same": same}
    if not same:
        row |= {"report": whole, "last": last, "verified": verified, "left": left}
        row["differs"] = [n for n in seen.keys() | wanted.keys() if seen.get(n) != wanted.get(n)]
        print(row, (folder / "said").read_text()[-600:], flush=True)
    shutil.rmtree(folder)
    return row, lasts


def following(verb: str, folder: Path) -> list[str]:
    """What a user calls next."""
    if verb in ("train", "two") and (folder / "run").exists():
        return ["train", "--resume", "run"]
    if verb == "heal" and (folder / "run" / "heal" / "plan.json").exists():
        return ["heal", "run", "--resume"]
    if verb == "refine" and (folder / "run-x2").exists():
        return ["train", "--resume", "run-x2"]
    return COMMANDS[verb]


class Fork:
    """The command in a fork of this process, which has all its libraries loaded."""

    def __init__(self, folder: Path, args: list[str]):
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.chdir(folder)
                said = os.open("said", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(said, 1), os.dup2(said, 2)
                code = deeplimit_main(args)
            finally:
                os._exit(code)

    def wait(self) -> int:
        """The exit code; less than 0 of one that was killed."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def begin(folder: Path, args: list[str], *, alone: bool = True) -> Any:
    if alone:
        return Fork(folder, args)
    said = (folder / "said").open("a")
    command = [sys.executable, "-m", "deeplimit", *args]
    return subprocess.Popen(command, cwd=folder, stdout=said, stderr=said)


def finish(folder: Path, args: list[str], *, alone: bool = True, check: bool = True) -> int:
    code = begin(folder, args, alone=alone).wait()
    if check and code:
        raise SystemExit(f"{args}: {code}: {(folder / 'said').read_text()}")
    return code


def outcome(folder: Path) -> dict[str, Any]:
    """The weights' bytes and the results of all runs in a folder."""
    found: dict[str, Any] = {}
    for run in sorted(folder.glob("run*")):
        more = run.name == "run-x2"  # train --resume cuts it too
        for name in WEIGHTS[:1] if more else WEIGHTS:
            path = run / f"{name}.safetensors"
            if path.exists():
                found[f"{run.name}/{name}"] = path.read_bytes()
        for name in RESULTS:
            path = run / f"{name}.json"
            if path.exists() and not (more and name in ("crop", "profile")):
                found[f"{run.name}/{name}"] = timeless(json.loads(path.read_text()))
    return found


def timeless(value: Any) -> Any:
    if isinstance(value, dict):
        kept: Callable[[str], bool] = lambda key: not any(word in key for word in APART)  # noqa: E731
        return {key: timeless(v) for key, v in value.items() if kept(key)}
    return [timeless(v) for v in value] if isinstance(value, list) else value


if __name__ == "__main__":
    main()
