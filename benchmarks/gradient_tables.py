"""Writes the tables of docs/memory-free-gradients.md from the results: python gradient_tables.py.

A table stands between <!-- name --> and <!-- /name -->; what was between them is replaced.
"""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "memory-free-gradients.md"
ACTIVATIONS = {"tanh": "tanh", "gelu": "GELU", "relu": "ReLU"}


def result(name: str) -> dict:
    return json.loads((HERE / "results" / f"{name}.json").read_text())


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def percent(fraction: float) -> str:
    return f"{100 * fraction:.2g} %" if fraction < 1 else f"{100 * fraction:.0f} %"


def which() -> str:
    """Memory and error of each way, a column for each network."""
    found = result("coded_states")["which"]
    rows: dict[str, list[str]] = {}
    for n, methods in enumerate(found.values()):
        for row in methods:
            plan = row["method"].removeprefix("auto: ").replace("; ", ", ")
            way = "auto, 1 %" if "auto" in row["method"] else row["method"]
            cells = rows.setdefault(way.replace("\u00a0", " "), ["" for _ in found])
            cells[n] = f"{row['memory'] / 2**20:.1f} MiB, {percent(row['error'])}"
            cells[n] += f": {plan}" if way != row["method"] else ""
    order = ("plain", "checkpointed", "adjoint", "coded", "auto")
    ordered = sorted(rows.items(), key=lambda row: order.index(row[0].split()[0].strip(",")))
    return table(["memory at the peak, error", *found], ([way, *cells] for way, cells in ordered))


def budget() -> str:
    """Peak and time of a step under torch's activation memory budget, beside ours."""
    rows = result("coded_states")["budget"]["rows"]
    plain = rows[0]["seconds"]
    cells = [
        (row["method"], f"{row['memory'] / 2**20:.1f} MiB", f"{row['seconds'] / plain:.2f}")
        for row in rows
    ]
    return table(("BERT, 12 layers", "memory at the peak", "time / plain"), cells)


def calibration() -> str:
    """How the error goes with the drift, and what went unnoticed."""
    found = result("adjoint_accuracy")
    head = (
        "networks", "gradients", "error/drift, median", "largest", "error/√drift, largest",
        "error > 1e-2, of these without a warning", "warned needlessly",
    )  # fmt: skip

    def row(name: str) -> list[str]:
        of = found[name]
        ratio = of["error_over_drift"]
        root = of["largest_error_over_root_of_drift"]
        wrong = f"{of['wrong']['0.01']}, {of['silent']['0.01']}"
        ratios = [f"{ratio['median']:.2f}", f"{ratio['largest']:.1f}", f"{root:.1f}"]
        return [name, str(of["cases"]), *ratios, wrong, str(of["warned_needlessly"])]

    return table(head, [row("without ReLU"), row("with ReLU")])


def orders() -> str:
    """Measured slopes, theory's in brackets."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for row in result("adjoint_orders")["rows"]:
        e, scheme, controls = row["evaluations"], row["scheme"], row["controls"]
        theory = e if scheme == "Euler" else e + (3 if controls == "smooth" else 1)
        bracket = "" if row["activation"] == "relu" else f" (−{theory})"
        key = (scheme, f"{controls} in depth", ACTIVATIONS[row["activation"]])
        rows.setdefault(key, []).append(f"{row['slope']:.2f}{bracket}".replace("-", "−"))
    head = ("scheme", "controls", "activation", "e = 1", "e = 2", "e = 3")
    return table(head, [[*key, *cells, ""][: len(head)] for key, cells in rows.items()])


def costs() -> str:
    """Ratios of times, and the overhead where there is nothing to compute."""
    found = result("adjoint_speed")
    models = found["results"]
    rows = [
        [key, *(f"{model['ratios'][key]['ratio']:.2f}" for model in models)]
        for key in models[0]["ratios"]
    ]
    micro = found["overhead_us_per_block"]
    beyond = [micro[f"{name}, beyond plain"] for name in ("adjoint, e = 1", "checkpoint")]
    told = (
        f"Blocks of a few numbers are dominated by what Python does: {beyond[0]:.0f} µs per block "
        f"and step beyond\nplain backpropagation; torch's own checkpoint takes {beyond[1]:.0f}."
    )
    return f"{table(['ratio of times', *(m['model'] for m in models)], rows)}\n\n{told}"


def memory() -> str:
    """MiB against depth."""
    found = result("adjoint_depth")
    rows = [[name, *(f"{v:.1f}" for v in column)] for name, column in found["mebibytes"].items()]
    return table(["method", *(f"N = {depth}" for depth in found["depths"])], rows)


def main() -> None:
    page = PAGE.read_text()
    for make in (which, budget, calibration, orders, costs, memory):
        name = make.__name__
        between = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        page, times = between.subn(lambda m, made=make: f"{m[1]}{made()}\n{m[2]}", page)
        if times != 1:
            raise SystemExit(
                f"{PAGE}: <!-- {name} --> … <!-- /{name} --> stands {times} times in it"
            )
    PAGE.write_text(page)


if __name__ == "__main__":
    main()
