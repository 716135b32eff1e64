"""The figures of a page with their titles and captions, ready for the template."""

from dataclasses import dataclass
from typing import Any, get_args

import plotly.graph_objects as go
from markupsafe import Markup

from deeplimit.report import language
from deeplimit.report.captions import (
    accuracy_caption,
    class_caption,
    distance_caption,
    loss_caption,
    states_caption,
    training_caption,
    update_caption,
)
from deeplimit.report.certificate import certificate_figures
from deeplimit.report.depth_limit import depth_limit_figures
from deeplimit.report.figures import (
    accuracy_figure,
    class_figure,
    distance_figure,
    influence_figure,
    loss_figure,
    training_figure,
    trajectory_figure,
    update_figure,
)
from deeplimit.report.figures.training import Measure
from deeplimit.report.figures.trajectory import leaving
from deeplimit.report.numbers import percent, significant
from deeplimit.report.thinning import thin
from deeplimit.training.results import RunResults


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
        ("loss", loss_figure(profiles, cut, reference), loss_caption(profiles, cut, False)),
        (
            "excess",
            loss_figure(profiles, cut, reference, log=True),
            loss_caption(profiles, cut, True),
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
