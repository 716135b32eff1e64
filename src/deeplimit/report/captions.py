"""What to see in each figure, in a sentence with the run's own numbers."""

from collections.abc import Sequence

from deeplimit.control.projection import TrajectoryPicture
from deeplimit.control.turnpike import TurnpikeProfile
from deeplimit.errors import several
from deeplimit.report.figures.classes import class_entry, slowest_first
from deeplimit.report.figures.training import Row
from deeplimit.report.numbers import layers, percent, points, significant
from deeplimit.training.results import Cut, Profiles, Reference

STILL = 0.01  # a relative update below which a layer hardly moves the state


def loss_caption(profiles: Profiles, cut: Cut | None, log: bool) -> str:
    """The fall of the loss, and how little is left after the layer of interest."""
    test = profiles.test
    n = _interesting(profiles.validation, cut)
    if not log:
        more = test.horizon - n
        rest = f"; the remaining {layers(more)} take it to {significant(test.loss[-1])}"
        return (
            f"Test loss falls from {significant(test.loss[0])} at the input to "
            f"{significant(test.loss[n])} at layer {n}{rest if more else ''}. The dotted line "
            "is the least value that the soft cross-entropy can take."
        )
    left, left_at_end, train, train_at_end = (
        significant(profile.loss[at] - profile.minimum)
        for profile in (test, profiles.train)
        for at in (n, test.horizon)
    )
    return (
        f"What is left to gain on test data: {left} nats above the minimum at layer {n}, "
        f"{left_at_end} at layer {test.horizon}; on training data {train} and {train_at_end}. "
        "Where a line is flat, layers gain nothing."
    )


def accuracy_caption(profiles: Profiles, cut: Cut | None, reference: Reference | None) -> str:
    """Accuracy read out at the layer of interest, against the network without stage cost."""
    test = profiles.test
    n = _interesting(profiles.validation, cut)
    text = (
        f"Read out after layer {n}, the network is right on "
        f"{percent(test.accuracy[n], test.samples)} of the test samples; after all "
        f"{test.horizon}, on {percent(test.accuracy[-1], test.samples)}."
    )
    if reference is not None and n <= reference.test.horizon:
        there = percent(reference.test.accuracy[n], reference.test.samples)
        text += f" Trained without stage cost, it is right on {there} there."
    return text


def distance_caption(profiles: Profiles) -> str:
    """When the tube is entered, left, or missed; on validation data."""
    validation = profiles.validation
    radius = significant(validation.radius)
    entry, leaving = validation.entry(), validation.exit()
    if entry is None or leaving is None:
        return (
            f"On validation data no layer lies in the tube of radius δ = {radius}: the smallest "
            f"mean distance to the minimisers is {significant(min(validation.distance))}. There is "
            "no turnpike at this radius."
        )
    text = (
        f"On validation data the states stay in the tube of radius δ = {radius} around the "
        f"minimisers from layer {entry}, the entry, to layer {leaving}: this stretch is the "
        "turnpike."
    )
    if leaving < validation.horizon:
        text += f" After layer {leaving}, the exit, they leave it again."
    outside = validation.outside()
    return text + f" Of layers 0 to {validation.horizon}, {outside} lie outside the tube."


def update_caption(profiles: Profiles) -> str:
    """From where on layers hardly move the state."""
    updates = profiles.test.relative_update
    if not updates:
        return "The network has no layers."
    still = len(updates)
    while still > 0 and updates[still - 1] < STILL:
        still -= 1
    start = f"On test data the first layer moves the state by {percent(updates[0])} of its length"
    if still == len(updates):
        return f"{start}, the last still by {percent(updates[-1])}."
    return (
        f"{start}; from layer {still} on none moves it by as much as {percent(STILL)}: "
        "such layers do next to nothing and can be left out."
    )


def class_caption(profile: TurnpikeProfile, class_names: Sequence[str]) -> str:
    """The last and the first class to stay in the tube."""
    order = slowest_first(profile)
    if not order:
        return "No class has samples."
    slow, fast = order[0], order[-1]
    entry = class_entry(profile, slow)
    if entry is None:
        last = significant(profile.class_distance[-1][slow])
        outside = sum(class_entry(profile, label) is None for label in order)
        return (
            f"On test data {outside} of {len(order)} classes end{'s' if outside == 1 else ''} "
            f"outside the tube at layer {profile.horizon}; furthest is "
            f"“{class_names[slow]}”, at a distance of {last}."
        )
    if class_entry(profile, fast) == entry:
        return f"On test data all {len(order)} classes are in the tube from layer {entry} on."
    return (
        f"On test data “{class_names[fast]}” stays in the tube from layer "
        f"{class_entry(profile, fast)} on, “{class_names[slow]}”, the last, from layer {entry}."
    )


def states_caption(
    picture: TrajectoryPicture, of: int, leaving: int, validation: TurnpikeProfile | None
) -> str:
    """What moves, and where to.

    `of` is the number of samples before thinning, `leaving` how many of those shown leave the view.
    """
    shown = len(picture.labels)
    which = several(of, "test sample")
    which = which if shown == of else f"{shown:,} of {which}"
    entry = None if validation is None else validation.entry()
    there = ""
    if entry is not None:
        there = f" From layer {entry}, the entry on validation data, they are close on average."
    if leaving:
        there += f" On their way {leaving} of them leave the view."
    if picture.plane == "state":
        return (
            f"Each point is one of {which}; the line of its colour is where the loss of its class "
            f"is least.{there}"
        )
    return (
        f"Each point is one of {which}; the ring of its colour is where the loss of its class is "
        f"least.{there} The two axes show {percent(picture.explained)} of the variance of the "
        "logits: classes that look close here may be far apart in other directions."
    )


def training_caption(metrics: Sequence[Row], measure: str, samples: int) -> str:
    """Where training ended."""
    last = metrics[-1]
    epochs = f"After {several(len(metrics), 'epoch')}"
    if measure == "entry":
        entry = last.get("entry")
        if entry is None:
            return f"{epochs} no layer is in the tube, on validation data."
        return f"{epochs} the entry is layer {entry:g}, on validation data."
    ours, other = last.get(measure), last.get(f"validation_{measure}")
    if ours is None or other is None:
        return f"{epochs}."
    if measure == "accuracy":
        return (
            f"{epochs} accuracy is {percent(ours, samples)} on training and "
            f"{percent(other, samples)} on validation data, "
            f"{points(other - ours, samples)} apart."
        )
    return (
        f"{epochs} the loss is {significant(ours)} on training and {significant(other)} on "
        "validation data."
    )


def _interesting(profile: TurnpikeProfile, cut: Cut | None) -> int:
    """The layer to talk about: where the network was cut, or the entry."""
    if cut is not None and cut.removed:
        return min(cut.removed)
    entry = profile.entry()
    return profile.recommended_depth if entry is None else entry
