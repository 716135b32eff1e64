"""The page in Chromium, offline."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser, Page, expect

from deeplimit.report import write_page
from deeplimit.report.numbers import percent, significant
from deeplimit.training.results import RunResults

pytestmark = pytest.mark.browser

UNDER_WAY = re.compile("^([1-9]|1[0-9]) of 20$")  # neither at the first nor at the last layer


@contextmanager
def opened(chromium: Browser, path: Path, width: int = 1200, **options: Any) -> Iterator[Page]:
    """The page, open and offline; leaving fails on any message, error or request of the page."""
    context = chromium.new_context(
        viewport={"width": width, "height": 900}, offline=True, **options
    )
    page = context.new_page()
    troubles: list[str] = []
    page.on("console", lambda message: troubles.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on(
        "request",
        lambda request: (
            None
            if request.url.startswith(("file:", "data:", "blob:"))
            else troubles.append(request.url)
        ),
    )
    page.goto(path.as_uri())
    page.wait_for_function("document.querySelectorAll('.plot .main-svg').length > 0")
    yield page
    assert troubles == []
    context.close()


def shown(page: Page) -> list[np.ndarray]:
    """Positions of the points of every class, read back from where they are drawn.

    The translations in the DOM are turned into data by the scales of the axes.
    """
    found = page.evaluate(
        """() => {
          const div = document.getElementById('states');
          const { xaxis, yaxis } = div._fullLayout;
          return [...div.querySelectorAll('.scatterlayer .trace')].map((trace) =>
            [...trace.querySelectorAll('.point')].map((point) => {
              const [x, y] = point.getAttribute('transform').match(/-?[0-9.]+/g).map(Number);
              return [xaxis.p2l(x), yaxis.p2l(y)];
            })).filter((points) => points.length > 1);
        }"""
    )
    return [np.array(points) for points in found]


def assert_at_layer(page: Page, results: RunResults, layer: int) -> None:
    assert results.picture is not None
    expect(page.locator("#at-layer")).to_have_text(f"{layer} of {len(results.picture.points) - 1}")
    page.wait_for_timeout(100)
    labels = np.array(results.picture.labels)
    there = np.array(results.picture.points[layer])
    drawn = shown(page)
    assert len(drawn) == labels.max() + 1
    for label, points in enumerate(drawn):
        np.testing.assert_allclose(points, there[labels == label], atol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits", "spirals"])
def test_the_slider_moves_the_points(
    name: str, chromium: Browser, pages: dict[str, Path], request: pytest.FixtureRequest
) -> None:
    results: RunResults = request.getfixturevalue(name)
    assert results.profiles is not None
    test = results.profiles.test
    with opened(chromium, pages[name]) as page:
        assert_at_layer(page, results, 0)
        for layer in (2, 7, test.horizon):
            page.get_by_label("Layer, from 0 to").fill(str(layer))
            assert_at_layer(page, results, layer)
            expect(page.locator("#at-accuracy")).to_have_text(
                percent(test.accuracy[layer], test.samples)
            )
            expect(page.locator("#at-distance")).to_have_text(significant(test.distance[layer]))


def test_the_keyboard_is_enough(
    chromium: Browser, pages: dict[str, Path], digits: RunResults
) -> None:
    with opened(chromium, pages["digits"]) as page:
        page.get_by_label("Layer, from 0 to 20").focus()
        page.keyboard.press("ArrowRight")
        assert_at_layer(page, digits, 1)
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowLeft")
        assert_at_layer(page, digits, 2)
        page.keyboard.press("End")
        assert_at_layer(page, digits, 20)
        page.keyboard.press("Home")
        assert_at_layer(page, digits, 0)
        page.keyboard.press("Space")
        expect(page.locator("#play")).to_have_text("Pause")
        expect(page.locator("#at-layer")).to_have_text(UNDER_WAY)
        page.keyboard.press("Space")
        expect(page.locator("#play")).to_have_text("Play")
        assert_at_layer(page, digits, int(page.get_by_label("Layer, from").input_value()))


def test_play_runs_to_the_last_layer_and_starts_again(
    chromium: Browser, pages: dict[str, Path], digits: RunResults
) -> None:
    with opened(chromium, pages["digits"]) as page:
        slider, play = page.get_by_label("Layer, from 0 to 20"), page.locator("#play")
        slider.fill("18")
        play.click()
        expect(play).to_have_text("Pause")
        expect(play).to_have_text("Play", timeout=20_000)
        assert_at_layer(page, digits, 20)
        play.click()
        expect(page.locator("#at-layer")).to_have_text(UNDER_WAY)
        slider.fill("9")
        expect(play).to_have_text("Play")
        assert_at_layer(page, digits, 9)


def test_buttons_step_and_calm_play_jumps_from_layer_to_layer(
    chromium: Browser, pages: dict[str, Path], digits: RunResults
) -> None:
    with opened(chromium, pages["digits"], reduced_motion="reduce") as page:
        page.get_by_role("button", name="One layer back").click()
        assert_at_layer(page, digits, 0)
        page.get_by_role("button", name="One layer forth").click()
        assert_at_layer(page, digits, 1)
        page.get_by_label("Layer, from 0 to 20").fill("20")
        page.get_by_role("button", name="One layer forth").click()
        assert_at_layer(page, digits, 20)
        page.get_by_role("button", name="Play").click()
        expect(page.locator("#at-layer")).to_have_text(UNDER_WAY)
        page.get_by_role("button", name="Pause").click()
        assert_at_layer(page, digits, int(page.get_by_label("Layer, from").input_value()))


@pytest.mark.parametrize("name", ["digits", "spirals"])
def test_it_fits_narrow_and_wide_light_and_dark(
    name: str, chromium: Browser, pages: dict[str, Path]
) -> None:
    with opened(chromium, pages[name], width=400) as page:
        for width in (400, 1600):
            page.set_viewport_size({"width": width, "height": 900})
            page.wait_for_function(
                "document.querySelector('#quality .main-svg').clientWidth <= "
                "document.getElementById('quality').clientWidth"
            )
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            cut_off = page.evaluate(
                """() => [...document.querySelectorAll('.plot .main-svg text, p, h1, dd, b')]
                  .filter((e) => e.getBoundingClientRect().right > innerWidth + 1)
                  .map((e) => e.textContent)"""
            )
            assert cut_off == []
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            background, ink, tick = page.evaluate(
                """() => {
                  const style = (selector) => getComputedStyle(document.querySelector(selector));
                  return [style('.panel').backgroundColor, style('h2').color,
                          style('#quality .xtick text').fill];
                }"""
            )
            assert contrast(background, ink) > 7
            assert contrast(background, tick) > 4.5
            assert (brightness(background) < 0.1) == (scheme == "dark")


def brightness(color: str) -> float:
    channels = [int(c) / 255 for c in color[4:-1].split(",")]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    low, high = sorted((brightness(a), brightness(b)))
    return (high + 0.05) / (low + 0.05)


def test_every_figure_is_drawn_and_named(chromium: Browser, pages: dict[str, Path]) -> None:
    with opened(chromium, pages["digits"]) as page:
        plots = page.locator(".plot")
        assert plots.count() == 10
        for plot in plots.all():
            assert plot.locator(".scatterlayer .trace").count() > 0
            assert len(plot.get_attribute("aria-label") or "") > 40
        assert page.get_by_role("main").count() == 1
        assert page.get_by_role("heading", level=1).inner_text().split() == (
            page.title().split(":")[1].split(" · ")[0].replace("depth", "Depth").split()
        )
        dashes = page.locator("#loss .scatterlayer path.js-line").evaluate_all(
            "lines => lines.map((line) => getComputedStyle(line).strokeDasharray)"
        )
        assert sorted(dash == "none" for dash in dashes) == [False, False, True]


def test_a_run_that_was_not_cut_opens_too(chromium: Browser, tmp_path: Path) -> None:
    empty = RunResults(name="empty", recipe={"seed": 3}, class_names=("a", "b"))
    path = write_page(empty, tmp_path / "report.html")
    context = chromium.new_context(offline=True)
    page = context.new_page()
    troubles: list[str] = []
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.goto(path.as_uri())
    expect(page.get_by_role("heading", name="Recipe")).to_be_visible()
    assert troubles == []
    context.close()


@pytest.mark.slow
def test_class_names_are_text_in_figures(
    chromium: Browser, digits: RunResults, tmp_path: Path
) -> None:
    evil = "<img src=x onerror=alert(1)>&<b>zero</b>"
    named = RunResults(
        **{**vars(digits), "class_names": (evil, *digits.class_names[1:]), "name": evil}
    )
    with opened(chromium, write_page(named, tmp_path / "report.html")) as page:
        assert page.locator("img").count() == 0
        legend = page.locator("#classes .legendtext").first
        assert legend.get_attribute("data-unformatted") is not None
        assert legend.text_content() == evil
