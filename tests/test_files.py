"""Whatever is written: whole or not there, by the umask, the same bytes for the same content."""

import hashlib
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from deeplimit.data.images import ImageCache
from deeplimit.files import aside_of, remove_stale, whole, write_text, write_whole
from deeplimit.network import Architecture, save
from deeplimit.training.checkpoint import Checkpoint, save_checkpoint
from deeplimit.training.models import save_network


def small(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Architecture("vector", (6,), 3, depths=(2,), width=4, hidden=4).build()


def vit() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "image_size": 8, "patch_size": 4}
    config = transformers.ViTConfig(num_hidden_layers=2, num_attention_heads=2, **sizes)
    return transformers.ViTForImageClassification(config)


WRITERS: dict[str, Callable[[Path], object]] = {
    "text": lambda place: write_text(place / "page.html", "<p>γ"),
    "network": lambda place: save(small(), place / "own.safetensors"),
    "weights": lambda place: save_network(nn.Linear(2, 2), place / "theirs"),
    "transformers": lambda place: save_network(vit(), place / "vit"),
    "cache": lambda place: ImageCache(place, "key").get(
        "train", 2, lambda: np.zeros((2, 1, 3, 3), np.uint8)
    ),
    "checkpoint": lambda place: save_checkpoint(place, Checkpoint({}, {}, {}, 0, [])),
}


@pytest.fixture
def narrow_umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


@pytest.mark.usefixtures("narrow_umask")
@pytest.mark.parametrize("name", WRITERS)
def test_every_writer_goes_by_the_umask_and_the_disk(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Modes are the umask's; each file was flushed, and its folder after its renaming."""
    flushed, events = os.fsync, []

    def watched(handle: int) -> None:
        events.append(os.readlink(f"/proc/self/fd/{handle}"))
        flushed(handle)

    rename = os.replace
    monkeypatch.setattr(os, "fsync", watched)
    monkeypatch.setattr(
        os, "replace", lambda a, b: (events.append(("renamed", str(b))), rename(a, b))
    )
    WRITERS[name](tmp_path)
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert left
    for path in left:
        assert stat.S_IMODE(path.stat().st_mode) == 0o640, path
        unit = path if path.parent in (tmp_path, tmp_path / "checkpoint") else path.parent
        at = events.index(("renamed", str(unit)))
        aside = str(aside_of(unit) / path.relative_to(unit))
        assert aside in events[:at]
        assert str(unit.parent) in events[at:]
    for path in (p for p in tmp_path.rglob("*") if p.is_dir()):
        assert stat.S_IMODE(path.stat().st_mode) == 0o750, path
    assert not list(tmp_path.rglob(".*"))


def test_the_same_network_gives_the_same_bytes(tmp_path: Path) -> None:
    digests = set()
    for n in range(8):  # the library puts three entries in one of six orders
        path = save(small(), tmp_path / f"{n}.safetensors")
        digests.add(hashlib.sha256(path.read_bytes()).hexdigest())
    assert len(digests) == 1


KILLED = """
import os, signal, sys
from pathlib import Path
from deeplimit.files import whole
with whole(Path(sys.argv[1]), folder=sys.argv[2] == "folder") as aside:
    (aside / "half" if aside.is_dir() else aside).write_text("half")
    print(aside, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_killed_process_left_aside_goes_with_the_next_write(
    kind: str, tmp_path: Path
) -> None:
    place = tmp_path / "a[1].html"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, place, kind], capture_output=True, text=True, check=False
    )
    assert done.returncode == -9, done.stderr
    left = Path(done.stdout.strip())
    assert list(tmp_path.iterdir()) == [left]
    alive = tmp_path / f".a[1].html.{os.getppid()}.1.new"  # somebody is at it
    alive.write_text("")
    write_text(tmp_path / "other", "")
    assert left.exists()
    write_text(place, "whole")
    assert {path.name for path in tmp_path.iterdir()} == {place.name, alive.name, "other"}


def test_only_what_we_left_aside_is_removed(tmp_path: Path) -> None:
    """Names that look alike, and those of processes that go on, stay."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    ours = [f".x.{gone.pid}.7.new", f".x.y.{gone.pid}.7.new"]
    others = [f".x.{gone.pid}.7", f"x.{gone.pid}.7.new", ".x.7.new", f".x.{os.getppid()}.7.new"]
    for name in ours + others:
        (tmp_path / name).write_text("")
    remove_stale(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)


def test_a_folder_is_replaced_whole_and_a_folder_in_the_way_of_a_file_stays(
    tmp_path: Path,
) -> None:
    for names in (("a", "b"), ("b", "c")):
        with whole(tmp_path / "folder", folder=True) as aside:
            for name in names:
                (aside / name).write_text(name)
    assert {path.name for path in (tmp_path / "folder").iterdir()} == {"b", "c"}
    with pytest.raises(RuntimeError, match="cannot be written"):
        write_whole(tmp_path / "folder", lambda file: file.write(b"x"))
    assert {path.name for path in (tmp_path / "folder").iterdir()} == {"b", "c"}
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
