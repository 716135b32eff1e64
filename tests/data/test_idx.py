"""IDX sets: the real MNIST, and files that are broken in every way we know."""

import gzip
import hashlib
import struct
import time
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from data_layouts import idx_bytes

from deeplimit.data import DataSet, load_dataset
from deeplimit.errors import InputError

TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"
TEST_IMAGES, TEST_LABELS = "t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"


@pytest.fixture(scope="module")
def mnist(data_dir: Path) -> DataSet:
    return load_dataset("mnist", data_dir=data_dir)


def raw(data_dir: Path, name: str, header: int) -> np.ndarray:
    with gzip.open(data_dir / "mnist" / name) as file:
        return np.frombuffer(file.read(), np.uint8)[header:]


@pytest.mark.slow
def test_mnist_sizes_and_class_counts(mnist: DataSet, data_dir: Path) -> None:
    assert (mnist.shape, mnist.is_image, mnist.classes) == ((1, 28, 28), True, 10)
    assert mnist.class_names == tuple("0123456789")
    assert (len(mnist.train), len(mnist.validation), len(mnist.test)) == (55_000, 5_000, 10_000)
    # The published counts of MNIST's test set, and the labels in the file's order.
    published = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert torch.bincount(mnist.test.y).tolist() == published
    assert np.array_equal(mnist.test.y, raw(data_dir, TEST_LABELS, 8))
    counts = np.bincount(raw(data_dir, TRAIN_LABELS, 8))
    held = torch.bincount(mnist.validation.y).numpy()
    assert np.array_equal(held + torch.bincount(mnist.train.y).numpy(), counts)
    assert np.abs(held - counts / 12).max() < 1


@pytest.mark.slow
def test_mnist_pixels_belong_to_their_labels(mnist: DataSet, data_dir: Path) -> None:
    tests = raw(data_dir, TEST_IMAGES, 16).reshape(-1, 784)
    assert np.array_equal(mnist.test.x.view(-1, 784), tests)
    x, _ = mnist.test.batch([1234])
    np.testing.assert_array_equal(x.flatten(), tests[1234].astype(np.float32) / np.float32(255))

    # Train and validation together are the training file: each image once, with its label.
    images = raw(data_dir, TRAIN_IMAGES, 16).reshape(-1, 784)
    labels = raw(data_dir, TRAIN_LABELS, 8)
    of_file = sorted(
        hashlib.md5(i.tobytes() + bytes([y])).digest() for i, y in zip(images, labels, strict=True)
    )
    ours = [
        hashlib.md5(image.tobytes() + bytes([label])).digest()
        for split in (mnist.train, mnist.validation)
        for image, label in zip(split.x.numpy(), split.y.tolist(), strict=True)
    ]
    assert sorted(ours) == of_file


def test_mnist_standardisation_is_the_known_one(mnist: DataSet) -> None:
    mean, std = mnist.standardisation()
    assert mean.tolist() == pytest.approx([0.1307], abs=3e-4)
    assert std.tolist() == pytest.approx([0.3081], abs=3e-4)


def test_unzipped_and_zipped_files_are_the_same_set(idx_folder: Path) -> None:
    zipped = load_dataset("tiny", data_dir=idx_folder.parent)
    assert (len(zipped.train), len(zipped.validation), len(zipped.test)) == (54, 6, 20)
    assert zipped.shape == (1, 4, 5)
    for path in sorted(idx_folder.glob("*.gz")):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    plain = load_dataset("tiny", data_dir=idx_folder.parent)
    for part in ("train", "validation", "test"):
        assert torch.equal(getattr(plain, part).x, getattr(zipped, part).x)
        assert torch.equal(getattr(plain, part).y, getattr(zipped, part).y)


def test_gaps_between_labels_are_closed_and_names_keep_the_numbers(idx_folder: Path) -> None:
    for name in (TRAIN_LABELS, TEST_LABELS):
        change(idx_folder / name, lambda labels: labels * 3 + 1)
    data = load_dataset("tiny", data_dir=idx_folder.parent)
    assert data.class_names == ("1", "4", "7")
    assert data.test.y.tolist() == [row % 3 for row in range(20)]


def change(path: Path, edit: Callable[[np.ndarray], np.ndarray]) -> None:
    content = gzip.decompress(path.read_bytes())
    start = 4 + 4 * content[3]
    shape = np.frombuffer(content[4:start], ">u4").astype(int)
    array = np.frombuffer(content[start:], np.uint8).reshape(shape)
    path.write_bytes(gzip.compress(idx_bytes(edit(array))))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def flip_bits(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def rezip(path: Path, edit: Callable[[bytes], bytes]) -> None:
    path.write_bytes(gzip.compress(edit(gzip.decompress(path.read_bytes()))))


BROKEN = {
    "truncated gzip": (TRAIN_IMAGES, cut, "not a whole gzip file"),
    "damaged gzip": (TRAIN_IMAGES, flip_bits, "not a whole gzip file"),
    "not gzip at all": (
        TEST_IMAGES,
        lambda path: path.write_bytes(b"<html>404</html>"),
        "not a whole gzip file",
    ),
    "empty file": (TEST_IMAGES, lambda path: path.write_bytes(b""), "starts with nothing"),
    "wrong magic": (
        TRAIN_IMAGES,
        lambda path: rezip(path, lambda content: b"\1\2\3\4" + content[4:]),
        "starts with 01020304, expected 00000803",
    ),
    "values of 32 bits": (
        TRAIN_IMAGES,
        lambda path: rezip(path, lambda content: b"\0\0\x0c\3" + content[4:]),
        "starts with 00000c03, expected 00000803",
    ),
    "labels in the place of images": (
        TRAIN_IMAGES,
        lambda path: path.write_bytes((path.parent / TRAIN_LABELS).read_bytes()),
        "1 dimensions, expected 3",
    ),
    "colour images": (
        TRAIN_IMAGES,
        lambda path: change(path, lambda images: np.stack([images] * 3, axis=-1)),
        "4 dimensions, expected 3",
    ),
    "only half a header": (
        TRAIN_IMAGES,
        lambda path: rezip(path, lambda content: content[:9]),
        "9 bytes, its header announces 16",
    ),
    "fewer values than announced": (
        TRAIN_IMAGES,
        lambda path: rezip(path, lambda content: content[:-5]),
        "1211 bytes, its header announces 1216",
    ),
    "more values than announced": (
        TRAIN_LABELS,
        lambda path: rezip(path, lambda content: content + b"x"),
        "69 bytes, its header announces 68",
    ),
    "one image more than labels": (
        TRAIN_LABELS,
        lambda path: change(path, lambda labels: labels[:-1]),
        "60 images.* 59 labels",
    ),
    "no samples": (TEST_IMAGES, lambda path: change(path, lambda i: i[:0]), "holds no samples"),
    "one class only": (
        TRAIN_LABELS,
        lambda path: change(path, np.zeros_like),
        r"only one class \(0\)",
    ),
    "test label out of range": (
        TEST_LABELS,
        lambda path: change(path, lambda labels: labels + 1),
        "test label 3 is out of range, the training part has 0, 1, 2",
    ),
    "a class of one sample": (
        TRAIN_LABELS,
        lambda path: change(path, lambda labels: np.where(np.arange(60) == 9, 200, labels)),
        "class 200 has 1 sample, too few",
    ),
    "test images of another size": (
        TEST_IMAGES,
        lambda path: change(path, lambda images: images[:, :, :4]),
        "test samples are images of shape 1×4×4, training samples are images of shape 1×4×5",
    ),
    "a missing file": (TEST_LABELS, Path.unlink, r"no t10k-labels-idx1-ubyte\[.gz\]"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files(case: str, idx_folder: Path) -> None:
    name, damage, message = BROKEN[case]
    damage(idx_folder / name)
    with pytest.raises(InputError, match=message) as raised:
        load_dataset("tiny", data_dir=idx_folder.parent)
    assert "tiny" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_file_that_unpacks_to_4_gib_is_refused_at_once(idx_folder: Path) -> None:
    packer = zlib.compressobj(wbits=31)
    head = bytes([0, 0, 8, 3]) + struct.pack(">III", 2**22, 32, 32)
    path = idx_folder / TRAIN_IMAGES
    path.write_bytes(packer.compress(head) + packer.compress(bytes(2**24)) + packer.flush())
    began = time.process_time()
    with pytest.raises(InputError, match=r"4194304 × 32 × 32: 4\.3 GB unpacked from 16 kB"):
        load_dataset("tiny", data_dir=idx_folder.parent)
    assert time.process_time() - began < 1


@pytest.mark.slow
def test_no_more_is_unpacked_than_the_header_announces(idx_folder: Path) -> None:
    path = idx_folder / TRAIN_IMAGES
    tracemalloc.start()
    rezip(path, lambda content: content + bytes(2**26))
    tracemalloc.reset_peak()
    with pytest.raises(InputError, match="at least 1217 bytes, its header announces 1216"):
        load_dataset("tiny", data_dir=idx_folder.parent)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**22
