"""Checkpoints: whole or not there, the one before is kept, and damage is survived."""

import os
from pathlib import Path

import pytest
import torch
from training_runs import files_at_most

from deeplimit.errors import InputError, RunError
from deeplimit.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint


def after(epochs: int) -> Checkpoint:
    generator = torch.Generator().manual_seed(epochs)
    return Checkpoint(
        model={"w": torch.randn(1000, generator=generator)},
        optimizer={"state": {"w": {"exp_avg": torch.randn(3, generator=generator)}}},
        scheduler={"last_epoch": 7 * epochs},
        step=7 * epochs,
        rows=[{"epoch": e + 1.0, "loss": 0.1, "entry": None} for e in range(epochs)],
    )


def names(run: Path) -> set[str]:
    return {path.name for path in (run / "checkpoint").iterdir()}


def test_the_newest_comes_back_exactly_and_the_one_before_is_kept(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path) is None
    for epochs in range(1, 5):
        save_checkpoint(tmp_path, after(epochs))
    assert names(tmp_path) == {"epoch-00003.pt", "epoch-00004.pt", "latest"}
    loaded, saved = load_checkpoint(tmp_path), after(4)
    assert loaded is not None
    assert torch.equal(loaded.model["w"], saved.model["w"])
    assert torch.equal(
        loaded.optimizer["state"]["w"]["exp_avg"], saved.optimizer["state"]["w"]["exp_avg"]
    )
    assert (loaded.scheduler, loaded.step, loaded.rows) == (saved.scheduler, 28, saved.rows)


@pytest.mark.parametrize("cut", ["half", "empty", "gone", "changed"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(cut: str, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, after(1))
    save_checkpoint(tmp_path, after(2))
    newest = tmp_path / "checkpoint" / "epoch-00002.pt"
    whole = newest.read_bytes()
    if cut == "gone":
        newest.unlink()
    else:
        middle = len(whole) // 2
        changed = whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :]
        newest.write_bytes({"half": whole[:middle], "empty": b"", "changed": changed}[cut])
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None
    assert loaded.epochs == 1


def test_without_a_whole_checkpoint_the_user_is_told(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, after(1))
    only = tmp_path / "checkpoint" / "epoch-00001.pt"
    only.write_bytes(only.read_bytes()[:500])
    with pytest.raises(InputError, match="no whole checkpoint") as caught:
        load_checkpoint(tmp_path)
    assert "epoch-00001.pt" in str(caught.value)
    assert "train again from" in str(caught.value)
    only.unlink()
    with pytest.raises(InputError, match="none of the files is left"):
        load_checkpoint(tmp_path)


def test_a_checkpoint_of_another_version_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, after(1))
    path = tmp_path / "checkpoint" / "epoch-00001.pt"
    torch.save(torch.load(path, weights_only=True) | {"format": 2}, path)
    with pytest.raises(InputError, match="another version"):
        load_checkpoint(tmp_path)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "harm"),)

    save_checkpoint(tmp_path, after(1))
    torch.save({"format": 1, "model": Harm()}, tmp_path / "checkpoint" / "epoch-00001.pt")
    with pytest.raises(InputError, match="no whole checkpoint"):
        load_checkpoint(tmp_path)
    assert not (tmp_path / "harm").exists()


def test_what_a_killed_process_left_aside_is_removed(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, after(1))
    (tmp_path / "checkpoint" / ".epoch-00002.pt.4711").write_bytes(b"half")
    save_checkpoint(tmp_path, after(2))
    assert names(tmp_path) == {"epoch-00001.pt", "epoch-00002.pt", "latest"}


def test_killed_before_the_pointer_moved(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, after(1))
    save_checkpoint(tmp_path, after(2))
    (tmp_path / "checkpoint" / "latest").write_text("epoch-00001.pt\n")
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None
    assert loaded.epochs == 1


def test_on_a_full_disk_the_last_checkpoint_is_kept(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, after(1))
    before = names(tmp_path)
    with files_at_most(1000), pytest.raises(RunError, match="free some space") as caught:
        save_checkpoint(tmp_path, after(2))
    assert "epoch-00002.pt cannot be written" in str(caught.value)
    assert names(tmp_path) == before
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None
    assert loaded.epochs == 1
