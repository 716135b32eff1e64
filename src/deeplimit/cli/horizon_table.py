"""The horizon study for the terminal."""

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from deeplimit.errors import several
from deeplimit.report.console import worded
from deeplimit.report.numbers import significant
from deeplimit.studies import HorizonStudy
from deeplimit.studies.horizon import ADDED


def horizon_table(study: HorizonStudy) -> RenderableType:
    """Layers outside the tube for every depth and seed, and how their number grows."""
    table = Table(title="Layers outside the tube", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("layers N", justify="right")
    for seed in study.seeds:
        table.add_column(f"seed {seed}", justify="right")
    for name in ("mean", "entry", "test accuracy"):
        table.add_column(name, justify="right")
    for depth in study.depths:
        table.add_row(
            str(depth.horizon),
            *map(str, depth.outside),
            f"{depth.mean_outside:.1f}",
            " ".join("–" if entry is None else str(entry) for entry in depth.entry),
            " ".join(f"{100 * accuracy:.1f}" for accuracy in depth.accuracy),
        )
    note = (
        f"{study.data}, step h = {study.step:g}, γ = {study.stage_cost:g} and r = "
        f"{study.control_cost:g} per layer, {several(study.epochs, 'epoch')}; tube δ = "
        f"{significant(study.radius)}; on test data. The runs are in {study.folder}"
    )
    return Group(
        Text(
            f"From {study.depths[0].horizon} to {study.depths[-1].horizon} layers the number "
            f"outside the tube grows by a factor of {study.growth:.2f}.",
            style="bold",
        ),
        *verdict(study),
        table,
        Text(note, style="dim"),
    )


def verdict(study: HorizonStudy) -> list[Text]:
    """The study's verdict in a sentence; nothing for a study made before there was one."""
    if study.verdict is None or study.added is None:
        return []
    why = f"{100 * study.added:.1f} % of the layers added lie outside, mean over the seeds"
    rest = {
        "kept": f"the count stays: {why}, shown to be at most {100 * ADDED:g} % (95 %)",
        "lost": f"the count grows: {why}, shown to be more than {100 * ADDED:g} % (95 %)",
        "unresolved": f"{why}; these seeds do not tell whether it is at most {100 * ADDED:g} %, "
        "more seeds would",
        "nothing learnt": "a network is not shown to be better on test data than always answering "
        "the largest class; train longer",
    }[study.verdict]
    return [Text.assemble(worded(study.verdict), f": {rest}.")]
