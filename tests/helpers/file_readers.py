"""Everything that deeplimit reads: a whole file, its reader, and what a right value is."""

import csv
import gzip
import io
import json
import math
import tomllib
import types
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.numpy import load as naive_safetensors

from deeplimit.control import DepthTable, TrajectoryPicture, TurnpikeProfile
from deeplimit.data import Standardisation, load_dataset
from deeplimit.data.arrays import read_idx
from deeplimit.data.images import ImageCache
from deeplimit.meanfield import ConvergenceCertificate
from deeplimit.network import Architecture, save
from deeplimit.network import load as load_network
from deeplimit.ode import DepthLimit
from deeplimit.records import read_record, to_plain
from deeplimit.training import Recipe
from deeplimit.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from deeplimit.training.given_model import load_weights
from deeplimit.training.library_models import (
    PREPROCESSOR,
    preprocessor,
    standardisation_beside,
    transformers_model,
)
from deeplimit.training.progress import COLUMNS, to_csv
from deeplimit.training.results import (
    Cut,
    Healing,
    MergedRuns,
    Plan,
    Profiles,
    Reference,
    Refinement,
)
from deeplimit.training.run_files import Manifest
from deeplimit.training.run_folder import RunFolder

ROWS = 30
LABELS = np.arange(ROWS) % 3


@dataclass(frozen=True)
class Reader:
    """A kind of file.

    Attributes:
        file: its name.
        make: writes whole files into a folder.
        read: reads the folder, through what the package reads it with.
        right: whether what was read is what the file says, by other means; where it cannot be
            known from a damaged file, whether it is what the whole one said.
        kind: how it may be changed besides byte by byte: "json", "toml" or "".
    """

    file: str
    make: Callable[[Path], None]
    read: Callable[[Path], Any]
    right: Callable[[Path, Any], bool]
    kind: str = ""


def sample(hint: Any) -> Any:
    """A value of an annotated type."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return inner[0]
    if origin in (Union, types.UnionType):
        return sample(inner[0])
    if origin is tuple:
        return tuple(map(sample, inner[:1] * 3 if inner[-1] is Ellipsis else inner))
    if origin is dict:
        return {"a.weight": sample(inner[1]), "b": sample(inner[1])}
    if is_dataclass(hint):
        hints = get_type_hints(hint)
        values = {f.name: sample(hints[f.name]) for f in fields(hint)}
        if issubclass(hint, TurnpikeProfile):  # of layers there is one less than of states
            values |= {name: values[name][1:] for name in ("relative_update", "influence")}
        if hint is DepthTable:
            values["recommended"] = 2
        return hint(**values)  # type: ignore[operator]
    return {int: 3, float: 0.375, str: "some text", bool: True}[hint]


def agrees(found: Any, said: Any) -> bool:
    """Whether a record's plain value is what JSON says; all its numbers are finite."""
    if isinstance(said, dict):
        return isinstance(found, dict) and all(agrees(found.get(k), v) for k, v in said.items())
    if isinstance(said, list):
        return len(found) == len(said) and all(map(agrees, found, said))
    if isinstance(found, float) and not math.isfinite(found):
        return False
    return bool(found == said) and isinstance(found, bool) == isinstance(said, bool)


def record(name: str, kind: type[Any]) -> Reader:
    def right(folder: Path, value: Any) -> bool:
        return agrees(to_plain(value), json.loads((folder / name).read_text()))

    return Reader(
        name,
        lambda folder: _write(folder / name, json.dumps(to_plain(sample(kind))).encode()),
        lambda folder: read_record(kind, folder / name, "write it again"),
        right,
        "json",
    )


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def same(arrays: Any, others: Any) -> bool:
    """Equal to the last bit, and finite."""
    return all(
        np.array_equal(a, b) and bool(np.isfinite(a).all())
        for a, b in zip(arrays, others, strict=True)
    )


# Recipes and metrics.


def _recipe_right(folder: Path, value: Any) -> bool:
    recipe, names = value
    tables = tomllib.loads((folder / "recipe.toml").read_text())
    said = {k: v for k, v in tables["recipe"].items() if k != "start"}
    return agrees(to_plain(recipe), said) and list(names) == list(
        tables.get("data", {}).get("class_names", [])
    )


def _read_recipe(folder: Path) -> Any:
    run = RunFolder.open(folder)
    return run.recipe, run.class_names


def _make_recipe(folder: Path) -> None:
    recipe = Recipe(data="digits", depth=(3, 4), kind="convolutional", reduction=2, epochs=5)
    (folder / "recipe.toml").write_text(recipe.to_toml(["zero", "one"]))


def _make_metrics(folder: Path) -> None:
    _make_recipe(folder)
    rows = [dict.fromkeys(COLUMNS, 0.375) | {"epoch": e + 1.0, "entry": 2.0} for e in range(4)]
    (folder / "metrics.csv").write_text(to_csv(rows))  # type: ignore[arg-type]


def _metrics_right(folder: Path, rows: Any) -> bool:
    text = (folder / "metrics.csv").read_text(encoding="utf-8")
    said = list(csv.DictReader(io.StringIO(text)))
    told = [{k: float(v) if v else None for k, v in row.items()} for row in said]
    numbers = [v for row in rows for v in row.values() if v is not None]
    return (
        len(rows) == len(told)
        and not any(map(math.isnan, numbers))
        and all(
            row[k] == v for row, other in zip(rows, told, strict=True) for k, v in other.items()
        )
    )


# Data sets.


def _idx(content: bytes) -> np.ndarray:
    start = 4 + 4 * content[3]
    shape = np.frombuffer(content[4:start], ">u4").astype(int)
    return np.frombuffer(content[start:], np.uint8).reshape(shape)


PIXELS = np.random.default_rng(0).integers(0, 256, (ROWS, 4, 5), dtype=np.uint8)
IDX = bytes([0, 0, 8, 3]) + np.array(PIXELS.shape, ">u4").tobytes() + PIXELS.tobytes()


def idx(name: str, pack: Callable[[bytes], bytes], unpack: Callable[[bytes], bytes]) -> Reader:
    return Reader(
        name,
        lambda folder: _write(folder / name, pack(IDX)),
        lambda folder: read_idx(folder / name, 3),
        lambda folder, x: same([x], [_idx(unpack((folder / name).read_bytes()))]),
    )


VECTORS = np.random.default_rng(0).normal(size=(ROWS, 4))


def _of_set(data: Any) -> tuple[np.ndarray, np.ndarray]:
    """The samples and class names of a set, in an order of its own."""
    splits = (data.train, data.validation, data.test)
    x = torch.cat([s.x for s in splits]).numpy()
    names = np.array(data.class_names)[torch.cat([s.y for s in splits]).numpy()]
    order = np.lexsort([*x.reshape(len(x), -1).T[::-1], names])
    return x[order], names[order]


def _npz_right(data: Any, x: np.ndarray) -> bool:
    """What checksums let pass is what was written."""
    names = LABELS.astype(str)
    wide = x.astype(np.float32 if data.train.x.dtype == torch.float32 else np.float64)
    order = np.lexsort([*wide.reshape(len(x), -1).T[::-1], names])
    found, labels = _of_set(data)
    return same([found], [wide[order]]) and bool((labels == names[order]).all())


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _make_parquet(folder: Path) -> None:
    (folder / "tiny").mkdir()
    images = [{"bytes": _png(pixels), "path": None} for pixels in PIXELS]
    table = pa.table({"img": images, "label": LABELS})
    pq.write_table(table, folder / "tiny" / "train.parquet")


def _parquet_right(folder: Path, data: Any) -> bool:
    rows = pq.read_table(folder / "tiny" / "train.parquet").to_pylist()
    images = [np.asarray(Image.open(io.BytesIO(row["img"]["bytes"]))) for row in rows]
    x, names = np.stack(images)[:, None], np.array([str(row["label"]) for row in rows])
    order = np.lexsort([*x.reshape(len(x), -1).T[::-1], names])
    found, labels = _of_set(data)
    return same([found], [x[order]]) and bool((labels == names[order]).all())


CACHE = "train-key-1x4x5.npy"


def _cached(folder: Path) -> np.ndarray:
    return ImageCache(folder, "key").get("train", ROWS, lambda: PIXELS[:, None])


def _cache_right(folder: Path, x: np.ndarray) -> bool:
    said = (folder / CACHE).read_bytes()[-PIXELS.nbytes :]
    return x.shape == (ROWS, 1, 4, 5) and x.tobytes() in (said, PIXELS.tobytes())


# Networks.


def _network() -> Any:
    torch.manual_seed(0)
    return Architecture("vector", (3,), 2, (2,), 4, 4).build()


def _network_right(folder: Path, model: Any) -> bool:
    said = naive_safetensors((folder / "model.safetensors").read_bytes())
    found = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    return found.keys() == said.keys() and same(found.values(), [said[name] for name in found])


def _make_weights(folder: Path) -> None:
    torch.save(_network().state_dict(), folder / "weights.pt")


def _weights(folder: Path, name: str) -> Any:
    model = _network()
    load_weights(model, folder / name, "the model")
    return model


def _weights_right(folder: Path, model: Any) -> bool:
    return same(model.state_dict().values(), _network().state_dict().values())


def _checkpoint() -> Checkpoint:
    model = _network()
    state = {name: torch.full_like(w, 0.5) for name, w in model.named_parameters()}
    row = dict.fromkeys(COLUMNS, 0.375)
    return Checkpoint(model.state_dict(), {"state": state}, {"total_steps": 9}, 3, [row])  # type: ignore[list-item]


def _checkpoint_right(folder: Path, found: Any) -> bool:
    whole = _checkpoint()
    return (
        same(found.model.values(), whole.model.values())
        and same(found.optimizer["state"].values(), whole.optimizer["state"].values())
        and (found.scheduler, found.step, found.rows) == (whole.scheduler, whole.step, whole.rows)
    )


CONFIG = {
    "model_type": "vit",
    "architectures": ["ViTForImageClassification"],
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 1,
    "id2label": {"0": "a", "1": "b"},
}


def _config_right(folder: Path, loaded: Any) -> bool:
    said = json.loads((folder / "config.json").read_text())
    found = loaded.model.config.to_dict()
    return all(found[name] == said[name] for name in CONFIG if name in said and name != "id2label")


SCALE = Standardisation((0.5, 0.25), (0.125, 1.0))


def _scale_right(folder: Path, found: Any) -> bool:
    """(f·p − mean) / std of pixels p in 0 … 255 is (p/255 − found.mean) / found.std."""
    given = {"do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255}
    said = json.loads((folder / PREPROCESSOR).read_text())
    given |= {name: value for name, value in said.items() if value is not None}
    factor = given["rescale_factor"] if given["do_rescale"] else 1.0
    plain = {"image_mean": 0.0, "image_std": 1.0}
    mean, std = (np.broadcast_to((given if given["do_normalize"] else plain)[n], 2) for n in plain)
    pixels = np.array([0, 255])
    with np.errstate(over="ignore"):
        wanted = (factor * pixels[:, None] - mean) / std
        return np.allclose((pixels[:, None] / 255 - found.mean) / found.std, wanted, rtol=1e-9)


READERS = [
    record("profile.json", Profiles),
    record("trajectories.json", TrajectoryPicture),
    record("crop.json", Cut),
    record("heal.json", Healing),
    record("plan.json", Plan),
    record("refine.json", Refinement),
    record("merge.json", MergedRuns),
    record("reference.json", Reference),
    record("ode.json", DepthLimit),
    record("certificate.json", ConvergenceCertificate),
    record("run.json", Manifest),
    Reader("recipe.toml", _make_recipe, _read_recipe, _recipe_right, "toml"),
    Reader(
        "metrics.csv",
        _make_metrics,
        lambda folder: RunFolder.open(folder).metrics(),
        _metrics_right,
    ),
    idx("x-idx3-ubyte", bytes, bytes),
    idx("x-idx3-ubyte.gz", gzip.compress, gzip.decompress),
    Reader(
        "set.npz",
        lambda folder: np.savez(folder / "set.npz", x=VECTORS, y=LABELS),
        lambda folder: load_dataset(f"npz:{folder / 'set.npz'}"),
        lambda _, data: _npz_right(data, VECTORS),
    ),
    Reader(
        "packed/set.npz",
        lambda folder: (
            (folder / "packed").mkdir(),
            np.savez_compressed(folder / "packed" / "set.npz", x=PIXELS[:, None], y=LABELS),
        )[1],
        lambda folder: load_dataset(f"npz:{folder / 'packed' / 'set.npz'}"),
        lambda _, data: _npz_right(data, PIXELS[:, None]),
    ),
    Reader(
        "tiny/train.parquet",
        _make_parquet,
        lambda folder: load_dataset("tiny", data_dir=folder),
        _parquet_right,
    ),
    Reader(CACHE, lambda folder: np.save(folder / CACHE, PIXELS[:, None]), _cached, _cache_right),
    Reader(
        "model.safetensors",
        lambda folder: _nothing(save(_network(), folder / "model.safetensors")),
        lambda folder: load_network(folder / "model.safetensors"),
        _network_right,
    ),
    Reader(
        "weights.pt", _make_weights, lambda folder: _weights(folder, "weights.pt"), _weights_right
    ),
    Reader(
        "checkpoint/epoch-00001.pt",
        lambda folder: save_checkpoint(folder, _checkpoint()),
        load_checkpoint,
        _checkpoint_right,
    ),
    Reader(
        "config.json",
        lambda folder: _write(folder / "config.json", json.dumps(CONFIG).encode()),
        lambda folder: transformers_model(str(folder / "config.json"), 2),
        _config_right,
        "json",
    ),
    Reader(
        PREPROCESSOR,
        lambda folder: _write(folder / PREPROCESSOR, json.dumps(preprocessor(SCALE)).encode()),
        lambda folder: standardisation_beside(folder, 2),
        _scale_right,
        "json",
    ),
]


def _nothing(_: Any) -> None:
    pass
