"""A disk that is full or read-only: exit code 1 or 2, one line, what was there is still there.

The disk is a real one: a small tmpfs that is mounted for the test, where that is permitted.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_commands import SMALL, command, contents

from deeplimit.errors import InputError
from deeplimit.training import Recipe, RunFolder


def mount(place: Path, *options: str) -> None:
    done = subprocess.run(
        ["mount", *options, "tmpfs", str(place)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 400 kB: a run's first files fit, its last do not."""
    yield from disk(tmp_path / "disk", "400k")


@pytest.fixture
def large_disk(tmp_path: Path) -> Iterator[Path]:
    yield from disk(tmp_path / "large", "64m")


def disk(place: Path, size: str) -> Iterator[Path]:
    place.mkdir()
    mount(place, "-t", "tmpfs", "-o", f"size={size}")
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_read_only_disk(run: Path, small_disk: Path) -> None:
    for name in ("recipe.toml", "model.safetensors", "metrics.csv"):
        (small_disk / name).write_bytes((run / name).read_bytes())
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    before = contents(small_disk)
    for args in (
        ["train", "digits", *SMALL, "--runs", small_disk],
        ["train", "digits", *SMALL, "--runs", small_disk / "runs"],
    ):
        done = command(*args)
        assert done.code == 2, done.err
        (line,) = done.err.splitlines()
        assert str(small_disk) in line
        assert "Read-only file system" in line
        assert contents(small_disk) == before


@pytest.mark.slow
def test_a_received_run_on_a_read_only_disk(run: Path, large_disk: Path, tmp_path: Path) -> None:
    """Every verb that writes says, before it works, how to have a copy; and that works."""
    received = Path(shutil.copytree(run, large_disk / "a run"))
    received.chmod(0o555)
    subprocess.run(["mount", "-o", "remount,ro", str(large_disk)], check=True)
    before = contents(large_disk)
    for args in (
        ["train", "--resume", received],
        ["profile", received],
        ["crop", received, "--to", "2"],
        ["heal", received],
        ["ode", received],
        ["gradient", received],
        ["report", received],
        ["refine", received],
        ["merge", received, run],
        ["interpolate", received, run],
        ["verify", received, "--accept"],
    ):
        done = command(*args)
        assert done.code == 2, done.err
        (line,) = done.err.splitlines()  # nothing of progress
        assert "(Read-only file system)" in line
        assert f"cp -r '{received}' DIR/'a run'" in line
    assert command("verify", received).code == 0
    assert contents(large_disk) == before
    copying = line.partition(": cp")[2].partition(";")[0].replace("DIR", str(tmp_path))
    subprocess.run(f"cp{copying}", shell=True, check=True)
    assert command("verify", tmp_path / "a run").code == 0
    assert command("crop", tmp_path / "a run", "--to", "2").code == 0


def test_a_run_of_somebody_else() -> None:
    """Root may write everywhere, so it is somebody else for a moment."""
    with tempfile.TemporaryDirectory() as place:
        folder = RunFolder.create(place, "run", Recipe())
        Path(place).chmod(0o755)
        folder.path.chmod(0o555)
        before = os.geteuid()
        try:
            if before == 0:
                os.seteuid(65534)
            with pytest.raises(
                InputError, match=r"cannot be written to \(Permission denied\); copy"
            ):
                folder.write_metrics([])
        finally:
            os.seteuid(before)


@pytest.mark.slow
def test_stdout_is_full(run: Path) -> None:
    """/dev/full is a disk that is always full."""
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    with full.open("w") as out:
        done = subprocess.run(
            [sys.executable, "-m", "deeplimit", "verify", str(run), "--json"],
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
