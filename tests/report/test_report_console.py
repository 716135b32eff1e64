import io
import re
from dataclasses import replace
from pathlib import Path

from rich.console import Console, RenderableType

from deeplimit.control.cropping import CutChoice
from deeplimit.control.turnpike import TurnpikeProfile
from deeplimit.report import crop_summary, profile_table
from deeplimit.report.console import finished_summary, layer_marks, profile_summary
from deeplimit.tables import shown_depths
from deeplimit.training.results import Finished, RunResults


def printed(renderable: RenderableType) -> str:
    file = io.StringIO()
    Console(width=100, no_color=True, file=file).print(renderable)
    return file.getvalue().replace("\u00a0", " ")


def row_of(text: str, layer: int) -> str:
    return next(line for line in text.splitlines() if re.match(rf"\s*{layer}\s", line))


def test_every_layer_of_a_short_network_is_shown(digits: RunResults) -> None:
    assert digits.profiles is not None
    test = shortened(digits.profiles.test, 12)
    text = printed(profile_table(test, "test"))
    assert "Turnpike on test data, 360 samples" in text
    for n in range(13):
        row = row_of(text, n)
        assert f"{test.loss[n]:.4f}" in row
        assert f"{100 * test.accuracy[n]:.1f} %" in row
        assert f"{test.distance[n]:.3f}" in row
    assert "entry" in row_of(text, test.entry() or 0)
    assert test.recommended_depth < 12
    assert "cut" in row_of(text, test.recommended_depth)
    assert f"δ = {test.radius:.3f}" in text


def test_a_long_network_is_abbreviated_around_its_marks(spirals: RunResults) -> None:
    assert spirals.profiles is not None
    base = spirals.profiles.validation
    long = stretched(base, 300)
    shown = shown_depths(300, *layer_marks(long))
    assert len(shown) < 20
    assert {0, 1, 2, 4, 256, 75, 150, 225, 300, *layer_marks(long)} <= set(shown)
    assert f"{len(shown)} of the layers 0 to 300 are shown" in printed(profile_table(long))


def shortened(profile: TurnpikeProfile, horizon: int) -> TurnpikeProfile:
    names = ("loss", "accuracy", "distance", "loss_error", "accuracy_error")
    fields = {name: getattr(profile, name)[: horizon + 1] for name in names}
    return TurnpikeProfile(
        profile.samples,
        profile.classes,
        profile.softness,
        profile.minimum,
        class_distance=(),
        relative_update=profile.relative_update[:horizon],
        **fields,
    )


def test_a_run_ends_with_every_depth_and_how_to_take_one(
    digits: RunResults,
) -> None:
    assert digits.cut is not None
    assert digits.profiles is not None
    table, depth = digits.profiles.test, digits.cut.report.horizon_after
    assert table.costs is not None
    place = Path("runs/a run")
    text = printed(finished_summary(Finished(place, place / "report.html", digits)))
    lines = text.splitlines()
    assert lines[0].strip() == f"Depth 20 → {depth}"
    for n in {0, 1, 2, 4, 8, 16, 5, 10, 15, 20, depth}:
        row = row_of(text, n)
        assert f"{100 * table.accuracy[n]:.1f} %" in row
        assert f"{table.loss[n]:.4f}" in row
        assert f"{table.costs.parameters[n]:,}" in row
        assert f"{table.costs.multiply_adds[n]:,}" in row
        assert f"{1000 * table.costs.latency[n]:.3f}" in row
        assert ("recommended" in row) == (n == depth)
    assert lines[-2].startswith(f"deeplimit crop '{place}' --to K")
    assert lines[-1].startswith("with at_depth(model, K): …")
    assert "Test accuracy" not in text  # two rows say it
    for other in (
        replace(digits.cut, removed=(3, *digits.cut.removed)),
        replace(digits.cut, removed=digits.cut.removed[:-1]),
    ):
        apart = printed(finished_summary(Finished(place, place, replace(digits, cut=other))))
        assert "Test accuracy" in apart
    given = replace(digits.cut, removed=tuple(range(1, 20)))
    text = printed(finished_summary(Finished(place, place, replace(digits, cut=given))))
    assert "1 cut" in row_of(text, 1)
    assert "recommended" in row_of(text, depth)
    asked = CutChoice(given.removed, "tail", "accuracy", 0.005, (20,), (1,), confidence=0.95)
    tested = replace(digits, cut=replace(given, choice=asked))
    text = printed(finished_summary(Finished(place, place, tested)))
    assert "1 recommended" in row_of(text, 1)


def test_a_profile_shows_validation_data_and_every_depth_on_test_data(digits: RunResults) -> None:
    assert digits.profiles is not None
    text = printed(profile_summary(digits.profiles))
    assert text.index("Turnpike on validation data, 400") < text.index("Every depth on test data")
    assert "deeplimit crop RUN --to K" in text


def stretched(profile: TurnpikeProfile, horizon: int) -> TurnpikeProfile:
    def longer(values: tuple[float, ...], length: int) -> tuple[float, ...]:
        return values + values[-1:] * (length - len(values))

    return replace(
        profile,
        loss=longer(profile.loss, horizon + 1),
        accuracy=longer(profile.accuracy, horizon + 1),
        distance=longer(profile.distance, horizon + 1),
        relative_update=longer(profile.relative_update, horizon),
        loss_error=longer(profile.loss_error, horizon + 1),
        accuracy_error=longer(profile.accuracy_error, horizon + 1),
    )


def test_entry_and_exit_are_absent_without_a_turnpike(digits: RunResults) -> None:
    assert digits.profiles is not None
    test = replace(digits.profiles.test, distance=(5.0,) * 21)
    text = printed(profile_table(test))
    assert "entry" not in text
    assert "exit" not in text


def test_exit_is_marked_where_states_leave_again(digits: RunResults) -> None:
    assert digits.profiles is not None
    test = replace(digits.profiles.test, distance=(5.0,) * 6 + (0.1,) * 10 + (5.0,) * 5)
    text = printed(profile_table(test))
    assert "entry" in row_of(text, 6)
    assert "exit" in row_of(text, 15)


def test_crop_summary_has_both_sides_and_the_control(digits: RunResults) -> None:
    assert digits.cut is not None
    assert digits.reference is not None
    report, plain = digits.cut.report, digits.reference.report
    text = printed(crop_summary(digits.cut, digits.reference))
    assert f"Depth 20 → {report.horizon_after}" in text
    assert f"{100 * report.accuracy_before:.1f} %" in text
    assert f"{report.parameters_before:,}" in text
    assert f"{report.parameters_after:,}" in text
    assert f"{report.parameters_before / report.parameters_after:.1f} × fewer" in text
    assert f"{report.latency_before / report.latency_after:.1f} × faster" in text
    assert "chosen on validation data" in text
    lost = 100 * (plain.accuracy_before - plain.accuracy_after)
    assert f"loses {lost:.1f} points" in " ".join(text.split())
    small = digits.reference.small
    assert small is not None
    scratch = f"trained from scratch without stage cost has {100 * small.accuracy_before:.1f} %"
    assert scratch in " ".join(text.split())
    assert "the cut is better." in text
    words = " ".join(text.split())
    assert f"{report.verdict}." in words
    assert words.index("Unresolved: 360 samples") < words.index("Depth chosen")
    assert "trained on 1,000 samples, chosen on 400 (validation) and judged on 360" in words


def test_crop_summary_says_which_layers_vanished(digits: RunResults) -> None:
    assert digits.cut is not None
    assert digits.profiles is not None
    norms = (3.0, 0.0, 2.0, *[0.0] * 17)
    profiles = replace(digits.profiles, control_norms=norms)
    words = " ".join(printed(crop_summary(digits.cut, None, profiles)).split())
    assert (
        "18 of 20 layers vanished, counted from 1: 2, 4–20; their controls are exactly 0" in words
    )
    assert "vanished" not in printed(crop_summary(digits.cut, None, digits.profiles))


def test_crop_summary_says_why_the_entry_is_not_the_cut(digits: RunResults) -> None:
    assert digits.cut is not None
    assert digits.profiles is not None
    entry, k = digits.profiles.validation.entry(), digits.cut.report.horizon_after
    assert entry != k
    text = " ".join(printed(crop_summary(digits.cut, None, digits.profiles)).split())
    assert f"On validation data the turnpike’s entry is layer {entry}, not the cut’s {k}" in text


def test_crop_summary_says_that_the_control_is_another_cut_s(digits: RunResults) -> None:
    assert digits.cut is not None
    assert digits.reference is not None
    other = replace(digits.reference, removed=digits.cut.removed[1:])
    text = " ".join(printed(crop_summary(digits.cut, other)).split())
    k = other.report.horizon_after
    assert f"another cut, to {k} layers; deeplimit train --resume RUN" in text
    assert "from scratch" not in text
    kept = replace(digits.cut, removed=())  # nothing to compare
    assert "control" not in printed(crop_summary(kept, other))


def test_crop_summary_without_control(spirals: RunResults) -> None:
    assert spirals.cut is not None
    text = printed(crop_summary(spirals.cut))
    assert "given by the user" in text
    assert "without stage cost" not in text
