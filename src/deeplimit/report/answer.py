"""The answer of a run in words and numbers: depth N → k, what it costs, how it was chosen."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from deeplimit.control.cut_choice import CutChoice
from deeplimit.control.depth_table import DepthTable
from deeplimit.control.verdict import CONFIDENCE, FEW, Z
from deeplimit.control.verifying import CropResult
from deeplimit.errors import several
from deeplimit.report import language
from deeplimit.report.numbers import (
    SPACE,
    count,
    layers,
    percent,
    points,
    runs,
    seconds,
    significant,
    times,
)
from deeplimit.training.results import (
    Cut,
    Healing,
    MergedRuns,
    Parts,
    Profiles,
    Reference,
    Refinement,
    RunResults,
)

STANDARD_ERRORS = f"{Z:.3f} standard errors"
APART = (
    " Test data, from which the numbers on this page come unless they say otherwise, took no part "
    "in the choice."
)
ORDERS = {
    "influence": "those that turn the states least went first",
    "update": "those that change the states least went first",
    "tail": "the last went first",
    "turnpike": "those in the tube went first, from its exit back",
    "trial": "by trial, those whose removal changes the answers least went first",
}
TEACHERS = {
    "full": " with the full network as its teacher",
    "beside": " with the full network as its teacher, which learned beside it",
    "none": "",
}
Compared = tuple[str, str, str, str]  # name, before, after, change
Bar = tuple[int, str, float]  # a depth, its test accuracy, and that as a length in percent


def cut_depth(cut: Cut | None, depths: DepthTable | None) -> int | None:
    """The depth that a cut is, where a table of every depth has it; None of another cut."""
    if cut is None or depths is None or depths.costs is None or cut.bridge is not None:
        return None
    depth = depths.horizon - len(cut.removed)
    return depth if cut.removed == tuple(range(depth, depths.horizon)) else None


def every_depth(profiles: Profiles, cut: Cut | None) -> DepthTable:
    """Every depth on test data; with a confidence asked for, the cut's is what is recommended."""
    depths = profiles.test
    depth = cut_depth(cut, depths)
    if depth is None or cut is None or cut.choice is None or cut.choice.confidence is None:
        return depths
    return replace(depths, recommended=depth)


def loss_gained(cut: Cut) -> str:
    """In words, how much the loss might rise."""
    return (
        f"{100 * cut.loss_tolerance:g}{SPACE}% of the loss's range, which reaches from its minimum "
        "to the loss of knowing nothing"
    )


def comparisons(report: CropResult) -> tuple[Compared, ...]:
    """Accuracy or perplexity, loss and the three costs: name, before, after, change."""
    one = "sample" if report.has_accuracy else "window"

    def row(name: str, field: str, text: Callable[[Any], str], less: str, more: str) -> Compared:
        before, after = (getattr(report, f"{field}_{when}") for when in ("before", "after"))
        return name, text(before), text(after), times(before, after, less, more)

    batch = f"{several(report.latency_batch, one)}, {report.device}"
    return (
        *(_quality(report) if report.has_accuracy else language.quality(report)),
        row("Parameters", "parameters", count, "fewer", "more"),
        row(f"Multiply-adds a {one}", "multiply_adds", count, "fewer", "more"),
        row(f"Latency ({batch})", "latency", seconds, "faster", "slower"),
    )


def _quality(report: CropResult) -> tuple[Compared, ...]:
    n, before, after = report.samples, report.loss_before, report.loss_after
    rise = f"{'+' if after > before else ''}{significant(after - before)}{SPACE}nats"
    accuracies = percent(report.accuracy_before, n), percent(report.accuracy_after, n)
    return (
        ("Test accuracy", *accuracies, _change(report)),
        ("Test loss", significant(before), significant(after), rise),
    )


def _change(report: CropResult) -> str:
    difference = report.accuracy_after - report.accuracy_before
    return points(difference, report.samples, report.accuracy_error)


def lead(cut: Cut) -> str:
    """Says what was taken out, and what test data say about it."""
    report = cut.report
    n = report.samples
    if not report.has_accuracy:
        return language.lead(_removed(cut) if cut.removed else "", report)
    before = percent(report.accuracy_before, n)
    if not cut.removed:
        return (
            "No layer was removed. On test data the network of "
            f"{layers(report.horizon_before)} has an accuracy of {before}."
        )
    return (
        f"{_removed(cut)} Accuracy on test data goes from {before} to "
        f"{percent(report.accuracy_after, n)} ({_change(report)}, one standard error), and both "
        f"networks give the same answer for {percent(report.agreement, n)} of "
        f"{several(n, 'test sample')}."
    )


def shortened(metrics: Sequence[Mapping[str, float | None]]) -> str:
    """When a network was cut while it was trained, and how many layers went; empty if none did."""
    depths = [int(row.get("layers") or 0) for row in metrics]
    steps = [
        f"to {after} after epoch {epoch}"
        for epoch, (before, after) in enumerate(itertools.pairwise(depths), 1)
        if after < before
    ]
    if not steps:
        return ""
    return (
        f"While it was trained the network was cut from {layers(depths[0])} {', '.join(steps)}, "
        "each time after the rule had held for as many evaluations as the recipe asks for."
    )


def data_sentence(parts: Parts | None) -> str:
    """Which samples did what."""
    if parts is None:
        return ""
    if parts.tokens is not None:
        return language.data_sentence(parts)
    return (
        f"The networks were trained on {several(parts.train, 'sample')}, chosen on "
        f"{parts.validation:,} (validation) and judged on {several(parts.test, 'other')} (test)."
    )


def _removed(cut: Cut) -> str:
    return f"{_which(cut.removed, cut.report.horizon_before, 'were removed')}."


def _which(numbers: Sequence[int], total: int, verb: str) -> str:
    """Says of which layers something is true, counted from 1."""
    spans = runs(numbers)
    if len(spans) == 1 and spans[0][1] == total - 1:
        which = f"The last {len(numbers)} of" if spans[0][0] else "All"
        return f"{which} {layers(total)} {verb}"
    where = ", ".join(str(a + 1) if a == b else f"{a + 1}–{b + 1}" for a, b in spans)
    return f"{len(numbers)} of {layers(total)} {verb}, counted from 1: {where}"


def vanished_sentence(profiles: Profiles | None) -> str:
    """Says which layers are exactly the identity; nothing where there is none."""
    if profiles is None or not profiles.vanished:
        return ""
    which = _which(profiles.vanished, profiles.test.horizon, "vanished")
    return f"{which}; their controls are exactly 0, and without them every answer stays."


def rule(cut: Cut, profiles: Profiles | None) -> str:
    """Says how the depth was chosen, and on which data."""
    validation = profiles.validation if profiles else None
    if cut.choice is not None:
        return _rule_of(cut, cut.choice)
    if cut.search:
        return (
            "It was searched for: layers were taken out of the last network that was kept, which "
            "was healed with the full one as its teacher, at half the depth, half of that, … for "
            "as long as validation data excluded a loss of more than was allowed, and then between "
            f"the last depth that was kept and the first that was not.{APART}"
        )
    if cut.tolerance is None:
        text = "The depth was given by the user."
        if validation is not None and validation.accuracy:
            chosen, total = validation.recommended_depth, validation.horizon
            text += (
                f" On validation data the first {layers(chosen)} are as good as all."
                if chosen < total
                else " On validation data every smaller number of first layers does worse than all."
            )
        return text + " The numbers on this page come from test data unless they say otherwise."
    lost = f"{several(100 * cut.tolerance, 'point')} of accuracy"
    gained = loss_gained(cut)
    first = f"{sentence} " if (sentence := vanished_sentence(profiles)) else ""
    if not cut.removed and cut.parts is not None and cut.parts.validation < FEW:
        return f"No depth is chosen on fewer than {FEW} validation samples.{few(cut)}"
    if not {*cut.removed} - {*(profiles.vanished if profiles else ())}:
        return first + (
            f"On validation data, with {STANDARD_ERRORS} added, every smaller depth loses more "
            f"than {lost} or raises the loss by more than {gained}. A larger stage cost or longer "
            f"training may change that.{few(cut)}"
        )
    if max(cut.removed) < cut.report.horizon_before - 1:
        return first + (
            "On validation data no smaller depth is as good as the full network, for the states "
            "leave the tube around the minimisers again at the end; so the layers that lie in the "
            "tube, between entry and exit, were taken out. Test data took no part in the choice."
        )
    text = first + (
        f"It is the smallest depth that, on validation data and with {STANDARD_ERRORS} added, "
        f"loses at most {lost} and raises the loss by at most {gained}.{few(cut)}"
    )
    if validation is not None:
        n, total = validation.depth_within(cut.tolerance), validation.horizon
        (accuracy, loss), (accuracy_full, loss_full) = (
            (percent(validation.accuracy[at], validation.samples), significant(validation.loss[at]))
            for at in (n, total)
        )
        text += (
            f" On validation data depth {n} has an accuracy of {accuracy} and a loss of {loss}; "
            f"depth {total} has {accuracy_full} and {loss_full}."
        )
    return text + APART


def _rule_of(cut: Cut, choice: CutChoice) -> str:
    """Says how layers of any place were chosen under a budget."""
    part = f"at most {100 * choice.limit:g}{SPACE}% of the"
    limits = {
        "accuracy": f"a loss of at most {several(100 * choice.limit, 'point')} of accuracy and of "
        f"at most {loss_gained(cut)}"
        + (
            ", with the standard errors of so many trials added"
            if choice.confidence is None
            else ""
        ),
        "rise": language.limit(choice),
        "blocks": f"{layers(int(choice.limit))} to be kept",
        "multiply_adds": f"{part} multiply-adds",
        "latency": f"{part} latency",
    }
    stages = zip(choice.layers_after, choice.layers_before, strict=True)
    said = language.chosen(choice)
    place, sure = " of any place", ""
    if choice.confidence is not None:
        place = "" if choice.score == "tail" else place
        sure = (
            f", with confidence {100 * choice.confidence:g}{SPACE}% whatever the network: each cut "
            "was tested against the full network, up to the first that failed"
        )
    if choice.accuracy_before is not None and choice.accuracy_after is not None:
        before = percent(choice.accuracy_before, choice.samples or 0)
        after = percent(choice.accuracy_after, choice.samples or 0)
        said = f" On validation data accuracy goes from {before} to {after}.{few(cut)}"
    return (
        f"Layers{place} were chosen on validation data, for {limits[choice.budget]}{sure}: "
        f"{ORDERS[choice.score]}. Of the layers of each stage "
        f"{', '.join(f'{after} of {before}' for after, before in stages)} are kept.{said}{APART}"
    )


def path(cut: Cut) -> tuple[tuple[str, ...], list[tuple[str, tuple[str, ...]]]]:
    """The headings, and a row for each depth that a search tried, on validation data."""
    full = cut.search[0].report
    quality = "accuracy" if full.has_accuracy else "perplexity"

    def value(loss: float, accuracy: float) -> str:
        known = full.has_accuracy
        return percent(accuracy, full.samples) if known else language.perplexity(loss)

    first = (str(full.horizon_before), value(full.loss_before, full.accuracy_before), "")
    rows: list[tuple[str, tuple[str, ...]]] = [("", first)]
    for tried in cut.search:
        one, gone = tried.report, tried.removed == cut.removed
        words = (str(one.horizon_after), value(one.loss_after, one.accuracy_after))
        word = "" if one.verdict is None else str(one.verdict.word)
        rows.append(("taken" if gone else "", (*words, word)))
    return ("depth", f"validation {quality}", "verdict"), rows


def entry_apart(cut: Cut, profiles: Profiles | None) -> str:
    """Why the entry is at another layer than a cut of the tail; empty where it is not."""
    depth = cut.report.horizon_after
    if profiles is None or not cut.removed or min(cut.removed) != depth:
        return ""
    if cut.choice is not None or cut.search:
        return ""
    validation = profiles.validation
    entry = validation.entry()
    if entry == depth or not validation.distance:
        return ""
    where = (
        f"turnpike’s entry is layer {entry}, not the cut’s {depth}: from there on the mean distance"
        " to the minimisers is within"
        if entry is not None
        else "turnpike has no entry: at no layer is the mean distance to the minimisers within"
    )
    why = (
        "the depth of the cut was given by the user."
        if cut.tolerance is None
        else "the cut is the smallest depth whose answers are as good within the tolerances."
    )
    radius = f"the radius of the tube, δ{SPACE}={SPACE}{significant(validation.radius)}"
    return f"On validation data the {where} {radius}, while {why}"


def few(cut: Cut) -> str:
    """That the validation data cannot tell what was asked for, and how many samples could."""
    if cut.needed is None or cut.tolerance is None or cut.parts is None:
        return ""
    choice, samples, sure = cut.choice, cut.parts.validation, CONFIDENCE
    if choice is not None and choice.confidence is not None:
        samples, sure = choice.samples or 0, choice.confidence
    return (
        f" So few validation samples, {samples:,}, cannot exclude a loss of "
        f"{several(100 * cut.tolerance, 'point')} at {100 * sure:g} %, not even "
        f"where none of their answers changes; {cut.needed:,} could."
    )


def control_sentences(cut: Cut | None, reference: Reference | None) -> tuple[str, ...]:
    """Says what the same cut costs without stage cost, and its depth reaches from scratch."""
    if cut is None or reference is None or not cut.removed:
        return ()
    report, small = reference.report, reference.small
    if not reference.is_of(cut):
        return (
            f"The control is that of another cut, to {layers(report.horizon_after)}; deeplimit "
            "train --resume RUN, with RUN the run’s folder, trains and measures that of this one.",
        )
    n, lost = report.samples, report.accuracy_before - report.accuracy_after
    said = (
        f"The same network trained without stage cost {'loses' if lost >= 0 else 'gains'} "
        f"{points(abs(lost), n).lstrip('+')} when it is cut to the same depth: from "
        f"{percent(report.accuracy_before, n)} to {percent(report.accuracy_after, n)}."
    )
    return (said,) if small is None else (said, _small(small))


def _small(report: CropResult) -> str:
    """`report` is of the small network, before, and of the cut, after."""
    n, verdict = report.samples, report.verdict
    told = f"{several(n, 'test sample')} {'does' if n == 1 else 'do'} not tell which is better"
    if verdict is not None and verdict.at_most < 0:
        told = "the cut is better"
    elif verdict is not None and verdict.at_least > 0:
        told = "the cut is worse"
    return (
        f"A network of {layers(report.horizon_before)} trained from scratch without stage cost has "
        f"{percent(report.accuracy_before, n)}. The cut less this network: {_change(report)} "
        f"(paired, one standard error); {told}."
    )


def control_rows(cut: Cut | None, reference: Reference | None) -> list[tuple[str, list[Bar]]]:
    """With and without stage cost, before and after the same cut; of the cut's depth at once.

    None where the control is of another cut.
    """
    if cut is None or reference is None or not cut.removed or not reference.is_of(cut):
        return []

    def bar(report: CropResult, depth: int, accuracy: float) -> Bar:
        return depth, percent(accuracy, report.samples), round(100 * accuracy, 2)

    rows = [
        (
            f"{name} stage cost, cut",
            [
                bar(report, report.horizon_before, report.accuracy_before),
                bar(report, report.horizon_after, report.accuracy_after),
            ],
        )
        for name, report in (("With", cut.report), ("Without", reference.report))
    ]
    if (small := reference.small) is not None:
        scratch = bar(small, small.horizon_before, small.accuracy_before)
        rows.append(("Without stage cost, that depth from scratch", [scratch]))
    return rows


def healing_sentence(healing: Healing) -> str:
    """Says what more training recovered, and how far that is from the full network."""
    full, cropped = healing.from_full, healing.from_cropped
    n, who = full.samples, TEACHERS[healing.teacher]
    if not full.has_accuracy:
        return language.healing_sentence(healing, who)
    return (
        f"Trained for {several(healing.epochs, 'epoch')} more{who}, the cut network goes from "
        f"{percent(cropped.accuracy_before, n)} to {percent(cropped.accuracy_after, n)} on test "
        f"data ({_change(cropped)}, one standard error). Against the full "
        f"network's {percent(full.accuracy_before, n)} that is {_change(full)}."
    )


def refinement_sentence(refinement: Refinement) -> str:
    """From which network this one was made, and what that changed."""
    report, trained = refinement.report, refinement.trained
    n, more = report.samples, ""
    if trained is not None:
        epochs = several(refinement.epochs, "epoch")
        more = f", and {percent(trained.accuracy_after, n)} after {epochs} of training from there"
    return (
        f"Refined from {Path(refinement.source).name}: {layers(report.horizon_before)} became "
        f"{report.horizon_after}, test accuracy {percent(report.accuracy_before, n)} became "
        f"{percent(report.accuracy_after, n)}{more}."
    )


def merging_sentence(merging: MergedRuns) -> str:
    """From which networks this one was made, and how well all do."""
    *others, last = merging.names
    n, more = merging.samples, ""
    if merging.averaged is not None:
        more = f"; the average of their parameters has {percent(merging.averaged.accuracy, n)}"
    parents = ", ".join(percent(parent.accuracy, n) for parent in merging.parents)
    return (
        f"Merged from {', '.join(others)} and {last}, whose test accuracies are {parents}: "
        f"{percent(merging.merged.accuracy, n)}{more}."
    )


def waiting(results: RunResults) -> str:
    """Says what is known, and what to do, before a cut was made."""
    done, epochs = len(results.metrics), int(results.recipe.get("epochs", 0))
    if done < epochs:
        return (
            f"The training was stopped after {done} of {several(epochs, 'epoch')}; deeplimit train "
            "--resume goes on with it."
        )
    if results.profiles is None:
        return "The network has been trained; its turnpike has not been looked for yet."
    validation = results.profiles.validation
    depth = validation.recommended_depth
    if not validation.accuracy:
        perplexity = language.perplexity(validation.loss[-1])
        said = f"the model has a perplexity of {perplexity} a token. It"
    elif depth == validation.horizon:
        said = f"every smaller number of first layers does worse than all {depth}. The network"
    else:
        said = (
            f"{layers(depth)} of {validation.horizon} are as good as the full network, within the "
            "tolerances. The network"
        )
    return f"On validation data {said} has not been cut yet."
