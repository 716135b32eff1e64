"""What a change of depth did to a run's network, as a table."""

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from deeplimit.errors import several
from deeplimit.report.answer import comparisons
from deeplimit.report.numbers import percent, significant
from deeplimit.report.verdict import verdict_line
from deeplimit.training.results import Refinement


def refinement_summary(refinement: Refinement) -> RenderableType:
    """The network before and after on test data, and after training where there was any."""
    report, trained = refinement.report, refinement.trained
    title = f"Refined: depth {report.horizon_before} → {report.horizon_after}"
    table = Table(title=Text(title, style="bold"), title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("")
    for name in ("before", "refined", *(["trained"] if trained else [])):
        table.add_column(name, justify="right", no_wrap=True)
    n = report.samples
    more = [] if trained is None else [percent(trained.accuracy_after, n)]
    accuracies = (percent(report.accuracy_before, n), percent(report.accuracy_after, n))
    table.add_row("Test accuracy", *accuracies, *more)
    more = [] if trained is None else [significant(trained.loss_after)]
    losses = (significant(report.loss_before), significant(report.loss_after))
    table.add_row("Test loss", *losses, *more)
    for row in comparisons(report)[2:]:
        table.add_row(row.name, row.before, row.after, *([""] if trained else []))
    table.add_row("Same class", "", percent(report.agreement, n), *([""] if trained else []))
    lines = verdict_line((trained or report).verdict)
    return Group(table, *lines, Text(_note(refinement), style="dim"))


def _note(refinement: Refinement) -> str:
    samples = several(refinement.report.samples, "test sample")
    if not refinement.epochs:
        return f"{samples}; not trained since."
    state = "with the optimiser's state" if refinement.carried else "with a new optimiser"
    return f"{samples}; trained for {several(refinement.epochs, 'epoch')} from there, {state}."
