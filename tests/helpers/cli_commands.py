"""Runs the command as users do, in this process or in one of its own, and says what it did."""

import contextlib
import gzip
import hashlib
import io
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deeplimit.cli import main

SMALL = ["--depth", "3", "--hidden", "8", "--epochs", "2", "--batch-size", "128"]
SMALL += ["--learning-rate", "0.03", "--device", "cpu"]


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


def command(*args: str | Path) -> Done:
    """The command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(arg) for arg in args])
    return Done(code, out.getvalue(), err.getvalue())


class Pressing(io.StringIO):
    """What is said on stderr; Ctrl-C is pressed once it says so much."""

    def __init__(self, at: str):
        super().__init__()
        self.at = at

    def write(self, text: str) -> int:
        if self.at in text:
            os.kill(os.getpid(), signal.SIGINT)
        return super().write(text)


def interrupted(*args: str | Path, at: str) -> Done:
    """The command in this process, stopped by Ctrl-C."""
    out, err = io.StringIO(), Pressing(at)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(arg) for arg in args])
    return Done(code, out.getvalue(), err.getvalue())


def process(
    *args: str | Path, cwd: Path, env: Mapping[str, str] | None = None, timeout: float = 240
) -> Done:
    """The command in a process of its own, by `python -m deeplimit`."""
    done = subprocess.run(
        [sys.executable, "-m", "deeplimit", *map(str, args)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def contents(folder: Path) -> dict[str, str]:
    """Everything below a folder: paths, and for files a digest."""
    return {
        str(path.relative_to(folder)): (
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        )
        for path in sorted(folder.rglob("*"))
    }


def idx_set(folder: Path, labels: np.ndarray, test_labels: np.ndarray | None = None) -> Path:
    """A folder with the four gzipped IDX files of an image set of 8×8 pixels."""
    folder.mkdir(parents=True)
    for prefix, y in (("train", labels), ("t10k", labels if test_labels is None else test_labels)):
        x = np.random.default_rng(0).integers(0, 256, (len(y), 8, 8), dtype=np.uint8)
        for name, array in (("images-idx3", x), ("labels-idx1", y)):
            header = bytes([0, 0, 8, array.ndim])
            sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
            content = header + sizes + array.astype(np.uint8).tobytes()
            (folder / f"{prefix}-{name}-ubyte.gz").write_bytes(gzip.compress(content))
    return folder


def npz(path: Path, **arrays: np.ndarray) -> str:
    """A data set npz:FILE; x is random and y cycles through 3 classes unless given."""
    defaults = {
        "x": np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32),
        "y": np.arange(60) % 3,
    }
    np.savez(path, **{**defaults, **arrays})
    return f"npz:{path}"
