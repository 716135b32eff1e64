"""`deeplimit refine`: what it prints and writes, and what it refuses."""

import json
from pathlib import Path

import pytest
from cli_commands import command, contents

from deeplimit.training import RunFolder

pytestmark = pytest.mark.slow


def test_a_run_is_refined_and_trained_on(run: Path) -> None:
    before = contents(run)
    done = command("refine", run, "--factor", "3", "--epochs", "1")
    assert done.code == 0, done.err
    made = RunFolder.open(run.with_name(f"{run.name}-x3"))
    found = made.refinement()
    assert found is not None
    assert found.trained is not None
    assert "Refined: depth 3 → 9" in done.out
    for accuracy in (
        found.report.accuracy_before,
        found.report.accuracy_after,
        found.trained.accuracy_after,
    ):
        assert f"{100 * accuracy:.1f}" in done.out
    assert "trained for 1 epoch from there, with the optimiser's state" in done.out
    assert str(made.path / "report.html") in done.out
    assert "Refined from small: 3 layers became 9" in (made.path / "report.html").read_text()
    assert contents(run) == before  # the run itself stays as it is
    plain = command("refine", run, "--json")
    assert plain.code == 0, plain.err
    assert json.loads(plain.out)["report"]["horizon_after"] == 6
    assert plain.err == ""


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--factor", "0"], "--factor is 0; expected at least 1"),
        (["--factor", "9" * 12], "layers does not fit into memory"),
        (["--epochs", "-2"], "epochs is -2; expected at least 0"),
        (["--name", "a/b"], "the name 'a/b' cannot be a folder's"),
    ],
)
def test_what_is_refused(args: list[str], says: str, run: Path) -> None:
    others = sorted(run.parent.iterdir())
    done = command("refine", run, *args)
    assert done.code == 2
    assert says in done.err
    assert len(done.err.splitlines()) == 1
    assert sorted(run.parent.iterdir()) == others


def test_no_run(tmp_path: Path) -> None:
    done = command("refine", tmp_path / "nothing")
    assert done.code == 2
    assert "no such folder; expected a folder that `deeplimit train` wrote" in done.err
