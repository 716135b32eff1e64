"""Tables for the terminal: a turnpike profile, and what a change of depth changed."""

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from shlex import quote

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from deeplimit.control.depth_table import RECOMMENDED, DepthTable
from deeplimit.control.turnpike import TurnpikeProfile
from deeplimit.control.verdict import Verdict, Word
from deeplimit.errors import several
from deeplimit.report import answer
from deeplimit.report.numbers import SPACE, percent, perplexity, significant
from deeplimit.report.related import control_sentences, healing_sentence
from deeplimit.tables import shown_depths
from deeplimit.training.results import Cut, Finished, Healing, Profiles, Reference, Refinement
from deeplimit.training.verifying import Verification

COLOURS = {"kept": "green", "unresolved": "yellow", "lost": "red", "nothing learnt": "red"}


def table(
    headings: Sequence[str],
    rows: Iterable[Sequence[str | Text]],
    title: str = "",
    *,
    left: Collection[str] = ("",),
    bold: str = "after",
) -> Table:
    """Columns of numbers; those of `left` are of words, the one called `bold` is what counts."""
    heading = Text(title, style="bold") if title else None
    made = Table(title=heading, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    made.padding = (0, 1, 0, 0)
    for name in headings:
        words, style = name in left, "bold" if name == bold else ""
        made.add_column(name, justify="left" if words else "right", no_wrap=not words, style=style)
    for row in rows:
        made.add_row(*row)
    return made


def answered(answer: str, *parts: RenderableType, note: str = "") -> RenderableType:
    """The answer in bold, what shows it, and what was measured in grey."""
    first = [Text(answer, style="bold")] if answer else []
    return Group(*first, *parts, *([Text(note, style="dim")] if note else []))


def profile_table(profile: TurnpikeProfile, data: str = "validation") -> RenderableType:
    """Loss, accuracy, distance and update of every layer; entry, exit and cut are marked.

    Of a long network some layers are shown (`shown_depths`), and those at the marks; of a language
    model perplexity and influence in place of accuracy and distance.

    Args:
        profile: of a network.
        data: the name of the data that it was measured on.
    """
    marks = layer_marks(profile)
    shown = shown_depths(profile.horizon, *marks)
    update = [*(f"{significant(100 * u)}{SPACE}%" for u in profile.relative_update), ""]
    columns: dict[str, Sequence[str | Text]] = {
        "layer": [str(n) for n in range(profile.horizon + 1)],
        "loss": [f"{loss:.4f}" for loss in profile.loss],
    }
    if profile.accuracy:
        title = f"Turnpike on {data} data, {several(profile.samples, 'sample')}"
        columns["accuracy"] = [percent(a, profile.samples) for a in profile.accuracy]
        columns["distance"] = [
            Text(f"{d:.3f}", style="green" if d <= profile.radius else "") for d in profile.distance
        ]
        columns["update"] = update
        columns[""] = [Text(", ".join(marks.get(n, ())), "cyan") for n in range(len(update))]
        note = (
            f"Loss in nats (minimum {profile.minimum:.4f}); distance to the minimisers, in the "
            f"tube up to δ{SPACE}={SPACE}{profile.radius:.3f}; update by the next layer."
        )
        if len(shown) <= profile.horizon:
            note += f" {len(shown)} of the layers 0 to {profile.horizon} are shown."
    else:
        title = f"Layers on {data} data, {several(profile.samples, 'window')}"
        columns["perplexity"] = [*map(perplexity, profile.loss)]
        columns["update"] = update
        columns["influence"] = [*map(significant, profile.influence or ()), ""]
        note = "Loss in nats a token; update and influence (1 − cos) are of the next layer."
    made = table(list(columns), ([column[n] for column in columns.values()] for n in shown), title)
    for row, n in zip(made.rows, shown, strict=True):
        row.style = "bold" if n in marks and profile.accuracy else None
    return answered("", made, note=note)


def layer_marks(profile: TurnpikeProfile) -> dict[int, list[str]]:
    """Names layers: the entry, the exit where it is not N, the depth to cut to."""
    places = {"entry": profile.entry(), "exit": profile.exit(), "cut": profile.recommended_depth}
    marks: dict[int, list[str]] = {}
    for word, n in places.items():
        if n is not None and (word == "entry" or n < profile.horizon):
            marks.setdefault(n, []).append(word)
    return marks


def depth_summary(depths: DepthTable, run: str | Path, cut: Cut | None = None) -> RenderableType:
    """Every depth on test data, the recommended one in bold, and how to take one of a run."""
    lines = depths.lines(answer.cut_depth(cut, depths), perplexity=not depths.accuracy)
    rows = [Text(one, "bold" if f" {RECOMMENDED} " in one else "") for one in lines]
    title = f"Every depth on test data, {several(depths.samples, 'sample')}"
    return Group(
        Text(title, style="bold"),
        *rows,
        Text(f"{depths.note()}.", style="dim"),
        Text(f"deeplimit crop {quote(str(run))} --to K   keeps the first K layers"),
        Text("with at_depth(model, K): …   stops there, in Python; nothing is copied"),
    )


def profile_summary(profiles: Profiles, run: str | Path = "RUN") -> RenderableType:
    """The profile on validation data, on which depths are chosen, and every depth on test data."""
    return Group(profile_table(profiles.validation), Text(), depth_summary(profiles.test, run))


def finished_summary(finished: Finished) -> RenderableType:
    """Shows what came of a run: its cut, and every depth that it may be used at."""
    results, parts = finished.results, []
    cut, profiles = results.cut, results.profiles
    if cut is not None:
        shown = crop_summary(cut, results.reference, profiles, apart=False)
        parts += [answered("", shown, note=answer.shortened(results.metrics)), Text()]
    if profiles is not None:
        parts.append(depth_summary(answer.every_depth(profiles, cut), finished.run, cut))
    return Group(*parts)


def verification_lines(found: Verification) -> RenderableType:
    """A line for each file."""
    return Group(*(Text(f"{file.state:8} {file.name}") for file in found.files))


def crop_summary(
    cut: Cut,
    reference: Reference | None = None,
    profiles: Profiles | None = None,
    *,
    apart: bool = True,
) -> RenderableType:
    """Before and after on test data, why the entry is elsewhere, and the control.

    Where it does not stand `apart` from a table of every depth that has the cut in it, the figures
    are left to that.
    """
    report = cut.report
    rows = answer.comparisons(report)
    if report.has_accuracy:
        agreement = percent(report.agreement, report.samples)
        rows = (*rows, ("Agreement", "", agreement, "same class"))
    title = f"Depth {report.horizon_before} → {report.horizon_after}"
    made: RenderableType = table(
        ("", "before", "after", "change"), rows, title, left=("", "change")
    )
    if not apart and profiles and answer.cut_depth(cut, profiles.test) is not None:
        made = Text(title, style="bold")
    chosen = cut.tolerance is not None or cut.choice is not None
    how = "chosen on validation data" if chosen else "given by the user"
    parts: list[RenderableType] = [made]
    if cut.search:
        how = "searched for on validation data, healed on the way"
        headings, tried = answer.path(cut)
        steps = [(*cells[:-1], ", ".join(filter(None, (cells[-1], mark)))) for mark, cells in tried]
        parts.append(table(headings, steps, "The path of the search", left=("verdict",)))
    tested = several(report.samples, "test sample" if report.has_accuracy else "test window")
    notes = [
        f"Depth {how}; {tested}.",
        f"{answer.data_sentence(cut.parts)}{answer.few(cut)}",
        answer.vanished_sentence(profiles),
        cut.choice and f"On validation data: {cut.choice}.",
        cut.bridge and f"On training data: {cut.bridge}.",
        answer.entry_apart(cut, profiles),
    ]
    lines = [*verdict_line(report.verdict), *(Text(note, style="dim") for note in notes if note)]
    return Group(*parts, *lines, *map(Text, control_sentences(cut, reference)))


def healing_summary(healing: Healing) -> RenderableType:
    """The full network, the cut one and the healed one on test data."""
    full, cropped = healing.from_full, healing.from_cropped
    accuracies = (full.accuracy_before, cropped.accuracy_before, full.accuracy_after)
    losses = (full.loss_before, cropped.loss_before, full.loss_after)
    if full.has_accuracy:
        rows = [
            ("Test accuracy", *(percent(accuracy, full.samples) for accuracy in accuracies)),
            ("Test loss", *map(significant, losses)),
            ("Agreement with full", "", "", percent(full.agreement, full.samples)),
        ]
    else:
        rows = [
            ("Test perplexity", *map(perplexity, losses)),
            ("Test loss, nats a token", *map(significant, losses)),
        ]
    title = f"Healed: depth {full.horizon_before} → {full.horizon_after}"
    made = table(("", "full", "cut", "healed"), rows, title, bold="healed")
    return Group(made, *verdict_line(full.verdict), Text(healing_sentence(healing)))


def refinement_summary(refinement: Refinement) -> RenderableType:
    """The network before and after on test data, and after training where there was any."""
    report, trained = refinement.report, refinement.trained
    n, agreement = report.samples, percent(report.agreement, report.samples)
    (_, *accuracy, _), (_, *loss, _), *costs = answer.comparisons(report)
    if trained is not None:
        accuracy.append(percent(trained.accuracy_after, n))
        loss.append(significant(trained.loss_after))
    rows = [("Test accuracy", *accuracy), ("Test loss", *loss)]
    rows += [row[:3] for row in costs]
    headings = ("", "before", "refined", *(["trained"] if trained else []))
    title = f"Refined: depth {report.horizon_before} → {report.horizon_after}"
    made = table(headings, [*rows, ("Same class", "", agreement)], title)
    note = f"{several(n, 'test sample')}; not trained since."
    if refinement.epochs:
        state = "with the optimiser's state" if refinement.carried else "with a new optimiser"
        epochs = several(refinement.epochs, "epoch")
        note = f"{several(n, 'test sample')}; trained for {epochs} from there, {state}."
    return answered("", made, *verdict_line((trained or report).verdict), note=note)


def verdict_line(verdict: Verdict | None) -> list[Text]:
    """The verdict, its word in a colour too; nothing where there is none."""
    if verdict is None:
        return []
    _, rest = answer.verdict_sentence(verdict).split(":", 1)
    return [Text.assemble(worded(verdict.word), f":{rest}.")]


def worded(word: Word) -> tuple[str, str]:
    """The word as it begins a sentence, and its style."""
    return word.capitalize(), f"bold {COLOURS[word]}"
