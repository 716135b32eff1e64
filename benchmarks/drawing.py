"""Figures as files, drawn by a browser: of a page that a verb or a study wrote, or of a script.

    python benchmarks/drawing.py runs/linear/study.html benchmarks/results/linear.svg
    python benchmarks/drawing.py runs/convergence/study.html map.svg --number 2
    python benchmarks/drawing.py runs/demo/report.html docs/turnpike.png     # the README's picture

Needs playwright (in the extra `dev`) and a Chromium on the path.
"""

import argparse
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
DRAW = """Plotly.toImage(document.querySelectorAll('.js-plotly-plot')[%d],
    {format: 'svg', width: %d, height: %d}).then(u => decodeURIComponent(u.split(',')[1]))"""
WIDTH, HEIGHT = 1000, 420  # where a layout says nothing
PANELS = ("Accuracy", "Distance to the minimisers")  # of a run's page, side by side in the README


@contextmanager
def opened(width: int, height: int) -> Iterator[Any]:
    """An empty page of a browser."""
    from playwright.sync_api import sync_playwright

    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=OPTIONS)
        yield browser.new_page(viewport={"width": width, "height": height})
        browser.close()


def write(drawn: go.Figure, path: Path) -> None:
    """A figure in the size of its layout: .html as it is, .svg and .png by the browser."""
    if path.suffix == ".html":
        drawn.write_html(path, include_plotlyjs=True)
        return
    width, height = drawn.layout.width or WIDTH, drawn.layout.height or HEIGHT
    with opened(width, height) as page:
        page.set_content(drawn.to_html(include_plotlyjs=True, config={"displayModeBar": False}))
        if path.suffix == ".png":
            page.locator(".js-plotly-plot").screenshot(path=path)
        else:
            path.write_text(page.evaluate(DRAW % (0, width, height)))


def write_svg(source: Path, path: Path, number: int) -> None:
    """The so manyth figure of a page as .svg, in the height that the page gives it."""
    with opened(WIDTH, 900) as page:
        page.goto(source.resolve().as_uri())
        page.wait_for_timeout(2000)
        height = page.locator(".js-plotly-plot").nth(number - 1).bounding_box()["height"]
        path.write_text(page.evaluate(DRAW % (number - 1, WIDTH, height)))


def write_panels(source: Path, path: Path) -> None:
    """The two panels of a run's page as .png."""
    with opened(1280, 900) as page:
        page.goto(source.resolve().as_uri())
        page.wait_for_timeout(2000)
        panels = [page.locator("figure.panel", has_text=words).first for words in PANELS]
        boxes = [panel.bounding_box() for panel in panels]
        if None in boxes:
            raise SystemExit(f"{source}: no figures of accuracy and distance in it")
        left, right = boxes
        box = {
            "x": left["x"] - 8,
            "y": left["y"] - 8,
            "width": right["x"] + right["width"] - left["x"] + 16,
            "height": max(left["height"], right["height"]) + 16,
        }
        page.screenshot(path=path, clip=box, full_page=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--number", type=int, default=1, help="which of a page's figures, from 1")
    options = parser.parse_args()
    if options.picture.suffix == ".png":
        write_panels(options.page, options.picture)
    else:
        write_svg(options.page, options.picture, options.number)


if __name__ == "__main__":
    main()
