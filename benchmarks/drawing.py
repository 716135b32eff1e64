"""Figures as files: .html as it is, .svg and .png by way of a Chromium.

Needs playwright (in the extra `dev`) and a Chromium on the path.
"""

import shutil
from pathlib import Path

import plotly.graph_objects as go

DRAW = """Plotly.toImage(document.querySelector('.js-plotly-plot'),
    {format: 'svg', width: %d, height: %d})"""


def write(drawn: go.Figure, path: Path) -> None:
    """In the size of the figure's layout."""
    if path.suffix == ".html":
        drawn.write_html(path, include_plotlyjs=True)
        return
    from playwright.sync_api import sync_playwright

    from picture import BROWSERS, OPTIONS

    size = {"width": drawn.layout.width or 1000, "height": drawn.layout.height or 420}
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=OPTIONS)
        page = browser.new_page(viewport=size)
        page.set_content(drawn.to_html(include_plotlyjs=True, config={"displayModeBar": False}))
        if path.suffix == ".png":
            page.locator(".js-plotly-plot").screenshot(path=path)
        else:
            draw = DRAW % (size["width"], size["height"])
            path.write_text(page.evaluate(f"{draw}.then(u => decodeURIComponent(u.split(',')[1]))"))
        browser.close()
