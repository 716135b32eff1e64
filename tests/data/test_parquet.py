"""Parquet image sets: the real CIFAR-10, the layouts of the hub, and broken files."""

import io
import struct
import time
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from data_layouts import image_table, make_images, png
from PIL import Image

from deeplimit import memory
from deeplimit.data import DataSet, load_dataset
from deeplimit.errors import InputError

WriteParts = Callable[..., Path]
LABELS = [row % 3 for row in range(30)]


def table(
    labels: dict | None = None, images: np.ndarray | None = None, **options: object
) -> pa.Table:
    images = make_images(30) if images is None else images
    return image_table([png(i) for i in images], labels or {"label": LABELS}, **options)


@pytest.fixture(scope="module")
def cifar(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    return load_dataset("cifar10", data_dir=data_dir, cache_dir=tmp_path_factory.mktemp("cache"))


@pytest.mark.slow
def test_cifar_sizes_and_class_counts(cifar: DataSet) -> None:
    assert (cifar.shape, cifar.is_image) == ((3, 32, 32), True)
    assert cifar.class_names[:2] == ("airplane", "automobile")
    assert (len(cifar.train), len(cifar.validation), len(cifar.test)) == (45_000, 5_000, 10_000)
    for split, each in ((cifar.train, 4500), (cifar.validation, 500), (cifar.test, 1000)):
        assert torch.bincount(split.y).tolist() == [each] * 10


@pytest.mark.slow
def test_cifar_pixels_belong_to_their_labels(cifar: DataSet, data_dir: Path) -> None:
    tests = pq.read_table(data_dir / "cifar10" / "test-00000-of-00001.parquet").slice(4321, 20)
    for row, sample in enumerate(tests.to_pylist(), start=4321):
        pixels = np.asarray(Image.open(io.BytesIO(sample["img"]["bytes"])))
        assert np.array_equal(cifar.test.x[row].permute(1, 2, 0), pixels)
        assert cifar.test.y[row] == sample["label"]
    # The training file's first images are each found in train or validation, with their labels.
    samples = pq.read_table(data_dir / "cifar10" / "train-00000-of-00001.parquet").slice(0, 20)
    sums = [split.x.sum(dim=(1, 2, 3)) for split in (cifar.train, cifar.validation)]
    for sample in samples.to_pylist():
        pixels = np.asarray(Image.open(io.BytesIO(sample["img"]["bytes"]))).transpose(2, 0, 1)
        found = [
            int(split.y[row])
            for split, total in zip((cifar.train, cifar.validation), sums, strict=True)
            for row in torch.nonzero(total == int(pixels.sum())).flatten().tolist()
            if np.array_equal(split.x[row], pixels)
        ]
        assert found == [sample["label"]]


def test_shards_become_one_set_each_image_once(parquet_folder: Path) -> None:
    data = load_dataset("tiny", data_dir=parquet_folder.parent)
    assert data.class_names == ("ant", "bee", "cat")
    assert (len(data.train), len(data.validation), len(data.test)) == (54, 6, 20)
    assert np.array_equal(data.test.x.permute(0, 2, 3, 1), make_images(20, seed=1))
    together = torch.cat([data.train.x, data.validation.x]).permute(0, 2, 3, 1).numpy()
    labels = torch.cat([data.train.y, data.validation.y])
    originals = {image.tobytes(): row for row, image in enumerate(make_images(60))}
    rows = [originals[image.tobytes()] for image in together]
    assert sorted(rows) == list(range(60))
    assert [row % 3 for row in rows] == labels.tolist()


def test_shards_whose_labels_are_of_two_widths(parquet_folder: Path) -> None:
    expected = load_dataset("tiny", data_dir=parquet_folder.parent)
    second = parquet_folder / "train-00001-of-00002.parquet"
    narrow = pq.read_table(second)
    place = narrow.schema.get_field_index("label")
    pq.write_table(narrow.set_column(place, "label", narrow["label"].cast(pa.int16())), second)
    assert torch.equal(
        load_dataset("tiny", data_dir=parquet_folder.parent).train.y, expected.train.y
    )


def test_a_validation_file_is_used(write_parts: WriteParts) -> None:
    data_dir = write_parts(
        train=table(), validation=table(images=make_images(30, seed=5)), test=table()
    )
    data = load_dataset("tiny", data_dir=data_dir)
    assert (len(data.train), len(data.validation), len(data.test)) == (30, 30, 30)
    assert np.array_equal(data.validation.x.permute(0, 2, 3, 1), make_images(30, seed=5))
    originals = {image.tobytes(): row for row, image in enumerate(make_images(30))}
    rows = [originals[image.tobytes()] for image in data.train.x.permute(0, 2, 3, 1).numpy()]
    assert sorted(rows) == list(range(30))
    assert rows != sorted(rows)  # in random order, as where something was held out
    assert [row % 3 for row in rows] == data.train.y.tolist()


@pytest.mark.parametrize("hashed", ["", "-c08a401c53fe5312"])
def test_shards_that_are_missing_or_of_two_versions(hashed: str, parquet_folder: Path) -> None:
    first, second = sorted(parquet_folder.glob("train-*"))
    for n, shard in enumerate((first, second)):
        shard.rename(parquet_folder / f"train-0000{n}-of-00002{hashed}.parquet")
    assert len(load_dataset("tiny", data_dir=parquet_folder.parent).train) == 54
    first, second = sorted(parquet_folder.glob("train-*"))
    second.rename(parquet_folder / "train-00000-of-00002-1234abcd.parquet")
    with pytest.raises(InputError, match=r"2 files like .*, expected 2, each number once: fetch"):
        load_dataset("tiny", data_dir=parquet_folder.parent)
    (parquet_folder / "train-00000-of-00002-1234abcd.parquet").unlink()
    with pytest.raises(InputError, match="1 files like"):
        load_dataset("tiny", data_dir=parquet_folder.parent)


def test_missing_parts_are_held_out_of_train(write_parts: WriteParts) -> None:
    data = load_dataset("tiny", data_dir=write_parts(train=table()))
    assert (len(data.train), len(data.validation), len(data.test)) == (24, 3, 3)
    images = torch.cat([data.train.x, data.validation.x, data.test.x])
    labels = torch.cat([data.train.y, data.validation.y, data.test.y]).tolist()
    originals = {i.tobytes(): row for row, i in enumerate(make_images(30).transpose(0, 3, 1, 2))}
    rows = [originals[image.tobytes()] for image in images.numpy()]
    assert sorted(rows) == list(range(30))
    assert [LABELS[row] for row in rows] == labels


def test_label_column_and_names(write_parts: WriteParts) -> None:
    fine, coarse = [row % 6 for row in range(30)], LABELS
    names = {"fine_label": list("abcdef"), "coarse_label": ["A", "B", "C"]}
    both = {"coarse_label": coarse, "fine_label": fine}
    # `id` has the most values, but the declared ClassLabels go before it.
    parts = table({"id": list(range(30)), **both}, names=names, image_column="image")
    data = load_dataset("tiny", data_dir=write_parts(train=parts, test=parts))
    assert data.class_names == tuple("abcdef")
    assert data.test.y.tolist() == fine
    parts = table(both)
    data = load_dataset("tiny", data_dir=write_parts(train=parts, test=parts))
    assert data.class_names == tuple("012345")
    parts = table({"label": coarse, "fine_label": fine}, names={"fine_label": list("abcdef")})
    data = load_dataset("tiny", data_dir=write_parts(train=parts, test=parts))
    assert data.test.y.tolist() == coarse


def test_declared_names_fix_the_numbering_also_of_absent_classes(write_parts: WriteParts) -> None:
    labels = [1 + 2 * (row % 2) for row in range(30)]
    parts = table({"label": labels}, names={"label": list("abcde")})
    data = load_dataset("tiny", data_dir=write_parts(train=parts, test=parts))
    assert data.class_names == tuple("abcde")
    assert data.test.y.tolist() == labels


def test_grey_images_have_one_channel_and_grey_in_colour_sets_three(
    write_parts: WriteParts,
) -> None:
    grey = make_images(30, shape=(6, 5))
    parts = table(images=grey)
    data = load_dataset("tiny", data_dir=write_parts(train=parts, test=parts))
    assert np.array_equal(data.test.x[:, 0], grey)
    mixed = image_table([png(make_images(1)[0]), *map(png, grey[1:])], {"label": LABELS})
    data = load_dataset("tiny", data_dir=write_parts(train=mixed, test=mixed))
    assert data.shape == (3, 6, 5)
    assert np.array_equal(data.test.x[1:].permute(0, 2, 3, 1), np.stack([grey[1:]] * 3, axis=-1))


def test_palette_and_transparent_images_become_rgb(write_parts: WriteParts) -> None:
    generator = np.random.default_rng(0)
    alpha = generator.integers(0, 256, (30, 6, 5, 4), dtype=np.uint8)
    parts = table(images=alpha)
    data = load_dataset("tiny", data_dir=write_parts(train=parts, test=parts))
    assert np.array_equal(data.test.x.permute(0, 2, 3, 1), alpha[..., :3])


def encoded_with(bad: object, row: int = 11) -> pa.Table:
    encoded: list = [png(image) for image in make_images(30)]
    encoded[row] = bad
    return image_table(encoded, {"label": LABELS})


def deep_png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(make_images(1, shape=(6, 5))[0].astype(np.uint16) * 200).save(file, "PNG")
    return file.getvalue()


def labelled(*values: object) -> pa.Table:
    return table({"label": list(values) + LABELS[len(values) :]})


PNG = png(make_images(1)[0])
BROKEN: dict[str, tuple[Callable[[], pa.Table], str]] = {
    "no image column": (
        lambda: table(image_column="picture"),
        "no image column among picture, label, expected img or image",
    ),
    "images as text": (
        lambda: pa.table({"image": ["a"] * 30, "label": LABELS}),
        "column image is of type string, expected struct",
    ),
    "no label column": (lambda: table({"caption": ["a"] * 30}), "no label column among img, cap"),
    "labels as text": (lambda: table({"label": ["a", "b", "c"] * 10}), "type string, expected int"),
    "real labels": (lambda: table({"label": [0.0, 1.5, 2.0] * 10}), "type double, expected int"),
    "missing label": (lambda: labelled(0, None), "1 labels in label are missing"),
    "hidden labels": (lambda: table({"label": [-1] * 30}), "label -1 of sample 0 is negative"),
    "one class": (lambda: table({"label": [4] * 30}), r"only one class \(4\)"),
    "label beyond the declared names": (
        lambda: table(names={"label": ("a", "b")}),
        "train label 2 is out of range, 2 classes are declared",
    ),
    "a class of one sample": (lambda: labelled(7), "class 7 has 1 sample,"),
    "no rows": (lambda: table().slice(0, 0), "no samples"),
    "no image at all": (lambda: encoded_with(b"not an image"), "image 11 cannot be decoded"),
    "half an image": (lambda: encoded_with(PNG[: len(PNG) // 2]), "image 11 cannot be decoded"),
    "first image broken": (lambda: encoded_with(b"\x89PNG", 0), "image 0 cannot be decoded"),
    "image without bytes": (lambda: encoded_with(None), "image 11 has no bytes"),
    "16-bit image": (lambda: encoded_with(deep_png()), "image 11 has mode I;16, more than 8"),
    "another size": (
        lambda: encoded_with(png(make_images(1, shape=(6, 6, 3))[0])),
        "image 11 is 6×6 in colour, the first image 5×6 in colour",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_tables(case: str, write_parts: WriteParts) -> None:
    make, message = BROKEN[case]
    with pytest.raises(InputError, match=message) as raised:
        load_dataset("tiny", data_dir=write_parts(train=make(), test=make()))
    assert "train-00000-of-00001.parquet" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_colour_in_a_grey_set(write_parts: WriteParts) -> None:
    grey = [png(image) for image in make_images(29, shape=(6, 5))]
    parts = image_table([*grey, png(make_images(1)[0])], {"label": LABELS})
    with pytest.raises(InputError, match="image 29 is 5×6 in colour, the first image 5×6 in grey"):
        load_dataset("tiny", data_dir=write_parts(train=parts, test=parts))


def test_parts_that_do_not_fit_together(write_parts: WriteParts) -> None:
    with pytest.raises(InputError, match="test label 3 is out of range"):
        load_dataset("tiny", data_dir=write_parts(train=table(), test=labelled(3)))
    with pytest.raises(InputError, match=r"test-00000.*: no column label"):
        load_dataset("tiny", data_dir=write_parts(train=table(), test=table({"fine": LABELS})))
    small = table(images=make_images(30, shape=(4, 4, 3)))
    with pytest.raises(InputError, match="test samples are images of shape 3×4×4"):
        load_dataset("tiny", data_dir=write_parts(train=table(), test=small))


def test_files_that_are_cut_or_missing(parquet_folder: Path) -> None:
    data_dir = parquet_folder.parent
    second = parquet_folder / "train-00001-of-00002.parquet"
    content = second.read_bytes()
    second.write_bytes(content[:-30])
    with pytest.raises(
        InputError, match=r"train-00001-of-00002\.parquet: not a whole Parquet file"
    ):
        load_dataset("tiny", data_dir=data_dir)
    # A hole in the middle, with the footer intact.
    second.write_bytes(content[:200] + bytes(1000) + content[1200:])
    with pytest.raises(InputError, match=r"train-00001-of-00002\.parquet"):
        load_dataset("tiny", data_dir=data_dir)
    second.unlink()
    with pytest.raises(InputError, match=r"1 files like train-00000-of-00002.parquet, expected 2"):
        load_dataset("tiny", data_dir=data_dir)
    (parquet_folder / "train-00000-of-00002.parquet").unlink()
    with pytest.raises(InputError, match=r"no train-\*.parquet there"):
        load_dataset("tiny", data_dir=data_dir)


def claimed_png(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header says how large it is."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        size, check = struct.pack(">I", len(content)), struct.pack(">I", zlib.crc32(kind + content))
        return size + kind + content + check

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("size", "says"),
    [
        (12_000, r"image 0 has 12000×12000 pixels, expected at most 67,108,864: make it smaller"),
        (20_000, r"image 0 cannot be decoded .*400000000 pixels"),
        (8_000, r"30 images of 8000×8000 in colour: 5\.8 GB of memory needed, 1\.1 GB are free"),
    ],
)
def test_images_too_large_are_refused_before_they_are_decoded(
    size: int, says: str, write_parts: WriteParts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available", lambda: 2.0**30)
    parts = image_table([claimed_png(size, size)] * 30, {"label": LABELS})
    data_dir = write_parts(train=parts)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        began = time.process_time()
        with pytest.raises(InputError, match=says):
            load_dataset("tiny", data_dir=data_dir)
    assert time.process_time() - began < 1


def test_labels_that_unpack_to_more_than_there_is(
    write_parts: WriteParts, monkeypatch: pytest.MonkeyPatch
) -> None:
    data_dir = write_parts(train=pa.table({"label": np.zeros(2**21, np.int64)}))
    monkeypatch.setattr(memory, "available", lambda: 2.0**26)
    with pytest.raises(InputError, match=r"train-00000.*parquet: 67 MB of memory needed"):
        load_dataset("tiny", data_dir=data_dir)


def test_an_image_format_for_which_another_program_would_be_run(write_parts: WriteParts) -> None:
    file = io.BytesIO()
    Image.fromarray(make_images(1)[0]).save(file, "EPS")
    parts = image_table([file.getvalue()] * 30, {"label": LABELS})
    with pytest.raises(InputError, match=r"image 0 cannot be decoded \(cannot identify"):
        load_dataset("tiny", data_dir=write_parts(train=parts))
