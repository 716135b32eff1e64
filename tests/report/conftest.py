"""Results to render, and a browser to render them in."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright
from report_samples import digits_results, spirals_results

from deeplimit.report import render_page, write_page
from deeplimit.training.results import RunResults

CHROMIUM_ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="session")
def digits() -> RunResults:
    return digits_results()


@pytest.fixture(scope="session")
def spirals() -> RunResults:
    return spirals_results()


@pytest.fixture(scope="session")
def digits_page(digits: RunResults) -> str:
    return render_page(digits)


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    names = ("chromium", "chromium-browser", "google-chrome")
    executable = next(filter(None, map(shutil.which, names)), None)
    if executable is None:
        reason = f"no Chromium found: none of {', '.join(names)} is on the path"
        if os.environ.get("DEEPLIMIT_REQUIRE_BROWSER") == "1":
            pytest.fail(f"{reason}, and DEEPLIMIT_REQUIRE_BROWSER=1 asks for one")
        pytest.skip(reason)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=executable, args=list(CHROMIUM_ARGUMENTS)
        )
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def pages(
    digits: RunResults, spirals: RunResults, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Pages on disk, by the name of the run."""
    folder = tmp_path_factory.mktemp("pages")
    return {r.name: write_page(r, folder / f"{r.name}.html") for r in (digits, spirals)}
