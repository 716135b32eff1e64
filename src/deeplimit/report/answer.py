"""The answer of a run in words and numbers: depth N → k, what it costs, how it was chosen.

A language model is told by its perplexity, on windows of tokens.
"""

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from deeplimit.control.cropping import CutChoice
from deeplimit.control.depth_table import DepthTable
from deeplimit.control.verdict import CONFIDENCE, FEW, Verdict, Z
from deeplimit.control.verifying import CropResult
from deeplimit.errors import several
from deeplimit.report.numbers import (
    SPACE,
    count,
    higher,
    layers,
    percent,
    perplexity,
    points,
    runs,
    seconds,
    significant,
    times,
)
from deeplimit.training.results import Cut, Parts, Profiles, RunResults

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
Compared = tuple[str, str, str, str]  # name, before, after, change


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
    batch = f"{several(report.latency_batch, one)}, {report.device}"

    def row(name: str, field: str, text: Callable[[Any], str], less: str, more: str) -> Compared:
        before, after = (getattr(report, f"{field}_{when}") for when in ("before", "after"))
        return name, text(before), text(after), times(before, after, less, more)

    return (
        *_quality(report),
        row("Parameters", "parameters", count, "fewer", "more"),
        row(f"Multiply-adds a {one}", "multiply_adds", count, "fewer", "more"),
        row(f"Latency ({batch})", "latency", seconds, "faster", "slower"),
    )


def _quality(report: CropResult) -> tuple[Compared, Compared]:
    n, before, after = report.samples, report.loss_before, report.loss_after
    losses = significant(before), significant(after)
    rise = f"{'+' if after > before else ''}{significant(after - before)}"
    if report.has_accuracy:
        accuracies = percent(report.accuracy_before, n), percent(report.accuracy_after, n)
        first = ("Test accuracy", *accuracies, change(report))
        return first, ("Test loss", *losses, f"{rise}{SPACE}nats")
    if report.loss_error is not None:
        rise += f"{SPACE}±{SPACE}{significant(report.loss_error)}"
    first = ("Test perplexity", perplexity(before), perplexity(after), higher(before, after))
    return first, ("Test loss, nats a token", *losses, f"{rise}{SPACE}nats")


def change(report: CropResult) -> str:
    """What accuracy gains or loses, with its standard error."""
    difference = report.accuracy_after - report.accuracy_before
    return points(difference, report.samples, report.accuracy_error)


def lead(cut: Cut) -> str:
    """Says what was taken out, and what test data say about it."""
    report, known = cut.report, cut.report.has_accuracy
    n, before, after = report.samples, report.loss_before, report.loss_after
    on, first = several(n, f"test {'sample' if known else 'window'}"), layers(report.horizon_before)
    accuracy, full = percent(report.accuracy_before, n), perplexity(before)
    if not cut.removed and known:
        return (
            f"No layer was removed. On test data the network of {first} has an accuracy of "
            f"{accuracy}."
        )
    if not cut.removed:
        return (
            f"No layer was removed. On {on} the network of {first} has a perplexity of {full} a "
            "token."
        )
    gone = f"{_which(cut.removed, report.horizon_before, 'were removed')}."
    if not known:
        return (
            f"{gone} Perplexity a token goes from {full} to {perplexity(after)} on {on}, "
            f"{higher(before, after)}: the loss from {significant(before)} to "
            f"{significant(after)} nats."
        )
    return (
        f"{gone} Accuracy on test data goes from {accuracy} to "
        f"{percent(report.accuracy_after, n)} ({change(report)}, one standard error), and both "
        f"networks give the same answer for {percent(report.agreement, n)} of {on}."
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
        return (
            f"A sample is a window of {several(parts.tokens, 'token')}. The text’s first "
            f"{several(parts.train, 'window')} are training data; the cut was chosen on the next "
            f"{parts.validation:,} (validation) and judged on the last {parts.test:,} (test)."
        )
    return (
        f"The networks were trained on {several(parts.train, 'sample')}, chosen on "
        f"{parts.validation:,} (validation) and judged on {several(parts.test, 'other')} (test)."
    )


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
        "rise": f"a rise of the loss by at most {choice.limit:g} nats a token (perplexity "
        f"{significant(100 * math.expm1(choice.limit))}{SPACE}% higher), with the standard errors "
        "of so many trials, by windows, added",
        "blocks": f"{layers(int(choice.limit))} to be kept",
        "multiply_adds": f"{part} multiply-adds",
        "latency": f"{part} latency",
    }
    stages = zip(choice.layers_after, choice.layers_before, strict=True)
    said, place, sure = "", " of any place", ""
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
    elif choice.loss_before is not None and choice.loss_after is not None:
        before, after = perplexity(choice.loss_before), perplexity(choice.loss_after)
        said = f" On validation data perplexity goes from {before} to {after}."
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
        return percent(accuracy, full.samples) if known else perplexity(loss)

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
        said = f"the model has a perplexity of {perplexity(validation.loss[-1])} a token. It"
    elif depth == validation.horizon:
        said = f"every smaller number of first layers does worse than all {depth}. The network"
    else:
        said = (
            f"{layers(depth)} of {validation.horizon} are as good as the full network, within the "
            "tolerances. The network"
        )
    return f"On validation data {said} has not been cut yet."


def verdict_sentence(verdict: Verdict) -> str:
    """The verdict in a sentence; on the loss of a language model, whose samples are windows."""
    if verdict.loss is None:
        return str(verdict)
    text = re.sub(r"\bsample(s?)\b", r"window\1", str(verdict)).replace(" -", " −")
    return re.sub(r"by more than −?[\d.e+-]+", r"\g<0> nats a token", text, count=1)
