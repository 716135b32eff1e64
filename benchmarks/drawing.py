"""Figures as files, drawn by a browser: of a page that a verb or a study wrote, or of a script.

    python benchmarks/drawing.py runs/linear/study.html benchmarks/results/linear.svg
    python benchmarks/drawing.py runs/convergence/study.html map.svg --number 2
    python benchmarks/drawing.py benchmarks/results/depth_needed.json docs/every_depth.png

Needs playwright (in the extra `dev`) and a Chromium on the path.
"""

import argparse
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import plotly.graph_objects as go

from deeplimit.report.style import DASHED, NETWORK, REFERENCE, SOLID, TUBE, line, plain_figure

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
DRAW = """Plotly.toImage(document.querySelectorAll('.js-plotly-plot')[%d],
    {format: 'svg', width: %d, height: %d}).then(u => decodeURIComponent(u.split(',')[1]))"""
WIDTH, HEIGHT = 1000, 420  # where a layout says nothing


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


def every_depth(rows: Sequence[dict[str, Any]], once: str) -> go.Figure:
    """Test accuracy against depth: of one training, an arm's name, and of plain networks.

    Markers are means over the seeds, bars reach from the smallest to the largest.
    """
    drawn = plain_figure("", "depth", "test accuracy, percent")
    whole = max(row["layers"] for row in rows)

    def add(name: str, points: dict[int, list[float]], color: str, dash: str) -> None:
        depths, values = zip(*sorted(points.items()), strict=True)
        means = [100 * fmean(v) for v in values]
        trace = line(depths, means, name, color, dash)
        over = [100 * max(v) - mean for v, mean in zip(values, means, strict=True)]
        under = [mean - 100 * min(v) for v, mean in zip(values, means, strict=True)]
        bars = {"array": over, "arrayminus": under, "thickness": 1, "width": 3}
        drawn.add_trace(trace.update(error_y=bars, mode="lines+markers", marker_size=7))

    def read(arm: str) -> dict[int, list[float]]:
        """The accuracies of all seeds at each depth of an arm's network."""
        own = [row["accuracy"] for row in rows if row["arm"] == arm]
        return {n: list(values) for n, values in enumerate(zip(*own, strict=True)) if n}

    dedicated: dict[int, list[float]] = {}
    for row in rows:
        if row["arm"].startswith("plain"):
            dedicated.setdefault(row["layers"], []).append(row["accuracy"][-1])
    add("one deeplimit training, used at every depth", read(once), NETWORK, SOLID)
    add("plain networks, each trained for its depth", dedicated, TUBE, DASHED)
    add(f"one plain network of {whole} layers, cut", read("plain"), REFERENCE, DASHED)
    drawn.update_xaxes(dtick=1)
    drawn.update_yaxes(range=[45, 101])
    look = {"paper_bgcolor": "white", "plot_bgcolor": "white", "margin_t": 24}
    place = {"x": 0.98, "xanchor": "right", "y": 0.04, "yanchor": "bottom", "orientation": "v"}
    return drawn.update_layout(**look, legend=place, width=820, height=380)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--number", type=int, default=1, help="which of a page's figures, from 1")
    options = parser.parse_args()
    if options.page.suffix == ".json":
        rows = json.loads(options.page.read_text())["runs"]
        write(
            every_depth([r for r in rows if r["data"] == "mazes" and "layers" in r], "square"),
            options.picture,
        )
    else:
        write_svg(options.page, options.picture, options.number)


if __name__ == "__main__":
    main()
