"""The control of a cut in words and numbers: the same networks without stage cost."""

from dataclasses import dataclass

from deeplimit.control.verifying import CropResult
from deeplimit.errors import several
from deeplimit.report.numbers import layers, percent, points
from deeplimit.training.results import Cut, Reference


@dataclass(frozen=True)
class ControlBar:
    """The test accuracy of one network, as text and as the length of a bar in percent."""

    depth: int
    text: str
    length: float


@dataclass(frozen=True)
class ControlRow:
    """One training of the control experiment, and what came of it."""

    name: str
    bars: tuple[ControlBar, ...]


def control_sentences(cut: Cut | None, reference: Reference | None) -> tuple[str, ...]:
    """What the same cut costs without stage cost, and what its depth reaches from scratch."""
    if cut is None or reference is None or not cut.removed:
        return ()
    if not reference.is_of(cut):
        depth = layers(reference.report.horizon_after)
        return (
            f"The control is that of another cut, to {depth}; deeplimit train --resume RUN, with "
            "RUN the run’s folder, trains and measures that of this one.",
        )
    said = _plain_cut(reference.report)
    return (said,) if reference.small is None else (said, _small(reference.small))


def control_rows(cut: Cut | None, reference: Reference | None) -> tuple[ControlRow, ...]:
    """With and without stage cost, before and after the same cut; of the cut's depth at once.

    None where the control is of another cut.
    """
    if cut is None or reference is None or not cut.removed or not reference.is_of(cut):
        return ()
    rows = [
        ControlRow(name, (_bar(report, before=True), _bar(report, before=False)))
        for name, report in (
            ("With stage cost, cut", cut.report),
            ("Without stage cost, cut", reference.report),
        )
    ]
    if reference.small is not None:
        small = _bar(reference.small, before=True)
        rows.append(ControlRow("Without stage cost, that depth from scratch", (small,)))
    return tuple(rows)


def _plain_cut(report: CropResult) -> str:
    n = report.samples
    lost = report.accuracy_before - report.accuracy_after
    verb = "loses" if lost >= 0 else "gains"
    amount = points(abs(lost), n).lstrip("+")
    return (
        f"The same network trained without stage cost {verb} {amount} when it is cut to the same "
        f"depth: from {percent(report.accuracy_before, n)} to {percent(report.accuracy_after, n)}."
    )


def _small(report: CropResult) -> str:
    """`report` is of the small network, before, and of the cut, after."""
    n = report.samples
    difference, error = report.accuracy_after - report.accuracy_before, report.accuracy_error
    told = f"{several(n, 'test sample')} {'does' if n == 1 else 'do'} not tell which is better"
    if report.verdict is not None and report.verdict.at_most < 0:
        told = "the cut is better"
    elif report.verdict is not None and report.verdict.at_least > 0:
        told = "the cut is worse"
    return (
        f"A network of {layers(report.horizon_before)} trained from scratch without stage cost has "
        f"{percent(report.accuracy_before, n)}. The cut less this network: "
        f"{points(difference, n, error)} (paired, one standard error); {told}."
    )


def _bar(report: CropResult, *, before: bool) -> ControlBar:
    depth = report.horizon_before if before else report.horizon_after
    accuracy = report.accuracy_before if before else report.accuracy_after
    return ControlBar(depth, percent(accuracy, report.samples), round(100 * accuracy, 2))
