"""Which models can be read, cut, saved and trained: every architecture at hand, a row each.

A row is *exact*, where every column that applies agrees with a calculation made without the
library; *wrong*, where one does not; *crash*, where something but an InputError came out;
*refused*, where an InputError said in one line that and why it cannot be done. Columns:

    layers      how many layers were read
    z           max over depths k of |z_k − answer of the model cut by hand to its first k blocks|,
                relative to the answer's largest entry; 1e-5 is the limit, in float32
    z depths    how many depths were cut by hand; of models that do not run with a shorter list,
                passed: the blocks give back what they were given
    saved       the same of a crop against what `from_pretrained` reads of what `save_pretrained`
                wrote
    generate    whether a crop writes the same five tokens with its cache and without
    stage cost  relative error of StageCost's gradient, against the sum of losses of cut models,
                in float64 where the model runs in it
    adjoint     relative error of the gradients by `use_adjoint`, against backpropagation's; or
                what it said. It says nothing of the row: these gradients are approximate.

The walk goes on where it was: rows in the file with the same versions are kept, but for those of
models that could not be built. A model that takes longer than the time limit is given up, and its
row says so.

    python benchmarks/coverage.py                        # all of it
    python benchmarks/coverage.py --only '^(gpt|llama)'  # some architectures
    python benchmarks/coverage.py --table                # the table of what was found
"""

import argparse
import csv
import logging
import re
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import coverage_columns as columns
from deeplimit import InputError, anatomy
from deeplimit.studies.harness import machine
from zoo import Member, ZooError, one_line, zoo

RESULTS = Path(__file__).parent / "results"
NAMES = (
    "library", "architecture", "model", "status", "reason", "layers", "z", "z depths", "saved",
    "generate", "stage cost", "adjoint", "seconds",
)  # fmt: skip
Row = dict[str, str]


def versions() -> str:
    """What the rows depend on: the file's first line."""
    found = []
    for name in ("transformers", "torch", "timm", "torchvision"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} —")
    return f"# {', '.join(found)}; {machine()['processor']}"


def kept(path: Path) -> tuple[str, list[Row]]:
    """The first line of a file and its rows; none of a file that is not there."""
    if not path.exists():
        return "", []
    with path.open(newline="") as file:
        return file.readline().strip(), list(csv.DictReader(file))


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """Raises TimeoutError when the time is up."""

    def up(*_: Any) -> None:
        raise TimeoutError(f"took longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def row_of(member: Member, limit: int) -> Row:
    """All columns of a network."""
    row: Row = {"library": member.library, "architecture": member.architecture}
    row |= {"model": member.head, "status": "exact"}
    start = time.perf_counter()
    try:
        with within(limit):
            model, batch = member.make()
    except (ZooError, TimeoutError) as error:
        return row | {"status": "not built", "reason": short(str(error))}
    except Exception as error:
        return row | {"status": "not built", "reason": one_line(error)}
    try:
        with within(limit):
            _fill(row, member, model, batch)
    except InputError as error:
        _worse(row, "refused", f"reads: {error}")
    except TimeoutError as error:
        _worse(row, "timed out", str(error))
    except Exception as error:
        _worse(row, "crash", f"reads: {one_line(error)}")
    row["seconds"] = f"{time.perf_counter() - start:.1f}"
    return row


def _fill(row: Row, member: Member, model: torch.nn.Module, batch: Any) -> None:
    a = anatomy(model, example=batch)
    row["layers"] = str(a.horizon)
    tried = {
        "z": lambda: columns.logits(a, batch),
        "saved": lambda: columns.saved(a, batch),
        "generate": lambda: columns.generated(a, batch),
        "stage cost": lambda: columns.stage_cost(a, batch),
    }
    for name, measure in tried.items():
        try:
            found, note = measure()
        except InputError as error:
            row[name] = "refused"
            _worse(row, "refused", f"{name}: {error}")
            continue
        except columns.NotApplicable as reason:
            row[name] = str(reason)
            continue
        except TimeoutError:
            raise
        except Exception as error:
            # What a model keeps of a run with its graph is no second one's, whoever runs it.
            kept = "through the graph a second time" in str(error)
            row[name] = "refused" if kept else "crash"
            why = "the model keeps the graph of its last run" if kept else one_line(error)
            _worse(row, row[name], f"{name}: {why}")
            continue
        row[name] = f"{found:.1e}" if isinstance(found, float) else str(found)
        if name == "z":
            row["z depths"] = note
        wrong = not found <= columns.LIMIT if isinstance(found, float) else found == "differs"
        if wrong:
            _worse(row, "wrong", f"{name}: {row[name]} {note}")
    row["adjoint"] = columns.adjoint(model, batch)


ORDER = ("exact", "refused", "timed out", "crash", "wrong")


def _worse(row: Row, status: str, reason: str) -> None:
    if ORDER.index(status) > ORDER.index(row["status"]):
        row["status"], row["reason"] = status, short(reason)


def short(text: str) -> str:
    return " ".join(text.split())[:170]


def walk(out: Path, only: str, limit: int, fresh: bool) -> None:
    """Appends a row for each network that has none yet."""
    members = [m for m in zoo() if re.search(only, f"{m.architecture} {m.head}")]
    members = list({m[:3]: m for m in members}.values())
    with_versions, rows = kept(out)
    known = {(r["library"], r["architecture"], r["model"]): r for r in rows}
    if with_versions != versions():
        known = {}
    for member in members:  # what was not built may be now
        row = known.get(member[:3])
        if row is not None and (fresh or row["status"] == "not built"):
            del known[member[:3]]
    out.parent.mkdir(parents=True, exist_ok=True)
    counts: Counter[str] = Counter()
    with out.open("w", newline="") as file:
        file.write(f"{versions()}\n")
        writer = csv.DictWriter(file, NAMES, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(known.values())
        for i, member in enumerate(members, 1):
            row = known.get(member[:3])
            if row is None:
                row = row_of(member, limit)
                writer.writerow(row)
                file.flush()
            counts[row["status"]] += 1
            told = ", ".join(f"{n} {status}" for status, n in sorted(counts.items()))
            print(f"\r{i}/{len(members)}: {told}; {member.head:<44.44}", end="", file=sys.stderr)
    print(file=sys.stderr)


def table(with_versions: str, rows: list[Row]) -> str:
    """What was found, by library and kind of head, and why what is refused is."""
    built = [row for row in rows if row["status"] != "not built"]
    kinds: dict[str, Counter[str]] = {}
    for row in built:
        kinds.setdefault(_kind(row), Counter())[row["status"]] += 1
    total = sum(kinds.values(), Counter())
    heads = ("exact", "wrong", "crash", "refused", "timed out")
    lines = [
        f"{len({row['architecture'] for row in built})} architectures, {len(built)} models; "
        f"{len(rows) - len(built)} more could not be built small or given inputs. "
        f"Of {with_versions.strip('# ')}.",
        "",
        "| models | all | " + " | ".join(heads) + " |",
        "|---|" + "---:|" * (len(heads) + 1),
    ]
    for kind, counts in [*sorted(kinds.items()), ("**all**", total)]:
        figures = " | ".join(str(counts[head]) for head in heads)
        lines.append(f"| {kind} | {sum(counts.values())} | {figures} |")
    refused: dict[str, list[str]] = {}
    for row in built:
        if row["status"] == "refused":
            refused.setdefault(_reason(row), []).append(row["architecture"])
    lines += ["", "| refused, since | models | such as |", "|---|---:|---|"]
    for reason, names in sorted(refused.items(), key=lambda pair: -len(pair[1])):
        some = ", ".join(list(dict.fromkeys(names))[:4])
        lines.append(f"| {reason.replace('|', '/')} | {len(names)} | {some} |")
    return "\n".join(lines) + "\n"


def _kind(row: Row) -> str:
    if row["library"] != "transformers":
        return row["library"]
    head = re.search(r"For[A-Z]\w*$|LMHead|DoubleHeads", row["model"])
    return f"transformers, {head[0]}" if head else "transformers, without a head"


def _reason(row: Row) -> str:
    """A reason without the names and numbers of its model."""
    text = row["reason"].replace(row["model"], "…").partition("again from its configuration")
    text = text[0] + text[1]
    text = re.sub(r"\b[A-Z]\w*[a-z]\w*[A-Z]\w*\b", "…", text)
    return re.sub(r"\(.*|:? ?\[.*|\d.*", "", text.replace("\n", " "))[:90].strip()


def quiet() -> None:
    """The libraries' own words and bars would drown the progress line; one core is enough."""
    from transformers.utils import logging as of_transformers

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    of_transformers.disable_progress_bar()
    torch.set_num_threads(1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", metavar="PATTERN", help="of architecture and class")
    parser.add_argument("--out", type=Path, default=RESULTS / "coverage.csv")
    parser.add_argument("--limit", type=int, default=30, help="seconds a model may take")
    parser.add_argument("--fresh", action="store_true", help="make rows that are there again")
    parser.add_argument("--table", action="store_true", help="no walk, the table of the rows alone")
    given = parser.parse_args()
    quiet()
    if not given.table:
        walk(given.out, given.only, given.limit, given.fresh)
    found = table(*kept(given.out))
    given.out.with_suffix(".md").write_text(found)
    print(found)


if __name__ == "__main__":
    main()
