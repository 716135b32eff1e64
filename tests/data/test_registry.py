"""Names: found, unknown, and where data is looked for."""

import re
from pathlib import Path

import pytest

from deeplimit.data import load_dataset
from deeplimit.errors import InputError


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DEEPLIMIT_DATA", raising=False)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("digit", "digits"), ("MNIST", "mnist"), ("cifar-10", "cifar10"), ("maze", "mazes")],
)
def test_unknown_name_gives_the_nearest(name: str, nearest: str, tmp_path: Path) -> None:
    for data_dir in (None, tmp_path):
        with pytest.raises(InputError, match=f"unknown data set '{name}', did you mean {nearest}"):
            load_dataset(name, data_dir=data_dir)


def test_unknown_name_knows_the_folders_there(idx_folder: Path) -> None:
    (idx_folder.parent / "weights").mkdir()
    with pytest.raises(InputError, match="did you mean tiny") as raised:
        load_dataset("tinny", data_dir=idx_folder.parent)
    listed = str(raised.value).partition("Expected")[2]
    assert "digits, mazes, spirals, mnist, cifar10, tiny, hub:…, npz:…" in listed


@pytest.mark.parametrize("name", ["", "xyzzy", "ftp:here"])
def test_unknown_name_without_a_near_one(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"unknown data set '{name}': expected one of digits"):
        load_dataset(name, data_dir=tmp_path)


def test_no_data_folder() -> None:
    with pytest.raises(InputError, match="pass --data-dir or set DEEPLIMIT_DATA"):
        load_dataset("mnist")
    with pytest.raises(InputError, match="nothing after the colon"):
        load_dataset("npz:")


def test_missing_and_empty_folders(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere"
    with pytest.raises(InputError, match=f"data folder {re.escape(str(missing))} does not exist"):
        load_dataset("mnist", data_dir=missing)
    with pytest.raises(InputError, match=f"no folder {re.escape(str(tmp_path / 'cifar10'))}"):
        load_dataset("cifar10", data_dir=tmp_path)
    (tmp_path / "mnist").mkdir()
    with pytest.raises(InputError, match=r"neither train-images-idx3-ubyte.* nor train-"):
        load_dataset("mnist", data_dir=tmp_path)


def test_the_environment_names_the_data_folder(
    idx_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEEPLIMIT_DATA", str(idx_folder.parent))
    assert len(load_dataset("tiny").test) == 20
    with pytest.raises(InputError, match="unknown data set 'tiny'"):
        load_dataset("tiny", data_dir=idx_folder)  # an explicit folder wins


def test_negative_seed() -> None:
    with pytest.raises(InputError, match="seed -1"):
        load_dataset("spirals", seed=-1)
