"""Pages that open offline, on a phone too: of a run, and of figures by themselves."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args

import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from deeplimit.files import write_text
from deeplimit.records import to_plain
from deeplimit.report import answer, language
from deeplimit.report.certificate import certificate_answer, certificate_figures
from deeplimit.report.control import control_rows, control_sentences
from deeplimit.report.depth_limit import depth_limit_figures, solver_rows
from deeplimit.report.language import perplexity, verdict_sentence
from deeplimit.report.numbers import percent, significant
from deeplimit.report.states import leaving, states_caption, thin, trajectory_figure
from deeplimit.report.training import Measure, training_caption, training_figure
from deeplimit.report.turnpike import (
    accuracy_caption,
    accuracy_figure,
    class_caption,
    class_figure,
    distance_caption,
    distance_figure,
    influence_figure,
    loss_caption,
    loss_figure,
    update_caption,
    update_figure,
)
from deeplimit.training.results import Profiles, RunResults

CONFIG = {"displayModeBar": False, "responsive": True}
HEAD = (
    '<!doctype html><html lang="en"><meta charset="utf-8"><title>{title} · deeplimit</title>'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    '<body style="font-family: sans-serif; margin: 1rem"><h1 style="font-size: 1.4rem">{title}</h1>'
)
# Panels side by side need room: on a phone the figure scrolls, not the page.
ROOM = '<div style="overflow-x: auto"><div style="min-width: {width}px">{figure}</div></div>'
PANELS = 820  # pixels, for two of them


def render_page(results: RunResults) -> str:
    """The page as HTML; parts that the results do not have are left out."""
    environment = Environment(
        loader=PackageLoader("deeplimit.report", "web"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["sentence"] = verdict_sentence
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


@dataclass(frozen=True)
class Panel:
    """A figure in the page: its title and caption are the page's, its data are JSON."""

    id: str
    title: str
    caption: str
    figure: Markup


@dataclass(frozen=True)
class StatesPanel(Panel):
    """The moving states: figures to show at each layer, and marks along the slider."""

    layers: list[dict[str, str]]
    ticks: list[dict[str, Any]]
    horizon: int


def layer_panels(results: RunResults) -> list[Panel]:
    """Loss twice, accuracy, distance, update, and class by class."""
    profiles, cut, reference = results.profiles, results.cut, results.reference
    if profiles is None:
        return []
    if not profiles.test.accuracy:  # of a language model
        return [
            _panel("loss", loss_figure(profiles, cut), language.loss_caption(profiles)),
            _panel(
                "influence",
                influence_figure(profiles, cut),
                language.influence_caption(profiles.test),
            ),
            _panel("update", update_figure(profiles, cut), update_caption(profiles)),
        ]
    shown = [
        ("loss", loss_figure(profiles, cut, reference), loss_caption(profiles, cut, log=False)),
        (
            "excess",
            loss_figure(profiles, cut, reference, log=True),
            loss_caption(profiles, cut, log=True),
        ),
        (
            "accuracy",
            accuracy_figure(profiles, cut, reference),
            accuracy_caption(profiles, cut, reference),
        ),
        ("distance", distance_figure(profiles, cut, reference), distance_caption(profiles)),
        ("update", update_figure(profiles, cut, reference), update_caption(profiles)),
    ]
    if profiles.test.class_distance:
        figure = class_figure(profiles.test, results.class_names)
        shown.append(("classes", figure, class_caption(profiles.test, results.class_names)))
    return [_panel(name, figure, caption) for name, figure, caption in shown]


def depth_limit_panels(results: RunResults) -> list[Panel]:
    """Gap, smoothness and controls of each stage."""
    if results.depth_limit is None:
        return []
    return [_panel(*shown) for shown in depth_limit_figures(results.depth_limit)]


def certificate_panels(results: RunResults) -> list[Panel]:
    """Risk, distance and rate against what was guaranteed."""
    if results.certificate is None:
        return []
    return [_panel(*shown) for shown in certificate_figures(results.certificate)]


def training_panels(results: RunResults) -> list[Panel]:
    """Loss, accuracy and, once the tube has been entered, the entry over epochs."""
    metrics = results.metrics
    if not metrics:
        return []
    samples = results.profiles.validation.samples if results.profiles else 0
    measures: list[Measure] = [
        measure
        for measure in get_args(Measure)
        if any(row.get(measure) is not None for row in metrics)
    ]
    return [
        _panel(
            f"training-{measure}",
            training_figure(metrics, measure),
            training_caption(metrics, measure, samples),
        )
        for measure in measures
    ]


def states_panel(results: RunResults) -> StatesPanel | None:
    """The states, with accuracy and distance on test data for every layer."""
    if results.picture is None:
        return None
    picture = thin(results.picture)
    figure = trajectory_figure(picture, results.class_names)
    figure.layout.sliders = ()
    test, validation = None, None
    if results.profiles is not None:
        test, validation = results.profiles.test, results.profiles.validation
    caption = states_caption(picture, len(results.picture.labels), leaving(picture), validation)
    panel = _panel("states", figure, caption)
    horizon = len(picture.points) - 1
    layers = []
    marks: dict[int, str] = {}
    if test is not None and validation is not None and test.horizon == horizon:
        layers = [
            {"accuracy": percent(a, test.samples), "distance": significant(d)}
            for a, d in zip(test.accuracy, test.distance, strict=True)
        ]
        entry = validation.entry()
        if entry is not None:
            marks[entry] = f"entry {entry}"
    return StatesPanel(
        **vars(panel),
        layers=layers,
        ticks=[{"at": round(n / max(1, horizon), 4), "text": text} for n, text in marks.items()],
        horizon=horizon,
    )


def _panel(name: str, figure: go.Figure, caption: str) -> Panel:
    """The page writes the title itself, so the figure gives its own back."""
    title = figure.layout.title.text
    figure.update_layout(title=None, margin={"t": 24, "b": 40})
    return Panel(name, title, caption, inline_json(figure.to_json()))


def inline_json(text: str) -> Markup:
    """JSON that cannot end the script element that it stands in."""
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def write_figures(
    path: Path,
    title: str,
    figures: Sequence[tuple[str, go.Figure, str]],
    result: Any = None,
    *,
    to: Path | None = None,
) -> str:
    """Writes (name, figure, caption) in one page, the result beside it; says where it is.

    Args:
        path: of the page.
        title: its heading.
        figures: what is on it.
        result: their numbers.
        to: where a page that belongs to a commit will be.
    """
    parts = [HEAD.format(title=escape(title))]
    for n, (_, figure, caption) in enumerate(figures):
        drawn = figure.to_html(include_plotlyjs=n == 0, full_html=False, config=CONFIG)
        several = "xaxis2" in figure.layout
        parts.append(ROOM.format(width=PANELS if several else 0, figure=drawn))
        parts.append(f"<p>{escape(caption)}</p>")
    write_text(path, "".join(parts) + "</body>\n")
    if result is not None:
        write_result(path.with_suffix(".json"), result)
    return f"The figure{' is' if len(figures) == 1 else 's are'} at {(to or path).resolve()}"


def write_result(path: Path, result: Any) -> None:
    """Writes a result as JSON, as --json prints it."""
    write_text(path, json.dumps(to_plain(result), allow_nan=False, ensure_ascii=False) + "\n")
