"""The command in processes of its own: signals, pipes, several devices, both ways to start it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli_commands import SMALL, interrupted, process

from deeplimit import __version__
from deeplimit.cli import main
from deeplimit.errors import RunError
from deeplimit.training import RunFolder, resume

pytestmark = pytest.mark.slow

COMMAND = [sys.executable, "-m", "deeplimit"]
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


def test_the_script_and_the_module_are_the_same_command(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("deeplimit")
    if not script.exists():
        pytest.skip(f"deeplimit is not installed beside {sys.executable}")
    said = subprocess.run([script, "--version"], capture_output=True, text=True, check=True).stdout
    assert said == process("--version", cwd=tmp_path).out == f"deeplimit {__version__}\n"


def test_wrong_input_in_a_process(tmp_path: Path) -> None:
    done = process("train", "digitz", cwd=tmp_path)
    assert (done.code, done.out) == (2, "")
    (line,) = done.err.splitlines()
    assert line.startswith("deeplimit: unknown data set 'digitz'")
    assert list(tmp_path.iterdir()) == []


def said_how_to_go_on(lines: list[str], run: Path, name: str) -> None:
    assert lines[-1].startswith("deeplimit: stopped in epoch ")
    assert f"deeplimit train --resume {name}" in lines[-1]
    assert not any("Traceback" in line for line in lines)
    assert len(RunFolder.open(run).metrics()) >= 2


def test_ctrl_c(tmp_path: Path) -> None:
    """128 and the signal, and the line says how to go on."""
    args = ["train", "digits", *SMALL, "--epochs", "100000", "--runs", tmp_path]
    done = interrupted(*args, at="epoch 2/")
    assert done.code == 128 + signal.SIGINT
    said_how_to_go_on(done.err.splitlines(), tmp_path / "digits", str(tmp_path / "digits"))


def test_terminated(tmp_path: Path) -> None:
    """SIGTERM likewise. As long as it works another process that wants to write into the run is
    told so, one that only reads is not."""
    args = ["train", "digits", *SMALL, "--epochs", "100000"]
    with subprocess.Popen(
        [*COMMAND, *args],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        env=ONE_THREAD,
    ) as running:
        assert running.stderr is not None
        for line in running.stderr:
            if "epoch 2/" in line:
                break
        run = tmp_path / "runs" / "digits"
        with pytest.raises(RunError, match=r"runs/digits: another process is working on"):
            resume(run)
        assert RunFolder.open(run).results().profiles is None
        running.send_signal(signal.SIGTERM)
        rest = running.stderr.read().splitlines()
    assert running.returncode == 128 + signal.SIGTERM
    said_how_to_go_on(rest, run, "runs/digits")


def test_nobody_reads_the_result(run: Path, tmp_path: Path) -> None:
    """As in `deeplimit crop … --json | head -0`: the work is done, and nothing complains, not when
    stdout is flushed at the end either."""
    read, write = os.pipe()
    os.close(read)
    told = tmp_path / "stderr"
    with (
        told.open("w") as err,
        os.fdopen(write, "w") as out,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        code = main(["crop", str(run), "--to", "2", "--json"])
    assert (code, told.read_text()) == (0, "")
    cut = RunFolder.open(run).cut()
    assert cut is not None
    assert cut.removed == (2,)


@pytest.mark.processes
@pytest.mark.parametrize("launcher", ["script", "torchrun"])
def test_two_processes_speak_with_one_voice(launcher: str, tmp_path: Path) -> None:
    """Only the first of them prints, profiles, cuts and writes the page; all train the control."""
    args = ["train", "digits", "--depth", "4", "--hidden", "16", "--stage-cost", "1"]
    args += ["--epochs", "3", "--learning-rate", "0.01", "--control", "plain", "--device", "cpu"]
    args += ["--devices", "2", "--strategy", "ddp", "--json"]
    start = [str(Path(sys.executable).with_name("deeplimit"))]
    if launcher == "script" and not Path(start[0]).exists():
        pytest.skip(f"deeplimit is not installed beside {sys.executable}")
    if launcher == "torchrun":
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        start = [sys.executable, *torchrun, "-m", "deeplimit"]
    done = subprocess.run(
        [*start, *args],
        cwd=tmp_path,
        env=ONE_THREAD,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert printed["run"] == "runs/digits"
    assert done.stderr.count("epoch 3/3") == 3
    k = printed["results"]["cut"]["report"]["horizon_after"]
    trained = ["digits", f"digits-plain-{k}", "digits-without-stage-cost"]
    assert sorted(path.name for path in (tmp_path / "runs").glob("d*")) == trained
    assert printed["results"]["reference"]["small"]["horizon_before"] == k


@pytest.mark.processes
def test_wrong_input_from_two_processes(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("in the way")
    done = process("train", *SMALL, "--devices", "2", cwd=tmp_path)
    assert (done.code, done.out) == (2, "")
    lines = [line for line in done.err.splitlines() if line.startswith("deeplimit: ")]
    assert len(lines) == 1
    assert "runs" in lines[0]
    assert "Traceback" not in done.err


@pytest.mark.processes
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_is_lost_is_named(number: signal.Signals, tmp_path: Path) -> None:
    """One line, in seconds where it is dead, after the time-out where it is stopped; the others go.
    Until then nothing listens on an address that another machine could reach."""
    args = ["train", "digits", *SMALL, "--epochs", "100000", "--devices", "2", "--strategy", "ddp"]
    with subprocess.Popen(
        [*COMMAND, *args],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        env=ONE_THREAD | {"DEEPLIMIT_TIMEOUT": "5"},
    ) as running:
        assert running.stderr is not None
        for line in running.stderr:
            if "epoch 1/" in line:
                break
        children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
        (worker,) = map(int, children)
        addresses = listening(running.pid) | listening(worker)
        os.kill(worker, number)
        began = time.monotonic()
        rest = [line for line in running.stderr if not line.startswith("epoch ")]
    assert running.returncode == 1
    assert addresses == {"0100007F"}
    (line,) = rest
    said = "was killed by SIGKILL" if number is signal.SIGKILL else "gave no sign of life for 5 s"
    assert line == (
        f"deeplimit: process 2 of 2 (rank 1) {said}; deeplimit train --resume runs/digits goes on\n"
    )
    assert time.monotonic() - began < 60
    assert not Path(f"/proc/{worker}").exists()


def listening(process: int) -> set[str]:
    """The local addresses on which a process waits for connections, as in /proc/net/tcp."""
    sockets = set()
    for path in Path(f"/proc/{process}/fd").iterdir():
        with contextlib.suppress(OSError):
            sockets.add(path.readlink().name)
    found = set()
    for table in ("tcp", "tcp6"):
        for row in Path(f"/proc/{process}/net/{table}").read_text().splitlines()[1:]:
            columns = row.split()
            if columns[3] == "0A" and f"socket:[{columns[9]}]" in sockets:
                found.add(columns[1].rpartition(":")[0])
    return found
