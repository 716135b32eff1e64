"""What follows a training: profile, automatic cut, control, page, and the answer in short."""

from dataclasses import dataclass
from pathlib import Path

from rich.console import RenderableType

from deeplimit.cli.output import emit
from deeplimit.rank import is_first_process
from deeplimit.report import crop_summary, profile_table, write_page
from deeplimit.training import RunFolder, complete
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
    """Does for a trained run what is left of profile, cut and control; writes the page, reports."""
    complete(folder)
    if is_first_process():
        show(folder, json=json)


def show(folder: RunFolder, *, json: bool) -> None:
    """Writes the page from what is in the folder, and prints the answer and where the page is."""
    with folder.commit() as new:
        results, page = _renewed(new)
    shown: list[RenderableType] = []
    if results.cut is not None:
        shown.append(crop_summary(results.cut, results.reference, results.profiles))
    elif results.profiles is not None:
        shown.append(profile_table(results.profiles.validation))
    emit(Finished(folder.path, page, results), *shown, _page_line(page), json=json)


def renew_page(folder: RunFolder) -> str:
    """Writes the page from what is in the folder; says where it is."""
    with folder.commit() as new:
        return _page_line(_renewed(new)[1])


def _renewed(folder: RunFolder) -> tuple[RunResults, Path]:
    """The page written in an open commit; the results on it, and where it will be."""
    results = folder.results()
    write_page(results, folder.files.place(PAGE))
    return results, folder.path / PAGE


def _page_line(page: Path) -> str:
    return f"The page is at {page.resolve()}"
