"""Pages that open offline, on a phone too: of a run, and of figures by themselves."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from deeplimit.files import write_text
from deeplimit.records import to_json
from deeplimit.report import answer, convergence, depth_limit, related, run, turnpike
from deeplimit.report.numbers import percent, significant
from deeplimit.training.results import Profiles, RunResults

CONFIG = {"displayModeBar": False, "responsive": True}
PANELS = 820  # pixels that two panels side by side need; on a phone the figure scrolls
Shown = tuple[str, go.Figure, str]  # name, figure, caption


@dataclass(frozen=True)
class Panel:
    """A figure in the page: its title and caption are the page's, its data are JSON."""

    id: str
    title: str
    caption: str
    figure: Markup


def render_page(results: RunResults) -> str:
    """The page as HTML; parts that the results do not have are left out."""
    limit, proof, profiles = results.depth_limit, results.certificate, results.profiles
    of_text = profiles is not None and not profiles.test.accuracy
    solvers = [("", row) for row in depth_limit.solver_rows(limit.solvers)] if limit else []
    recipe = _flat(results.recipe)
    return _rendered(
        "page.html.j2",
        results=results,
        plotly=Markup(get_plotlyjs()),
        language=of_text,
        layer_panels=layer_panels(results),
        depths=_depths(profiles, results) if profiles else None,
        states=states_panel(results),
        training_panels=training_panels(results),
        limit_panels=_panels(depth_limit.depth_limit_figures(limit)) if limit else [],
        solver_table=(depth_limit.SOLVERS, solvers) if solvers else None,
        certificate=convergence.certificate_answer(proof) if proof else "",
        certificate_panels=_panels(convergence.certificate_figures(proof)) if proof else [],
        recipe=[(key, value) for key, value in recipe if not (of_text and key == "points")],
    )


def _rendered(template: str, **context: Any) -> str:
    environment = Environment(
        loader=PackageLoader("deeplimit.report", "web"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["sentence"] = answer.verdict_sentence
    environment.globals |= {"words": answer, "related": related}
    return environment.get_template(template).render(context)


def write_page(results: RunResults, path: Path) -> Path:
    """Writes the page; a reader sees the old one or the new one.

    Raises:
        RunError: the disk is full or cannot be written to.
    """
    write_text(Path(path), render_page(results))
    return Path(path)


def _depths(profiles: Profiles, results: RunResults) -> dict[str, Any]:
    """Every depth: a picture, headings, and of each depth its mark and cells; what they say."""
    test = answer.every_depth(profiles, results.cut)
    headings, rows = test.cells(perplexity=not test.accuracy)
    cut = answer.cut_depth(results.cut, test)
    marks = test.marks(cut)
    figure = turnpike.quality_figure(test, results.reference)
    caption = turnpike.quality_caption(test, results.reference)
    return {
        "panels": _panels([("quality", figure, caption)]),
        "table": (headings, [(marks.get(n, ""), row) for n, row in enumerate(rows)]),
        "note": test.note(),
        "has_cut": cut is not None,
    }


def _flat(recipe: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The recipe's fields as in its file: nested tables with dots, lists with commas."""
    for key, value in recipe.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple):
            yield f"{prefix}{key}", ", ".join(map(str, value))
        elif value is not None:
            text = str(value)
            yield f"{prefix}{key}", text.lower() if isinstance(value, bool) else text


def layer_panels(results: RunResults) -> list[Panel]:
    """Loss twice, distance, update, controls, and class by class; of text fewer."""
    if results.profiles is None:
        return []
    profiles, cut, names = results.profiles, results.cut, results.class_names
    test, networks = profiles.test, (profiles, cut, results.reference)
    shown: list[Shown] = []
    if test.accuracy:
        for name, log in (("loss", False), ("excess", True)):
            figure = turnpike.loss_figure(*networks, log=log)
            shown.append((name, figure, turnpike.loss_caption(profiles, cut, log=log)))
        figure = turnpike.distance_figure(*networks)
        shown.append(("distance", figure, turnpike.distance_caption(profiles)))
    else:
        figure = turnpike.influence_figure(profiles, cut)
        shown.append(("influence", figure, turnpike.influence_caption(test)))
    figure = turnpike.update_figure(*networks)
    shown.append(("update", figure, turnpike.update_caption(profiles)))
    if profiles.control_norms is not None:
        figure = turnpike.controls_figure(profiles, cut)
        shown.append(("controls", figure, turnpike.controls_caption(profiles)))
    if test.class_distance:
        figure = turnpike.class_figure(test, names)
        shown.append(("classes", figure, turnpike.class_caption(test, names)))
    return _panels(shown)


def training_panels(results: RunResults) -> list[Panel]:
    """Loss, accuracy and, once the tube has been entered, the entry over epochs."""
    metrics = results.metrics
    samples = results.profiles.validation.samples if results.profiles else 0
    measures: tuple[run.Measure, ...] = get_args(run.Measure)
    return _panels(
        (
            f"training-{measure}",
            run.training_figure(metrics, measure),
            run.training_caption(metrics, measure, samples),
        )
        for measure in measures
        if any(row.get(measure) is not None for row in metrics)
    )


def states_panel(results: RunResults) -> dict[str, Any] | None:
    """The states: a panel, figures of test data to show at each layer, marks along the slider."""
    if results.picture is None:
        return None
    picture, profiles = run.thin(results.picture), results.profiles
    figure = run.trajectory_figure(picture, results.class_names)
    figure.layout.sliders = ()
    horizon = len(picture.points) - 1
    layers, ticks, validation = [], [], None
    if profiles is not None:
        test, validation = profiles.test, profiles.validation
        entry = validation.entry()
        if test.horizon == horizon:
            layers = [
                {"accuracy": percent(a, test.samples), "distance": significant(d)}
                for a, d in zip(test.accuracy, test.distance, strict=True)
            ]
        if test.horizon == horizon and entry is not None:
            ticks = [{"at": round(entry / max(1, horizon), 4), "text": f"entry {entry}"}]
    of, leaving = len(results.picture.labels), run.leaving(picture)
    caption = run.states_caption(picture, of, leaving, validation)
    (panel,) = _panels([("states", figure, caption)])
    return {"panel": panel, "layers": layers, "ticks": ticks, "horizon": horizon}


def _panels(shown: Iterable[Shown]) -> list[Panel]:
    """The page writes the titles itself, so the figures give theirs back."""
    panels = []
    for name, figure, caption in shown:
        title = figure.layout.title.text
        figure.update_layout(title=None, margin={"t": 24, "b": 40})
        panels.append(Panel(name, title, caption, inline_json(figure.to_json())))
    return panels


def inline_json(text: str) -> Markup:
    """JSON that cannot end the script element that it stands in."""
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def write_figures(
    path: Path,
    title: str,
    figures: Sequence[Shown],
    result: Any = None,
    *,
    to: Path | None = None,
) -> str:
    """Writes figures in one page, the result beside it; says where it is.

    Args:
        path: of the page.
        title: its heading.
        figures: what is on it.
        result: their numbers.
        to: where a page that belongs to a commit will be.
    """
    shown = [
        {
            "html": Markup(figure.to_html(CONFIG, include_plotlyjs=n == 0, full_html=False)),
            "width": PANELS if "xaxis2" in figure.layout else 0,
            "caption": caption,
        }
        for n, (_, figure, caption) in enumerate(figures)
    ]
    write_text(path, _rendered("figures.html.j2", title=title, figures=shown))
    if result is not None:
        write_result(path.with_suffix(".json"), result)
    return f"The figure{' is' if len(figures) == 1 else 's are'} at {(to or path).resolve()}"


def write_result(path: Path, result: Any) -> None:
    """Writes a result as JSON, as --json prints it."""
    write_text(path, to_json(result) + "\n")
