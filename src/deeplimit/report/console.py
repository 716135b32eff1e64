"""Tables for the terminal: a turnpike profile, and what a change of depth changed."""

import math

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from deeplimit.control.turnpike import TurnpikeProfile
from deeplimit.control.verdict import Verdict, Word
from deeplimit.errors import several
from deeplimit.report.answer import comparisons, data_sentence, entry_apart, few, healing_sentence
from deeplimit.report.control import control_sentences
from deeplimit.report.language import perplexity, verdict_sentence
from deeplimit.report.numbers import SPACE, percent, significant
from deeplimit.training.results import Cut, Finished, Healing, Profiles, Reference, Refinement
from deeplimit.training.verifying import Verification

ROWS = 24  # a longer profile is abbreviated to about so many layers
COLOURS = {"kept": "green", "unresolved": "yellow", "lost": "red", "nothing learnt": "red"}


def profile_table(profile: TurnpikeProfile, data: str = "validation") -> RenderableType:
    """Loss, accuracy, distance and update of every layer; entry, exit and cut are marked.

    Of a long network every k-th layer is shown, and the layers at the marks.

    Args:
        profile: of a network.
        data: the name of the data that it was measured on.
    """
    if not profile.accuracy:
        return _language_table(profile, data)
    table = _table(f"Turnpike on {data} data, {several(profile.samples, 'sample')}")
    for name in ("layer", "loss", "accuracy", "distance", "update"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    marks = layer_marks(profile)
    shown = shown_layers(profile)
    for n in shown:
        inside = profile.distance[n] <= profile.radius
        update = profile.relative_update[n] if n < profile.horizon else None
        table.add_row(
            str(n),
            f"{profile.loss[n]:.4f}",
            percent(profile.accuracy[n], profile.samples),
            Text(f"{profile.distance[n]:.3f}", style="green" if inside else ""),
            "" if update is None else f"{significant(100 * update)}{SPACE}%",
            Text(", ".join(marks.get(n, ())), style="cyan"),
            style="bold" if n in marks else "",
        )
    note = (
        f"Loss in nats (minimum {profile.minimum:.4f}); distance to the minimisers, in the tube up "
        f"to δ{SPACE}={SPACE}{profile.radius:.3f}; update by the next layer."
    )
    if len(shown) <= profile.horizon:
        note += f" {len(shown)} of the layers 0 to {profile.horizon} are shown."
    return Group(table, Text(note, style="dim"))


def _language_table(profile: TurnpikeProfile, data: str) -> RenderableType:
    """Loss, perplexity, and what each layer does to the states."""
    table = _table(f"Layers on {data} data, {several(profile.samples, 'window')}")
    for name in ("layer", "loss", "perplexity", "update", "influence"):
        table.add_column(name, justify="right", no_wrap=True)
    for n in shown_layers(profile):
        after = ("", "")
        if n < profile.horizon and profile.influence is not None:
            update = f"{significant(100 * profile.relative_update[n])}{SPACE}%"
            after = (update, significant(profile.influence[n]))
        loss = profile.loss[n]
        table.add_row(str(n), f"{loss:.4f}", perplexity(loss), *after)
    note = "Loss in nats a token; update and influence (1 − cos) are of the next layer."
    return Group(table, Text(note, style="dim"))


def layer_marks(profile: TurnpikeProfile) -> dict[int, list[str]]:
    """What is to be said of which layer: entry, exit where it is not N, the depth to cut to."""
    marks: dict[int, list[str]] = {}
    entry, leaving = profile.entry(), profile.exit()
    if entry is not None:
        marks.setdefault(entry, []).append("entry")
    if leaving is not None and leaving < profile.horizon:
        marks.setdefault(leaving, []).append("exit")
    if profile.recommended_depth < profile.horizon:
        marks.setdefault(profile.recommended_depth, []).append("cut")
    return marks


def shown_layers(profile: TurnpikeProfile) -> list[int]:
    """All layers of a short network; of a long one every k-th, the last, and those at marks."""
    horizon = profile.horizon
    stride = 1 if horizon <= ROWS else math.ceil(horizon / ROWS)
    near = {n + d for n in layer_marks(profile) for d in (-1, 0, 1)} if stride > 1 else set()
    return sorted(n for n in {*range(0, horizon, stride), horizon, *near} if 0 <= n <= horizon)


def profile_summary(profiles: Profiles) -> RenderableType:
    """The profile on validation data, on which depths are chosen."""
    return profile_table(profiles.validation)


def finished_summary(finished: Finished) -> RenderableType:
    """What came of a run: its cut, or before there is one its profile."""
    results = finished.results
    if results.cut is not None:
        return crop_summary(results.cut, results.reference, results.profiles)
    return Group() if results.profiles is None else profile_summary(results.profiles)


def verification_lines(found: Verification) -> RenderableType:
    """A line for each file."""
    return Group(*(Text(f"{file.state:8} {file.name}") for file in found.files))


def crop_summary(
    cut: Cut, reference: Reference | None = None, profiles: Profiles | None = None
) -> RenderableType:
    """Before and after on test data, why the entry is elsewhere, and the control."""
    report = cut.report
    table = _table(f"Depth {report.horizon_before} → {report.horizon_after}")
    table.add_column("")
    table.add_column("before", justify="right", no_wrap=True)
    table.add_column("after", justify="right", no_wrap=True, style="bold")
    table.add_column("change", no_wrap=True)
    for row in comparisons(report):
        table.add_row(row.name, row.before, row.after, row.change)
    if report.has_accuracy:
        table.add_row("Agreement", "", percent(report.agreement, report.samples), "same class")
    chosen = cut.tolerance is not None or cut.choice is not None
    how = "chosen on validation data" if chosen else "given by the user"
    lines = [*verdict_line(report.verdict)]
    tested = several(report.samples, "test sample" if report.has_accuracy else "test window")
    lines.append(Text(f"Depth {how}; {tested}.", style="dim"))
    if about := f"{data_sentence(cut.parts)}{few(cut)}":
        lines.append(Text(about, style="dim"))
    if cut.choice is not None:
        lines.append(Text(f"On validation data: {cut.choice}.", style="dim"))
    if cut.bridge is not None:
        lines.append(Text(f"On training data: {cut.bridge}.", style="dim"))
    if apart := entry_apart(cut, profiles):
        lines.append(Text(apart, style="dim"))
    lines += map(Text, control_sentences(cut, reference))
    return Group(table, *lines)


def healing_summary(healing: Healing) -> RenderableType:
    """The full network, the cut one and the healed one on test data."""
    full, cropped = healing.from_full, healing.from_cropped
    n = full.samples
    table = _table(f"Healed: depth {full.horizon_before} → {full.horizon_after}")
    for name in ("", "full", "cut"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    table.add_column("healed", justify="right", no_wrap=True, style="bold")
    accuracies = (full.accuracy_before, cropped.accuracy_before, full.accuracy_after)
    losses = (full.loss_before, cropped.loss_before, full.loss_after)
    if full.has_accuracy:
        table.add_row("Test accuracy", *(percent(accuracy, n) for accuracy in accuracies))
        table.add_row("Test loss", *map(significant, losses))
        table.add_row("Agreement with full", "", "", percent(full.agreement, n))
    else:
        table.add_row("Test perplexity", *map(perplexity, losses))
        table.add_row("Test loss, nats a token", *map(significant, losses))
    return Group(table, *verdict_line(full.verdict), Text(healing_sentence(healing)))


def _table(title: str) -> Table:
    return Table(title=Text(title, style="bold"), title_justify="left", box=box.SIMPLE_HEAD)


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


def verdict_line(verdict: Verdict | None) -> list[Text]:
    """The verdict, its word in a colour too; nothing where there is none."""
    if verdict is None:
        return []
    _, rest = verdict_sentence(verdict).split(":", 1)
    return [Text.assemble(worded(verdict.word), f":{rest}.")]


def worded(word: Word) -> tuple[str, str]:
    """The word as it begins a sentence, and its style."""
    return word.capitalize(), f"bold {COLOURS[word]}"
