"""The page of a run: one HTML file that opens offline, in light and dark, on a phone too."""

from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from deeplimit.files import write_text
from deeplimit.report import answer
from deeplimit.report.certificate import certificate_answer
from deeplimit.report.control import control_rows, control_sentences
from deeplimit.report.depth_limit import solver_rows
from deeplimit.report.language import perplexity
from deeplimit.report.numbers import percent, significant
from deeplimit.report.panels import (
    certificate_panels,
    depth_limit_panels,
    layer_panels,
    states_panel,
    training_panels,
)
from deeplimit.training.results import Profiles, RunResults


def render_page(results: RunResults) -> str:
    """The page as HTML; parts that the results do not have are left out."""
    environment = Environment(
        loader=PackageLoader("deeplimit.report", "web"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2").render(_context(results))


def write_page(results: RunResults, path: Path) -> Path:
    """Writes the page; a reader sees the old one or the new one.

    Raises:
        RunError: the disk is full or cannot be written to.
    """
    write_text(Path(path), render_page(results))
    return Path(path)


def _context(results: RunResults) -> dict[str, Any]:
    profiles, cut, reference = results.profiles, results.cut, results.reference
    return {
        "title": _title(results),
        "css": _source("page.css"),
        "script": _source("page.js"),
        "plotly": Markup(get_plotlyjs()),
        "results": results,
        "horizon": profiles.test.horizon if profiles else None,
        "cut": cut,
        "strip": answer.strip(cut) if cut else [],
        "lead": answer.lead(cut) if cut else "",
        "rule": answer.rule(cut, profiles) if cut else "",
        "entry_apart": answer.entry_apart(cut, profiles) if cut else "",
        "data": answer.data_sentence(cut.parts) if cut else "",
        "comparisons": answer.comparisons(cut.report) if cut else (),
        "agreement": percent(cut.report.agreement, cut.report.samples)
        if cut and cut.report.has_accuracy
        else "",
        "language": profiles is not None and not profiles.test.accuracy,
        "healing": answer.healing_sentence(results.healing) if results.healing else "",
        "refined": answer.refinement_sentence(results.refinement) if results.refinement else "",
        "merged": answer.merging_sentence(results.merging) if results.merging else "",
        "waiting": answer.waiting(results),
        "control": control_sentences(cut, reference),
        "control_rows": control_rows(cut, reference),
        "layer_panels": layer_panels(results),
        "layer_rows": list(_layer_rows(profiles)) if profiles else [],
        "states": states_panel(results),
        "training_panels": training_panels(results),
        "limit": results.depth_limit,
        "limit_panels": depth_limit_panels(results),
        "solver_rows": solver_rows(results.depth_limit.solvers) if results.depth_limit else [],
        "certificate": certificate_answer(results.certificate) if results.certificate else "",
        "certificate_panels": certificate_panels(results),
        "recipe": list(_flat(results.recipe)),
    }


def _title(results: RunResults) -> str:
    if results.cut is None:
        return f"{results.name} · deeplimit"
    report = results.cut.report
    return f"{results.name}: depth {report.horizon_before} → {report.horizon_after} · deeplimit"


def _source(name: str) -> Markup:
    """A style sheet or script of ours, to stand in the page as it is."""
    return Markup(files("deeplimit.report").joinpath("web", name).read_text("utf-8"))


def _layer_rows(profiles: Profiles) -> Iterator[dict[str, Any]]:
    """Figures of test data; entry and exit are those of validation data, as everywhere."""
    profile, validation = profiles.test, profiles.validation
    none = [""] * (profile.horizon + 1)
    accuracies = [percent(a, profile.samples) for a in profile.accuracy] or none
    distances = [*map(significant, profile.distance)] or none
    marks = {validation.exit(): "exit"} if validation.exit() != validation.horizon else {}
    marks |= {validation.entry(): "entry"}
    for n in range(profile.horizon + 1):
        last = n == profile.horizon
        yield {
            "layer": n,
            "mark": marks.get(n, ""),
            "loss": significant(profile.loss[n], 4),
            "accuracy": accuracies[n],
            "distance": distances[n],
            "perplexity": perplexity(profile.loss[n]),
            "update": "" if last else f"{significant(100 * profile.relative_update[n])} %",
        }


def _flat(recipe: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The recipe's fields as in its file: nested tables with dots, lists with commas."""
    for key, value in recipe.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, bool):
            yield f"{prefix}{key}", str(value).lower()
        elif isinstance(value, list | tuple):
            yield f"{prefix}{key}", ", ".join(map(str, value))
        elif value is not None:
            yield f"{prefix}{key}", str(value)
