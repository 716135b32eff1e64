"""The picture of the README: two figures of a run's page, as a browser draws them.

    python benchmarks/picture.py runs/demo/report.html docs/turnpike.png

Needs playwright (in the extra `dev`) and a Chromium on the path.
"""

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path)
    options = parser.parse_args()
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=OPTIONS)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto(options.page.resolve().as_uri())
        page.wait_for_timeout(2000)
        left = page.locator("figure.panel", has_text="Accuracy").first.bounding_box()
        right = page.locator("figure.panel", has_text="Distance to the minimisers").bounding_box()
        if left is None or right is None:
            raise SystemExit(f"{options.page}: no figures of accuracy and distance in it")
        box = {
            "x": left["x"] - 8,
            "y": left["y"] - 8,
            "width": right["x"] + right["width"] - left["x"] + 16,
            "height": max(left["height"], right["height"]) + 16,
        }
        page.screenshot(path=options.picture, clip=box, full_page=True)
        browser.close()


if __name__ == "__main__":
    main()
