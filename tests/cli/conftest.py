"""One small finished run, trained by the command itself; tests take copies of it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_commands import SMALL, command


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with profile, cut and page: 3 layers, 2 epochs."""
    runs = tmp_path_factory.mktemp("trained")
    done = command("train", "digits", *SMALL, "--runs", runs, "--name", "small")
    assert done.code == 0, done.err
    return runs / "small"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(trained, tmp_path / "small"))


@pytest.fixture
def stopped(run: Path) -> Path:
    """A run that was killed in its second epoch: what is left is what one epoch left."""
    keep = {"recipe.toml", "checkpoint"}
    for path in run.iterdir():
        if path.name not in keep:
            path.unlink()
    (run / "checkpoint" / "epoch-00002.pt").unlink()
    (run / "checkpoint" / "latest").write_text("epoch-00001.pt\n")
    return run


@pytest.fixture
def cut_in_half() -> Callable[[Path], None]:
    def cut(path: Path) -> None:
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])

    return cut
