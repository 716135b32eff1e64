"""Words on a terminal hold no control character of what they speak of."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.table import Table
from rich.text import Text

from deeplimit.cli import main
from deeplimit.cli.verbs import emit
from deeplimit.terminal import HIDDEN, Terminal, visible

NASTY = "a\x1b[31m\x9b2J\x07\r\u202eb\udcff"
SHOWN = r"a\x1b[31m\x9b2J\x07\r\u202eb\udcff"


def test_control_characters_are_written_as_python_does_and_nothing_else_changes() -> None:
    assert visible(NASTY) == SHOWN
    plain = "γ 99.3\u00a0% → 5\n\tβ 👩\u200d🔬"
    assert visible(plain) == plain


def test_richs_tables_keep_their_colours_and_lose_those_of_the_words() -> None:
    table = Table(title=Text(NASTY))
    table.add_column(NASTY)
    table.add_row(Text(NASTY, style="red"))
    file = io.StringIO()
    Terminal(file=file, force_terminal=True, color_system="standard", width=200).print(table)
    assert file.getvalue().count(r"\x9b2J") == 3
    assert "\x1b[31ma" in file.getvalue()  # rich's red
    assert r"\x1b[31m" in file.getvalue()
    assert not HIDDEN.search(file.getvalue().replace("\x1b", ""))


def test_json_says_the_same_without_them(capsys: pytest.CaptureFixture[str]) -> None:
    emit([NASTY], json=True)
    out = capsys.readouterr().out
    assert json.loads(out) == [NASTY]
    assert not HIDDEN.search(out)


def test_what_the_command_says_of_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a\x1b[31m.npz"
    np.savez(path, x=np.zeros((4, 2)), y=np.zeros(4, int))
    assert main(["train", f"npz:{path}", "--runs", str(tmp_path / "runs")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert r"a\x1b[31m.npz" in line
    assert not HIDDEN.search(line)
