"""Shared fixtures; shapes in annotations are checked by beartype while the suite runs."""

import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook

install_import_hook("deeplimit", "beartype.beartype")

# A suite that runs in the background has Ctrl-C ignored, its children too; some tests press it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Sums of floats are then the same in every process, and small tensors do not wait for threads
    that a busy machine has no place for."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real MNIST, CIFAR-10 and pretrained weights beside the project."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no data at {SHARED_DATA}")
    return SHARED_DATA


CALLED = """
from deeplimit.errors import InputError
for call in calls:
    try:
        call()
    except InputError as error:
        print(str(error).replace("\\n", "\\\\n"))
print(len(calls), "calls")
"""


@pytest.fixture
def refused_calls() -> Callable[[str], None]:
    """Runs a script that makes a list `calls`, each of which is to be an InputError of one line.

    In a process where nothing checks annotations, as at a user's.
    """

    def check(script: str) -> None:
        done = subprocess.run(
            [sys.executable, "-c", script + CALLED],
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        *lines, counted = done.stdout.splitlines()
        assert counted == f"{len(lines)} calls"
        assert lines
        assert all(line.strip() and "\\n" not in line for line in lines)

    return check


@pytest.fixture
def processes_said(tmp_path: Path) -> Callable[[str], list[str]]:
    """Runs a script that starts processes which meet at the port it is given: the lines it says."""

    def run(script: str) -> list[str]:
        path = tmp_path / "processes.py"
        path.write_text(script)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        done = subprocess.run(
            [sys.executable, str(path), port],
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return run
