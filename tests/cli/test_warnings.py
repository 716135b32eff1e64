"""What ordinary use says on stderr is deeplimit's own: no warning of a library comes through."""

import warnings
from pathlib import Path

import pytest
from cli_commands import SMALL, command, npz

pytestmark = pytest.mark.slow


def test_the_verbs_of_a_run_warn_of_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data, run = npz(Path("data.npz")), "runs/data"
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for words in (
            ["train", data, *SMALL],
            ["profile", run],
            ["crop", run, "--to", "2"],
            ["heal", run, "--epochs", "1"],
            ["report", run],
        ):
            done = command(*words)
            assert done.code == 0, done.err
            assert "Warning" not in done.err
    quiet = (DeprecationWarning, PendingDeprecationWarning)  # which Python does not show by itself
    assert [str(w.message) for w in warned if not issubclass(w.category, quiet)] == []
