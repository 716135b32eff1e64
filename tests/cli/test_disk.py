"""A disk that is full or read-only: exit code 1 or 2, one line, what was there is still there.

The disk is a real one: a small tmpfs that is mounted for the test, where that is permitted.
"""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_commands import SMALL, command, contents

from deeplimit.training import RunFolder


def mount(place: Path, *options: str) -> None:
    done = subprocess.run(
        ["mount", *options, "tmpfs", str(place)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 400 kB: a run's first files fit, its last do not."""
    place = tmp_path / "disk"
    place.mkdir()
    mount(place, "-t", "tmpfs", "-o", "size=400k")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_the_disk_is_full_before_the_first_file(small_disk: Path) -> None:
    (small_disk / "filler").write_bytes(bytes(shutil.disk_usage(small_disk).free))
    done = command("train", "digits", *SMALL, "--runs", small_disk)
    assert done.code == 2
    (line,) = done.err.splitlines()
    assert str(small_disk) in line
    assert "No space left" in line
    assert set(contents(small_disk)) == {"filler"}


def test_the_disk_gets_full_while_training(small_disk: Path) -> None:
    """The folder stays with what it has, and the run goes on once there is space."""
    runs = small_disk / "runs"
    wide = [*SMALL, "--hidden", "40", "--epochs", "4"]
    (small_disk / "filler").write_bytes(bytes(200_000))
    done = command("train", "digits", *wide, "--runs", runs)
    assert done.code == 1
    line = done.err.splitlines()[-1]
    assert line.startswith("deeplimit: ")
    assert "No space left" in line
    assert "free some space" in line
    assert "Traceback" not in done.err
    whole = RunFolder.open(runs / "digits").metrics()
    assert len(whole) < 4
    assert not list(runs.rglob(".*"))  # nothing half-written is left

    (small_disk / "filler").unlink()
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert command("train", "--resume", runs / "digits").code == 0
    after = RunFolder.open(runs / "digits").metrics()
    assert len(after) == 4
    assert after[: len(whole)] == whole


def test_the_disk_gets_full_when_the_page_is_written(run: Path, small_disk: Path) -> None:
    for path in run.iterdir():
        if path.name not in ("report.html", "checkpoint"):
            (small_disk / path.name).write_bytes(path.read_bytes())
    before = contents(small_disk)
    done = command("report", small_disk)
    assert done.code == 1
    (line,) = done.err.splitlines()
    assert "report.html" in line
    assert "No space left" in line
    assert "free some space" in line
    assert contents(small_disk) == before


def test_a_read_only_disk(run: Path, small_disk: Path) -> None:
    for name in ("recipe.toml", "model.safetensors", "metrics.csv"):
        (small_disk / name).write_bytes((run / name).read_bytes())
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    before = contents(small_disk)
    for args, code in (
        (["train", "digits", *SMALL, "--runs", small_disk], 2),
        (["train", "digits", *SMALL, "--runs", small_disk / "runs"], 2),
        (["profile", small_disk], 1),
        (["crop", small_disk, "--to", "2"], 1),
        (["report", small_disk], 1),
    ):
        done = command(*args)
        assert done.code == code, done.err
        (line,) = done.err.splitlines()
        assert str(small_disk) in line
        assert "Read-only file system" in line
        assert contents(small_disk) == before


def test_stdout_is_full(run: Path) -> None:
    """/dev/full is a disk that is always full."""
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    with full.open("w") as out:
        done = subprocess.run(
            [sys.executable, "-m", "deeplimit", "crop", str(run), "--to", "2", "--json"],
            stdout=out,
            stderr=subprocess.PIPE,
            text=True,
            timeout=240,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "deeplimit: No space left on device; free some space there, then run it again"
    ]
    assert RunFolder.open(run).cut() is not None
