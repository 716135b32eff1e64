"""Sets through the datasets library, from local folders: no network."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from data_layouts import make_images
from PIL import Image

from deeplimit.data import load_dataset
from deeplimit.errors import InputError

datasets = pytest.importorskip("datasets", reason="the extra `hub` is not installed")


@pytest.fixture(autouse=True)
def own_download_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "downloads")


@pytest.mark.slow
def test_a_local_folder_equals_the_parquet_source(parquet_folder: Path, tmp_path: Path) -> None:
    ours = load_dataset("tiny", data_dir=parquet_folder.parent)
    name = f"hub:{parquet_folder}"
    for _ in range(2):  # decoded, then from the cache
        data = load_dataset(name, cache_dir=tmp_path / "cache")
        assert (data.name, data.class_names) == (name, ("ant", "bee", "cat"))
        for part in ("train", "validation", "test"):
            assert torch.equal(getattr(data, part).x, getattr(ours, part).x)
            assert torch.equal(getattr(data, part).y, getattr(ours, part).y)
    assert len(list((tmp_path / "cache").rglob("*.npy"))) == 2


def test_a_folder_of_image_files(tmp_path: Path) -> None:
    images = make_images(40)
    for row, image in enumerate(images):
        folder = tmp_path / "set" / ("train" if row < 30 else "test") / "ab"[row % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{row:02}.png")
    data = load_dataset(f"hub:{tmp_path / 'set'}")
    assert data.class_names == ("a", "b")
    assert (len(data.train), len(data.validation), len(data.test)) == (27, 3, 10)
    originals = {image.transpose(2, 0, 1).tobytes(): row for row, image in enumerate(images)}
    rows = [originals[image.tobytes()] for image in data.test.x.numpy()]
    assert sorted(rows) == list(range(30, 40))
    assert data.test.y.tolist() == [row % 2 for row in rows]


def test_a_folder_without_training_part(parquet_folder: Path) -> None:
    for path in parquet_folder.glob("train-*"):
        path.unlink()
    with pytest.raises(InputError, match="has the parts test, expected `train`"):
        load_dataset(f"hub:{parquet_folder}")


def test_an_empty_folder_and_a_cut_file(parquet_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"cannot be read .*give its folder as hub:PATH"):
        load_dataset(f"hub:{tmp_path / 'empty'}")
    path = parquet_folder / "test-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(InputError, match="cannot be read") as raised:
        load_dataset(f"hub:{parquet_folder}")
    assert "\n" not in str(raised.value)


def ask(code: str, **environment: str) -> str:
    program = (
        "from deeplimit.data import load_dataset\n"
        "from deeplimit.errors import InputError\n"
        f"{code}"
        "try: load_dataset('hub:nobody/nothing')\n"
        "except InputError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout


@pytest.mark.slow
def test_without_network() -> None:
    said = ask("", HF_HUB_OFFLINE="1")
    assert "'hub:nobody/nothing' cannot be read" in said
    assert "check OWNER/NAME and the network" in said
    assert said.count("\n") == 1


@pytest.mark.slow
def test_without_the_library() -> None:
    said = ask("import sys; sys.modules['datasets'] = None\n")
    assert said == (
        "data set 'hub:nobody/nothing' needs the datasets library: pip install deeplimit[cli]\n"
    )
