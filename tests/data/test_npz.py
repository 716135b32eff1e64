"""NumPy archives: vectors, images in both orders, and what must be refused."""

import io
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deeplimit import memory
from deeplimit.data import arrays, load_dataset
from deeplimit.errors import InputError

Y = np.arange(30) % 3
VECTORS = np.random.default_rng(0).normal(size=(30, 4))
IMAGES = np.random.default_rng(0).integers(0, 256, (30, 3, 6, 5), dtype=np.uint8)


def save(tmp_path: Path, **arrays: Any) -> str:
    np.savez(tmp_path / "set.npz", **arrays)
    return f"npz:{tmp_path / 'set.npz'}"


@pytest.mark.parametrize("x", [VECTORS, VECTORS.astype(np.float16), np.arange(120).reshape(30, 4)])
def test_vectors(tmp_path: Path, x: np.ndarray) -> None:
    name = save(tmp_path, x=x, y=Y.astype(np.uint8))
    data = load_dataset(name)
    assert (data.name, data.shape, data.is_image) == (name, (4,), False)
    assert (len(data.train), len(data.validation), len(data.test)) == (18, 6, 6)
    together = torch.cat([data.train.x, data.validation.x, data.test.x]).numpy()
    labels = torch.cat([data.train.y, data.validation.y, data.test.y]).numpy()
    rows = [int(np.flatnonzero((x.astype(np.float32) == row).all(1))[0]) for row in together]
    assert sorted(rows) == list(range(30))
    assert np.array_equal(labels, Y[rows])
    assert torch.bincount(data.test.y).tolist() == [2, 2, 2]


@pytest.mark.parametrize("channels", [1, 3])
def test_images_channel_first_and_last_are_the_same(tmp_path: Path, channels: int) -> None:
    first = load_dataset(save(tmp_path, x=IMAGES[:, :channels], y=Y))
    last = load_dataset(save(tmp_path, x=np.moveaxis(IMAGES[:, :channels], 1, 3), y=Y))
    assert first.is_image
    assert first.shape == last.shape == (channels, 6, 5)
    assert torch.equal(first.train.x, last.train.x)
    row = next(i for i in range(30) if np.array_equal(IMAGES[i, :channels], first.train.x[0]))
    assert first.train.y[0] == Y[row]


def test_labels_with_gaps_keep_their_numbers_as_names(tmp_path: Path) -> None:
    data = load_dataset(save(tmp_path, x=VECTORS, y=Y * 5 + 1))
    assert data.class_names == ("1", "6", "11")
    assert torch.cat([data.train.y, data.test.y]).unique().tolist() == [0, 1, 2]


def with_entry(value: float) -> np.ndarray:
    x = VECTORS.copy()
    x[7, 2] = value
    return x


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "no x": ({"images": VECTORS, "y": Y}, r"no array 'x' among \['images', 'y'\]"),
    "no y": ({"x": VECTORS}, "no array 'y'"),
    "object array": ({"x": np.array([[1], [None]] * 15, dtype=object), "y": Y}, "object arrays"),
    "pickled labels": ({"x": VECTORS, "y": np.array(["a"] * 30, dtype=object)}, "object arrays"),
    "NaN": ({"x": with_entry(np.nan), "y": Y}, r"x\[7, 2\] is nan, expected finite"),
    "infinity": ({"x": with_entry(-np.inf), "y": Y}, r"x\[7, 2\] is -inf"),
    "too large for float32": ({"x": with_entry(1e300), "y": Y}, r"x\[7, 2\] is inf"),
    "complex": ({"x": VECTORS + 1j, "y": Y}, "type complex128, expected numbers"),
    "strings": ({"x": VECTORS.astype(str), "y": Y}, "expected numbers"),
    "3-D": ({"x": IMAGES[:, 0], "y": Y}, r"shape \(30, 6, 5\), expected vectors"),
    "no features": ({"x": VECTORS[:, :0], "y": Y}, r"shape \(30, 0\)"),
    "float images": ({"x": IMAGES / 255, "y": Y}, "type float64, expected uint8"),
    "four channels": ({"x": np.zeros((30, 4, 6, 6), np.uint8), "y": Y}, "1 or 3 channels"),
    "images of size 0": ({"x": IMAGES[:, :, :0], "y": Y}, r"shape \(30, 3, 0, 5\)"),
    "counts differ": ({"x": VECTORS, "y": Y[:-1]}, "x has 30 samples, y 29"),
    "one-hot labels": ({"x": VECTORS, "y": np.eye(3)[Y]}, r"shape \(30, 3\), expected one number"),
    "real labels": ({"x": VECTORS, "y": Y + 0.5}, "type float64, expected integers"),
    "text labels": ({"x": VECTORS, "y": Y.astype(str)}, "expected integers"),
    "negative label": ({"x": VECTORS, "y": Y - 1}, "label -1 of sample 0 is negative"),
    "huge label": ({"x": VECTORS, "y": Y.astype(np.uint64) + np.uint64(2**63)}, "no class number"),
    "one class": ({"x": VECTORS, "y": Y * 0}, r"only one class \(0\)"),
    "no samples": ({"x": VECTORS[:0], "y": Y[:0]}, "no samples"),
    "a rare class": ({"x": VECTORS, "y": np.where(np.arange(30) < 4, 9, Y)}, "class 9 has 4 sam"),
    "regression": ({"x": VECTORS, "y": np.arange(30)}, "class 0 has 1 sample, too few"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_archives(case: str, tmp_path: Path) -> None:
    arrays, message = BROKEN[case]
    name = save(tmp_path, **arrays)
    with pytest.raises(InputError, match=message) as raised:
        load_dataset(name)
    assert "set.npz" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_files_that_are_no_archives(tmp_path: Path) -> None:
    path = tmp_path / "set.npz"
    with pytest.raises(InputError, match=r"cannot be read \(No such file"):
        load_dataset(f"npz:{path}")
    with pytest.raises(InputError, match="Is a directory"):
        load_dataset(f"npz:{tmp_path}")
    for content in (b"", b"x,y\n1,2\n", b"PK\3\4 cut"):
        path.write_bytes(content)
        with pytest.raises(InputError, match="not a readable npz archive"):
            load_dataset(f"npz:{path}")
    with path.open("wb") as file:
        np.save(file, VECTORS)
    with pytest.raises(InputError, match="a single array"):
        load_dataset(f"npz:{path}")
    for save_archive in (np.savez, np.savez_compressed):
        save_archive(path, x=VECTORS, y=Y)
        content = bytearray(path.read_bytes())
        path.write_bytes(content[: len(content) // 2])
        with pytest.raises(InputError, match="not a readable npz archive"):
            load_dataset(f"npz:{path}")
        content[len(content) // 3] ^= 0xFF
        path.write_bytes(content)
        with pytest.raises(InputError, match="not a readable npz archive"):
            load_dataset(f"npz:{path}")


def with_header(shape: tuple[int, ...], kind: str, values: bytes = b"") -> bytes:
    """A .npy file whose header says anything."""
    file = io.BytesIO()
    header = {"descr": kind, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + values


def zipped(path: Path, x: bytes, packed: int = zipfile.ZIP_DEFLATED) -> str:
    """An archive with this x."""
    with zipfile.ZipFile(path, "w", packed) as archive:
        archive.writestr("x.npy", x)
        archive.writestr("y.npy", with_header((30,), "<i8", Y.tobytes()))
    return f"npz:{path}"


def test_a_shape_without_its_values_is_refused_at_once(tmp_path: Path) -> None:
    for shape in ((2**40, 2**8), (-1, -240), (30, 2**62)):
        name = zipped(tmp_path / "set.npz", with_header(shape, "<f8", bytes(240)))
        began = time.process_time()
        with pytest.raises(InputError, match=r"not a readable npz .* bytes announced by the shape"):
            load_dataset(name)
        assert time.process_time() - began < 1


def test_what_would_unpack_to_more_than_there_is_is_refused_before_it_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.zeros((30, 1, 2**9, 2**9), np.uint8)
    name = zipped(tmp_path / "set.npz", with_header(pixels.shape, "|u1", pixels.tobytes()))
    monkeypatch.setattr(memory, "available", lambda: 1.5 * pixels.nbytes)
    with pytest.raises(InputError, match=r"x, 30 × 1 × 512 × 512: 16 MB of memory needed"):
        load_dataset(name)
    monkeypatch.undo()
    assert load_dataset(name).shape == (1, 512, 512)
    monkeypatch.setattr(memory, "FLOOR", pixels.nbytes - 1)  # stands for 1 GiB
    monkeypatch.setattr(arrays.npy, "read_array", None)
    with pytest.raises(InputError, match=r"7\.9 MB unpacked from .* kB; expected at most"):
        load_dataset(name)


def test_an_encrypted_archive_and_a_header_that_is_no_dictionary(tmp_path: Path) -> None:
    path = tmp_path / "set.npz"
    np.savez(path, x=VECTORS, y=Y)
    content = bytearray(path.read_bytes())
    for local in (content.find(b"PK\3\4") + 6, content.find(b"PK\1\2") + 8):
        content[local] |= 1  # the bit of the flags that says encrypted
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"not a readable npz archive .*encrypted"):
        load_dataset(f"npz:{path}")
    for damage in (b"{" * 100, b"(" * 100, b"__import__('os')", b"\0" * 9):
        np.savez(path, x=VECTORS, y=Y)
        header = with_header((30, 4), "<f8", VECTORS.tobytes())
        zipped(path, header[:10] + damage + header[10 + len(damage) :])
        with pytest.raises(InputError, match="not a readable npz archive"):
            load_dataset(f"npz:{path}")
