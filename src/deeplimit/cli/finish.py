"""What follows a training: profile, automatic cut, page, and a summary with the answer first."""

from dataclasses import dataclass
from pathlib import Path

from rich.console import RenderableType

from deeplimit.cli.output import emit, is_first_process
from deeplimit.report import crop_summary, profile_table, write_page
from deeplimit.training import RunFolder, crop_run, profile_run, run_data
from deeplimit.training.results import RunResults

PAGE = "report.html"


@dataclass(frozen=True)
class Finished:
    """What train, demo and report print as JSON.

    Attributes:
        run: the run folder.
        page: its page.
        results: all results in the folder.
    """

    run: Path
    page: Path
    results: RunResults


def finish(folder: RunFolder, *, json: bool) -> None:
    """Profiles and cuts a trained network where that was not done yet, writes the page, reports.

    Only in the first process: the others are done when training is.
    """
    if not is_first_process():
        return
    try:
        if folder.profiles() is None or folder.cut() is None:
            data = run_data(folder)
            if folder.profiles() is None:
                profile_run(folder, data=data)
            crop_run(folder, "auto", data=data)
        show(folder, json=json)
    except KeyboardInterrupt:
        going_on = f"deeplimit train --resume {folder.path} goes on"
        raise KeyboardInterrupt(f"stopped after the training; {going_on}") from None


def show(folder: RunFolder, *, json: bool) -> None:
    """Writes the page from what is in the folder, and prints the answer and where the page is."""
    results = folder.results()
    page = write_page(results, folder.path / PAGE)
    shown: list[RenderableType] = []
    if results.cut is not None:
        shown.append(crop_summary(results.cut, results.reference))
    elif results.profiles is not None:
        shown.append(profile_table(results.profiles.validation))
    emit(Finished(folder.path, page, results), *shown, _page_line(page), json=json)


def renew_page(folder: RunFolder) -> str:
    """Writes the page from what is in the folder; says where it is."""
    return _page_line(write_page(folder.results(), folder.path / PAGE))


def _page_line(page: Path) -> str:
    return f"The page is at {page.resolve()}"
