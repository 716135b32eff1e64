"""Networks related to that of a run, in words: its control, healed, refined, merged."""

from pathlib import Path

from deeplimit.control.verifying import CropResult
from deeplimit.errors import several
from deeplimit.report.answer import change
from deeplimit.report.numbers import layers, percent, perplexity, points
from deeplimit.training.results import Cut, Healing, MergedRuns, Reference, Refinement

TEACHERS = {
    "full": " with the full network as its teacher",
    "beside": " with the full network as its teacher, which learned beside it",
    "none": "",
}
Bar = tuple[int, str, float]  # a depth, its test accuracy, and that as a length in percent


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
        f"{percent(report.accuracy_before, n)}. The cut less this network: {change(report)} "
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
    text = f"Trained for {several(healing.epochs, 'epoch')} more{who}, the cut network goes from "
    if not full.has_accuracy:
        return (
            f"{text}a perplexity of {perplexity(cropped.loss_before)} to "
            f"{perplexity(cropped.loss_after)} a token on test data. The full network’s is "
            f"{perplexity(full.loss_before)}."
        )
    return (
        f"{text}{percent(cropped.accuracy_before, n)} to {percent(cropped.accuracy_after, n)} on "
        f"test data ({change(cropped)}, one standard error). Against the full network's "
        f"{percent(full.accuracy_before, n)} that is {change(full)}."
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
