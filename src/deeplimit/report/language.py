"""Language models in words and numbers: perplexity, of windows of tokens."""

import math
import re

from deeplimit.control.cut_choice import CutChoice
from deeplimit.control.turnpike import TurnpikeProfile
from deeplimit.control.verdict import Verdict
from deeplimit.control.verifying import CropResult
from deeplimit.errors import several
from deeplimit.report.numbers import SPACE, layers, significant
from deeplimit.training.results import Healing, Parts


def perplexity(loss: float) -> str:
    """exp(loss), the loss in nats a token: among how many tokens the model hesitates."""
    return significant(math.exp(min(loss, 700)))


def higher(before: float, after: float) -> str:
    """By how much a perplexity has risen, or fallen."""
    change = math.expm1(after - before)
    word = "higher" if change > 0 else "lower"
    if change > 1:
        return f"{significant(1 + change)}{SPACE}×{SPACE}as high"
    return "the same" if change == 0 else f"{significant(100 * abs(change))}{SPACE}% {word}"


def quality(report: CropResult) -> tuple[tuple[str, str, str, str], ...]:
    """Says what a cut does to perplexity and loss: name, before, after, change."""
    before, after = report.loss_before, report.loss_after
    change = after - before
    error = "" if report.loss_error is None else f"{SPACE}±{SPACE}{significant(report.loss_error)}"
    rise = f"{'+' if change > 0 else ''}{significant(change)}{error}{SPACE}nats"
    return (
        ("Test perplexity", perplexity(before), perplexity(after), higher(before, after)),
        ("Test loss, nats a token", significant(before), significant(after), rise),
    )


def data_sentence(parts: Parts) -> str:
    """Which windows did what."""
    return (
        f"A sample is a window of {several(parts.tokens or 0, 'token')}. The text’s first "
        f"{several(parts.train, 'window')} are training data; the cut was chosen on the next "
        f"{parts.validation:,} (validation) and judged on the last {parts.test:,} (test)."
    )


def lead(removed: str, report: CropResult) -> str:
    """Says what test data say of a cut; `removed` says which layers went."""
    before, after = report.loss_before, report.loss_after
    on = several(report.samples, "test window")
    if not removed:
        return (
            f"No layer was removed. On {on} the network of {layers(report.horizon_before)} has a "
            f"perplexity of {perplexity(before)} a token."
        )
    return (
        f"{removed} Perplexity a token goes from {perplexity(before)} to {perplexity(after)} on "
        f"{on}, {higher(before, after)}: the loss from {significant(before)} to "
        f"{significant(after)} nats."
    )


def limit(choice: CutChoice) -> str:
    """The budget of a cut that was chosen by the loss."""
    more = significant(100 * math.expm1(choice.limit))
    return (
        f"a rise of the loss by at most {choice.limit:g} nats a token (perplexity {more}{SPACE}% "
        "higher), with the standard errors of so many trials, by windows, added"
    )


def chosen(choice: CutChoice) -> str:
    """Says what the data that chose a cut say of it."""
    if choice.loss_before is None or choice.loss_after is None:
        return ""
    return (
        f" On validation data perplexity goes from {perplexity(choice.loss_before)} to "
        f"{perplexity(choice.loss_after)}."
    )


def healing_sentence(healing: Healing, who: str) -> str:
    """Says what a little more training recovered; `who` taught."""
    full, cropped = healing.from_full, healing.from_cropped
    return (
        f"Trained for {several(healing.epochs, 'epoch')} more{who}, the cut network goes from a "
        f"perplexity of {perplexity(cropped.loss_before)} to {perplexity(cropped.loss_after)} a "
        f"token on test data. The full network’s is {perplexity(full.loss_before)}."
    )


def verdict_sentence(verdict: Verdict) -> str:
    """The verdict in a sentence; on the loss of a language model, whose samples are windows."""
    if verdict.loss is None:
        return str(verdict)
    text = re.sub(r"\bsample(s?)\b", r"window\1", str(verdict)).replace(" -", " −")
    return re.sub(r"by more than −?[\d.e+-]+", r"\g<0> nats a token", text, count=1)


def influence_caption(profile: TurnpikeProfile) -> str:
    """Which layer turns the states least."""
    influence = profile.influence or ()
    if not influence:
        return "The network has no layers."
    least, most = (pick(range(len(influence)), key=influence.__getitem__) for pick in (min, max))
    return (
        f"1 − cos of the states before and after a layer (ShortGPT, arXiv 2403.03853): layer "
        f"{least + 1}, counted from 1, turns them least, layer {most + 1} most."
    )
