"""The answer of a run in words and numbers: depth N → k, what it costs, how it was chosen."""

from dataclasses import dataclass
from itertools import starmap
from pathlib import Path

from deeplimit.control.cut_choice import CutChoice
from deeplimit.control.verdict import FEW, Z
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
    Refinement,
    RunResults,
)

STANDARD_ERRORS = f"{Z:.3f} standard errors"


def loss_gained(cut: Cut) -> str:
    """In words, how much the loss might rise."""
    return (
        f"{100 * cut.loss_tolerance:g}{SPACE}% of the loss's range, which reaches from its minimum "
        "to the loss of knowing nothing"
    )


@dataclass(frozen=True)
class Comparison:
    """One quantity before and after a cut, as text, and what the change amounts to."""

    name: str
    before: str
    after: str
    change: str


def comparisons(report: CropResult) -> tuple[Comparison, ...]:
    """Accuracy, loss, agreement and the three costs, each before and after."""
    one = "sample" if report.has_accuracy else "window"
    batch = f"{several(report.latency_batch, one)}, {report.device}"
    return (
        *(
            _quality(report)
            if report.has_accuracy
            else starmap(Comparison, language.quality(report))
        ),
        Comparison(
            "Parameters",
            count(report.parameters_before),
            count(report.parameters_after),
            times(report.parameters_before, report.parameters_after, "fewer", "more"),
        ),
        Comparison(
            f"Multiply-adds a {one}",
            count(report.multiply_adds_before),
            count(report.multiply_adds_after),
            times(report.multiply_adds_before, report.multiply_adds_after, "fewer", "more"),
        ),
        Comparison(
            f"Latency ({batch})",
            seconds(report.latency_before),
            seconds(report.latency_after),
            times(report.latency_before, report.latency_after, "faster", "slower"),
        ),
    )


def _quality(report: CropResult) -> tuple[Comparison, ...]:
    n = report.samples
    return (
        Comparison(
            "Test accuracy",
            percent(report.accuracy_before, n),
            percent(report.accuracy_after, n),
            points(report.accuracy_after - report.accuracy_before, n, report.accuracy_error),
        ),
        Comparison(
            "Test loss",
            significant(report.loss_before),
            significant(report.loss_after),
            signed(report.loss_after - report.loss_before) + f"{SPACE}nats",
        ),
    )


def signed(number: float) -> str:
    """A difference with its sign, three significant digits."""
    return ("+" if number > 0 else "") + significant(number)


def lead(cut: Cut) -> str:
    """What was taken out and what test data say about it."""
    report = cut.report
    n = report.samples
    if not report.has_accuracy:
        return language.lead(_removed(cut) if cut.removed else "", report)
    if not cut.removed:
        return (
            "No layer was removed. On test data the network of "
            f"{layers(report.horizon_before)} has an accuracy of "
            f"{percent(report.accuracy_before, n)}."
        )
    change = points(report.accuracy_after - report.accuracy_before, n, report.accuracy_error)
    return (
        f"{_removed(cut)} Accuracy on test data goes from {percent(report.accuracy_before, n)} to "
        f"{percent(report.accuracy_after, n)} ({change}, one standard error), and both networks "
        f"give the same answer for {percent(report.agreement, n)} of {several(n, 'test sample')}."
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
    total = cut.report.horizon_before
    spans = runs(cut.removed)
    first, last = spans[0]
    if len(spans) == 1 and last == total - 1:
        which = f"The last {len(cut.removed)} of" if first else "All"
        return f"{which} {layers(total)} were removed."
    where = ", ".join(str(a + 1) if a == b else f"{a + 1}–{b + 1}" for a, b in spans)
    return f"{len(cut.removed)} of {layers(total)} were removed, counted from 1: {where}."


def strip(cut: Cut) -> list[dict[str, bool]]:
    """The layers in order, each kept or removed."""
    removed = set(cut.removed)
    return [{"kept": n not in removed} for n in range(cut.report.horizon_before)]


def rule(cut: Cut, profiles: Profiles | None) -> str:
    """How the depth was chosen, and on which data."""
    validation = profiles.validation if profiles else None
    if cut.choice is not None:
        return _rule_of(cut, cut.choice)
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
    if not cut.removed and cut.parts is not None and cut.parts.validation < FEW:
        return f"No depth is chosen on fewer than {FEW} validation samples.{few(cut)}"
    if not cut.removed:
        return (
            f"On validation data, with {STANDARD_ERRORS} added, every smaller depth loses more "
            f"than {lost} or raises the loss by more than {gained}. A larger stage cost or longer "
            f"training may change that.{few(cut)}"
        )
    if max(cut.removed) < cut.report.horizon_before - 1:
        return (
            "On validation data no smaller depth is as good as the full network, for the states "
            "leave the tube around the minimisers again at the end; so the layers that lie in the "
            "tube, between entry and exit, were taken out. Test data took no part in the choice."
        )
    text = (
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
    return text + (
        " Test data, from which the numbers on this page come unless they say otherwise, took no "
        "part in the choice."
    )


def entry_apart(cut: Cut, profiles: Profiles | None) -> str:
    """Why the entry is at another layer than a cut of the tail; empty where it is not."""
    depth = cut.report.horizon_after
    if profiles is None or not cut.removed or min(cut.removed) != depth or cut.choice is not None:
        return ""
    validation = profiles.validation
    entry = validation.entry()
    if entry == depth or not validation.distance:
        return ""
    radius = f"the radius of the tube, δ{SPACE}={SPACE}{significant(validation.radius)}"
    if entry is None:
        text = (
            "On validation data the turnpike has no entry: at no layer is the mean distance to the "
            f"minimisers within {radius}"
        )
    else:
        text = (
            f"On validation data the turnpike’s entry is layer {entry}, not the cut’s {depth}: "
            f"from there on the mean distance to the minimisers is within {radius}"
        )
    if cut.tolerance is None:
        return f"{text}, while the depth of the cut was given by the user."
    return (
        f"{text}, while the cut is the smallest depth whose answers are as good within the "
        "tolerances."
    )


def few(cut: Cut) -> str:
    """That the validation data cannot tell what was asked for, and how many samples could."""
    if cut.needed is None or cut.tolerance is None or cut.parts is None:
        return ""
    return (
        f" So few validation samples, {cut.parts.validation:,}, cannot exclude a loss of "
        f"{several(100 * cut.tolerance, 'point')} at 95 %, not even where none of their answers "
        "changes; "
        f"{cut.needed:,} could."
    )


def _rule_of(cut: Cut, choice: CutChoice) -> str:
    """How layers of any place were chosen under a budget."""
    limits = {
        "accuracy": f"a loss of at most {several(100 * choice.limit, 'point')} of accuracy and of "
        f"at most {loss_gained(cut)}, with the standard errors of so many trials added",
        "rise": language.limit(choice),
        "blocks": f"{layers(int(choice.limit))} to be kept",
        "multiply_adds": f"at most {100 * choice.limit:g}{SPACE}% of the multiply-adds",
        "latency": f"at most {100 * choice.limit:g}{SPACE}% of the latency",
    }
    orders = {
        "influence": "those that turn the states least went first",
        "update": "those that change the states least went first",
        "tail": "the last went first",
        "turnpike": "those in the tube went first, from its exit back",
        "trial": "by trial, those whose removal changes the answers least went first",
    }
    kept = ", ".join(
        f"{after} of {before}"
        for after, before in zip(choice.layers_after, choice.layers_before, strict=True)
    )
    text = (
        f"Layers of any place were chosen on validation data, for {limits[choice.budget]}: "
        f"{orders[choice.score]}. Of the layers of each stage {kept} are kept."
    )
    if choice.accuracy_before is not None and choice.accuracy_after is not None:
        before, after = (
            percent(accuracy, choice.samples or 0)
            for accuracy in (choice.accuracy_before, choice.accuracy_after)
        )
        text += f" On validation data accuracy goes from {before} to {after}.{few(cut)}"
    else:
        text += language.chosen(choice)
    return text + (
        " Test data, from which the numbers on this page come unless they say otherwise, took no "
        "part in the choice."
    )


def healing_sentence(healing: Healing) -> str:
    """What a little more training recovered, and how far that is from the full network."""
    full, cropped = healing.from_full, healing.from_cropped
    n = full.samples
    gained = cropped.accuracy_after - cropped.accuracy_before
    left = full.accuracy_after - full.accuracy_before
    epochs = several(healing.epochs, "epoch")
    who = {
        "full": " with the full network as its teacher",
        "beside": " with the full network as its teacher, which learned beside it",
        "none": "",
    }[healing.teacher]
    if not full.has_accuracy:
        return language.healing_sentence(healing, who)
    return (
        f"Trained for {epochs} more{who}, the cut network goes from "
        f"{percent(cropped.accuracy_before, n)} to {percent(cropped.accuracy_after, n)} on test "
        f"data ({points(gained, n, cropped.accuracy_error)}, one standard error). Against the full "
        f"network's {percent(full.accuracy_before, n)} that is "
        f"{points(left, n, full.accuracy_error)}."
    )


def refinement_sentence(refinement: Refinement) -> str:
    """From which network this one was made, and what that changed."""
    report, trained = refinement.report, refinement.trained
    n = report.samples
    text = (
        f"Refined from {Path(refinement.source).name}: {layers(report.horizon_before)} became "
        f"{report.horizon_after}, test accuracy {percent(report.accuracy_before, n)} became "
        f"{percent(report.accuracy_after, n)}"
    )
    if trained is None:
        return f"{text}."
    epochs = several(refinement.epochs, "epoch")
    return (
        f"{text}, and {percent(trained.accuracy_after, n)} after {epochs} of training from there."
    )


def merging_sentence(merging: MergedRuns) -> str:
    """From which networks this one was made, and how well all do."""
    *others, last = merging.names
    n = merging.samples
    parents = ", ".join(percent(parent.accuracy, n) for parent in merging.parents)
    text = (
        f"Merged from {', '.join(others)} and {last}, whose test accuracies are {parents}: "
        f"{percent(merging.merged.accuracy, n)}"
    )
    if merging.averaged is None:
        return f"{text}."
    return f"{text}; the average of their parameters has {percent(merging.averaged.accuracy, n)}."


def waiting(results: RunResults) -> str:
    """What is known, and what to do, before a cut was made."""
    done, epochs = len(results.metrics), int(results.recipe.get("epochs", 0))
    if done < epochs:
        return (
            f"The training was stopped after {done} of {several(epochs, 'epoch')}; deeplimit train "
            "--resume goes on with it."
        )
    if results.profiles is None:
        return "The network has been trained; its turnpike has not been looked for yet."
    validation = results.profiles.validation
    if not validation.accuracy:
        return (
            f"On validation data the model has a perplexity of "
            f"{language.perplexity(validation.loss[-1])} a token. It has not been cut yet."
        )
    depth = validation.recommended_depth
    if depth == validation.horizon:
        return (
            f"On validation data every smaller number of first layers does worse than all {depth}. "
            "The network has not been cut yet."
        )
    return (
        f"On validation data {layers(depth)} of {validation.horizon} are as good as the full "
        "network, within the tolerances. The network has not been cut yet."
    )
