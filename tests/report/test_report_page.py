import html
import os
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
from report_samples import verdict

from deeplimit.control.turnpike import ACCURACY_TOLERANCE
from deeplimit.control.verdict import LOSS_TOLERANCE
from deeplimit.errors import RunError
from deeplimit.report import render_page, write_page
from deeplimit.report.numbers import count, layers, percent, points, seconds, significant
from deeplimit.training.results import RunResults

pytestmark = pytest.mark.slow


def readable(page: str) -> str:
    """What a reader sees of the page, without scripts, styles and tags."""
    page = re.sub(r"<(script|style)\b.*?</\1>", " ", page, flags=re.DOTALL)
    return spaced(html.unescape(re.sub(r"<[^>]+>", " ", page)))


def spaced(text: str) -> str:
    """With one plain space for any white space, the kind that does not break included."""
    return " ".join(text.split())


def test_the_answer_comes_first_with_the_numbers_of_the_results(
    digits: RunResults, digits_page: str
) -> None:
    assert digits.cut is not None
    report = digits.cut.report
    page = readable(digits_page)
    answer = page.split("Every depth")[0]
    change = report.accuracy_after - report.accuracy_before
    for number in (
        f"Depth 20 → {report.horizon_after}",
        percent(report.accuracy_before, report.samples),
        percent(report.accuracy_after, report.samples),
        points(change, report.samples, report.accuracy_error),
        percent(report.agreement, report.samples),
    ):
        assert spaced(number) in answer
    assert "Parameters" not in answer  # the table of every depth has both networks
    apart = replace(digits.cut, removed=(2, *digits.cut.removed[1:]))
    tiles = readable(render_page(replace(digits, cut=apart))).split("Every depth")[0]
    for number in (
        count(report.parameters_before),
        count(report.parameters_after),
        f"{report.parameters_before / report.parameters_after:.1f} × fewer",
        count(report.multiply_adds_before),
        count(report.multiply_adds_after),
        seconds(report.latency_before),
        seconds(report.latency_after),
        f"{report.latency_before / report.latency_after:.1f} × faster",
        significant(report.loss_after),
    ):
        assert spaced(number) in tiles


def test_the_rule_is_told_with_validation_figures(digits: RunResults, digits_page: str) -> None:
    assert digits.profiles is not None
    validation = digits.profiles.validation
    depth = validation.recommended_depth
    page = readable(digits_page)
    assert "It is the smallest depth that, on validation data" in page
    assert f"{100 * ACCURACY_TOLERANCE:g} points of accuracy" in page
    assert f"{100 * LOSS_TOLERANCE:g} % of the loss's range" in page
    accuracy = percent(validation.accuracy[depth], validation.samples)
    shown = f"depth {depth} has an accuracy of {accuracy}"
    assert spaced(shown) in page
    assert "took no part in the choice" in page


def test_a_depth_given_by_the_user_is_told_beside_the_rule_s(spirals: RunResults) -> None:
    assert spirals.profiles is not None
    page = readable(render_page(spirals))
    validation = spirals.profiles.validation
    assert validation.recommended_depth < validation.horizon
    assert "The depth was given by the user." in page
    best = (
        f"On validation data the first {layers(validation.recommended_depth)} are as good as all."
    )
    assert spaced(best) in page
    assert "The control" not in page


def test_where_every_smaller_depth_is_worse_the_page_says_no_more(spirals: RunResults) -> None:
    assert spirals.profiles is not None
    validation = spirals.profiles.validation
    worse = (0.0,) * validation.horizon + validation.accuracy[-1:]
    profiles = replace(spirals.profiles, validation=replace(validation, accuracy=worse))
    says = "On validation data every smaller number of first layers does worse than all"
    given = readable(render_page(replace(spirals, profiles=profiles)))
    assert f"{says}. The numbers" in given
    waiting = readable(render_page(replace(spirals, profiles=profiles, cut=None)))
    assert f"{says} {validation.horizon}. The network has not been cut yet." in waiting


def test_a_training_that_was_stopped_is_not_called_done(digits: RunResults) -> None:
    begun = replace(digits, profiles=None, cut=None, reference=None, metrics=digits.metrics[:3])
    page = readable(render_page(begun))
    assert f"stopped after 3 of {digits.recipe['epochs']} epochs; deeplimit train --resume" in page
    assert "has been trained" not in page


def test_the_control_of_another_cut_is_said_and_not_shown(digits: RunResults) -> None:
    assert digits.reference is not None
    assert digits.cut is not None
    report = replace(digits.reference.report, horizon_after=digits.cut.report.horizon_after + 1)
    older = replace(digits.reference, report=report, small=None, removed=None)
    other = replace(digits.reference, removed=digits.cut.removed[1:])
    assert "trained without stage cost" in readable(render_page(digits))
    for reference in (older, other):
        page = readable(render_page(replace(digits, reference=reference)))
        assert "when it is cut to the same depth" not in page
        assert "from scratch" not in page
        assert page.count("The control is that of another cut") == 1
        k = reference.report.horizon_after
        assert f"to {k} layers; deeplimit train --resume RUN" in page


def test_the_control_says_what_the_cut_costs_without_stage_cost(
    digits: RunResults, digits_page: str
) -> None:
    assert digits.reference is not None
    report = digits.reference.report
    page = readable(digits_page)
    lost = 100 * (report.accuracy_before - report.accuracy_after)
    assert lost > 20
    assert f"trained without stage cost loses {lost:.1f} points" in page


def test_the_network_of_the_cut_s_depth_stands_beside_the_cut(
    digits: RunResults, digits_page: str
) -> None:
    """Better, worse, or not told apart: by the bounds of the paired score test."""
    assert digits.reference is not None
    small = digits.reference.small
    assert small is not None
    k, own = small.horizon_after, 100 * small.accuracy_before
    scratch = f"A network of {k} layers trained from scratch without stage cost has {own:.1f} %."
    page = readable(digits_page)
    assert f"{scratch} The cut less this network: +2.0 ± 0.4 points" in page
    assert "(paired, one standard error); the cut is better." in page
    bars = page.split("The control")[1].split("Layer by layer")[0]
    accuracies = [
        small.accuracy_before,
        small.accuracy_after,
        digits.reference.report.accuracy_after,
    ]
    for accuracy in accuracies:
        assert f" {k} layers {100 * accuracy:.1f} %" in bars
    for change, error, counts, said in (
        (-0.02, 0.004, (8, 1), "−2.0 ± 0.4 points (paired, one standard error); the cut is worse."),
        (0.01, 0.006, (1, 4), "+1.0 ± 0.6 points (paired, one standard error); 360 test samples"),
        (
            0.0,
            0.0,
            (0, 0),
            "0.0 ± 0.0 points (paired, one standard error); 360 test samples do not",
        ),
    ):
        before = small.accuracy_after - change
        told = verdict(*counts)
        other = replace(small, accuracy_before=before, accuracy_error=error, verdict=told)
        reference = replace(digits.reference, small=other)
        assert said in readable(render_page(replace(digits, reference=reference)))


@pytest.mark.parametrize(
    ("lost", "gained", "right", "tolerance", "word"),
    [
        (0, 0, 350, 0.01, "kept"),
        (0, 0, 350, 0.005, "unresolved"),
        (12, 0, 350, 0.005, "lost"),
        (0, 0, 36, 0.01, "nothing learnt"),
    ],
)
def test_the_verdict_stands_at_the_head_in_words_and_then_in_a_colour(
    digits: RunResults, lost: int, gained: int, right: int, tolerance: float, word: str
) -> None:
    assert digits.cut is not None
    told = verdict(lost, gained, right, tolerance)
    assert told.word == word
    report = replace(digits.cut.report, verdict=told)
    html = render_page(replace(digits, cut=replace(digits.cut, report=report)))
    assert f'<p class="verdict" data-word="{word}">{word.capitalize()}: ' in html
    page = readable(html)
    assert spaced(f"{told}.") in page
    assert page.index(spaced(f"{told}.")) < page.index("How the depth was chosen")
    assert "trained on 1,000 samples, chosen on 400 (validation) and judged on 360" in page
    assert "400, cannot exclude a loss of 0.5 points at 95 %" in page
    assert "539 could." in page


def test_every_depth_is_in_the_table(digits: RunResults, digits_page: str) -> None:
    assert digits.profiles is not None
    test = digits.profiles.test
    costs = test.costs
    assert costs is not None
    rows = re.findall(r"<tr[^>]*><th scope=\"row\">(\d+).*?</tr>", digits_page)
    assert [int(n) for n in rows] == list(range(21))
    page = readable(digits_page)
    for n in range(21):
        errors = (f"{100 * test.accuracy_error[n]:.1f} ", f" {test.loss_error[n]:.4f}")
        before, after = errors if n < 20 else ("", "")
        recommended = "recommended " if n == test.recommended_depth else ""
        row = f" {n} {recommended}{100 * test.accuracy[n]:.1f} % {before}{test.loss[n]:.4f}{after}"
        work = f"{costs.parameters[n]:,} {costs.multiply_adds[n]:,} {1000 * costs.latency[n]:.3f} "
        assert f"{row} {work}" in page
    assert "deeplimit crop RUN --to K" in page
    assert "with at_depth(model, K): …" in page
    older = replace(digits, profiles=replace(digits.profiles, test=replace(test, costs=None)))
    assert "Parameters" in readable(render_page(older)).split("Every depth")[0]
    assert render_page(digits) == digits_page


def test_the_recipe_is_there_and_how_to_repeat_the_run(digits_page: str) -> None:
    page = readable(digits_page)
    assert "deeplimit train --recipe RUN/recipe.toml" in page
    for field in ("stage_cost 0.1", "control_cost 0.0001", "seed 0", "versions.torch 2.13.0"):
        assert field in page


def test_names_are_escaped_everywhere(digits: RunResults, digits_page: str) -> None:
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)> & \"'"
    results = replace(
        digits,
        name=evil,
        class_names=(evil, *digits.class_names[1:]),
        recipe={"data": evil, evil: ["a", True]},
    )
    page = render_page(results)
    assert "<script>alert" not in page
    assert "<img" not in page
    assert page.count("<script") == digits_page.count("<script")
    assert evil in html.unescape(page)


def test_a_run_without_results_says_what_to_do() -> None:
    empty = RunResults(name="empty", recipe={}, class_names=("a", "b"))
    page = readable(render_page(empty))
    assert "deeplimit crop RUN --to auto" in page
    assert "→ ?" in page
    for absent in ("Layer by layer", "Training", "States", "The control"):
        assert absent not in page


@pytest.mark.parametrize(
    ("absent", "heading"),
    [
        ({"profiles": None}, "Layer by layer"),
        ({"picture": None}, "States on"),
        ({"metrics": ()}, "Training"),
        ({"reference": None}, "The control"),
    ],
)
def test_what_is_absent_is_left_out(
    digits: RunResults, digits_page: str, absent: dict[str, None], heading: str
) -> None:
    assert heading in readable(digits_page)
    assert heading not in readable(render_page(replace(digits, **absent)))


def test_before_a_cut_the_validation_profile_recommends(digits: RunResults) -> None:
    assert digits.profiles is not None
    page = readable(render_page(replace(digits, cut=None, reference=None)))
    depth = digits.profiles.validation.recommended_depth
    assert f"{depth} layers of 20 are as good as the full network" in page
    assert "Depth 20 → ?" in page


def test_a_cut_from_the_middle_is_told(digits: RunResults) -> None:
    assert digits.cut is not None
    report = replace(digits.cut.report, horizon_after=10)
    cut = replace(digits.cut, removed=tuple(range(6, 16)), report=report)
    page = readable(render_page(replace(digits, cut=cut)))
    assert "10 of 20 layers were removed, counted from 1: 7–16." in page
    assert "between entry and exit" in page


def test_nothing_removed_is_told(digits: RunResults) -> None:
    assert digits.cut is not None
    report = replace(digits.cut.report, horizon_after=20)
    page = readable(
        render_page(replace(digits, cut=replace(digits.cut, removed=(), report=report)))
    )
    assert "Depth 20 → 20" in page
    assert "No layer was removed" in page
    assert "every smaller depth loses more than" in page


def test_states_that_miss_the_tube_are_told(digits: RunResults) -> None:
    assert digits.profiles is not None
    far = tuple(4 + 0.01 * n for n in range(21))
    validation = replace(digits.profiles.validation, distance=far)
    profiles = replace(digits.profiles, validation=validation)
    page = readable(render_page(replace(digits, profiles=profiles)))
    assert "On validation data no layer lies in the tube" in page
    assert "On validation data the turnpike has no entry: at no layer is the mean distance" in page
    assert "the smallest mean distance to the minimisers is 4.00" in page


def test_the_entry_is_that_of_validation_data_wherever_it_is_shown(digits: RunResults) -> None:
    """In figures, captions, the table and the slider; in a sentence why the cut is elsewhere."""
    assert digits.profiles is not None
    assert digits.cut is not None
    k = digits.cut.report.horizon_after
    outside, inside = (5.0,) * 21, (0.1,) * 21
    profiles = replace(
        digits.profiles,
        validation=replace(digits.profiles.validation, distance=outside[:11] + inside[11:]),
        test=replace(digits.profiles.test, distance=outside[:14] + inside[14:]),
    )
    metrics = (*digits.metrics[:-1], digits.metrics[-1] | {"entry": 11.0})
    made = replace(digits, profiles=profiles, metrics=metrics)
    page = render_page(made)
    text = readable(page)
    apart = f"On validation data the turnpike’s entry is layer 11, not the cut’s {k}: from there on"
    assert apart in text
    assert "from layer 11, the entry, to layer 20" in text
    assert "After 40 epochs the entry is layer 11, on validation data." in text
    assert page.count("entry 11") >= 5  # four figures over layers and the slider
    assert "entry 14" not in page + text
    at_cut = replace(profiles.validation, distance=outside[:k] + inside[k:])
    same = readable(render_page(replace(made, profiles=replace(profiles, validation=at_cut))))
    assert f"from layer {k}, the entry, to layer 20" in same
    assert "not the cut’s" not in same
    given = replace(made, cut=replace(digits.cut, tolerance=None))
    assert "while the depth of the cut was given by the user." in readable(render_page(given))


def test_it_is_one_small_file_made_quickly(digits: RunResults, tmp_path: Path) -> None:
    render_page(digits)  # plotly's first import of its schema is not the page's doing
    start = time.process_time()
    path = write_page(digits, tmp_path / "report.html")
    assert time.process_time() - start < 3
    assert path.stat().st_size < 6_000_000
    assert list(tmp_path.iterdir()) == [path]


def test_a_deep_network_s_page_stays_small(digits: RunResults) -> None:
    assert digits.picture is not None
    deep = replace(digits.picture, points=digits.picture.points * 20)
    page = render_page(replace(digits, picture=deep))
    assert len(page.encode()) < 6_000_000
    assert "95 of 300 test samples" in readable(page)


def test_nothing_is_loaded_from_elsewhere(digits_page: str) -> None:
    page = re.sub(r"<script\b.*?</script>", " ", digits_page, flags=re.DOTALL)
    assert re.findall(r"""(?:src|href)=["']([^"']*)""", page) == ["data:,", "#main"]
    assert "@import" not in page
    assert "url(" not in page


def test_writing_replaces_the_page_at_once(
    digits: RunResults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    seen = []
    rename = os.replace

    def watched(source: Path, target: Path) -> None:
        seen.append((target.read_text(), len(source.read_text())))
        rename(source, target)

    monkeypatch.setattr(os, "replace", watched)
    write_page(digits, path)
    assert seen == [("old", len(path.read_text()))]


def test_a_failed_write_leaves_the_old_page_alone(
    digits: RunResults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")

    def full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(RunError, match="No space left on device; free some space"):
        write_page(digits, path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
