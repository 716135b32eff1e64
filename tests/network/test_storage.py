"""Networks on disk: the same to the last bit, without training code, whole or not there."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from model_families import FAMILIES, Sample, sample
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from deeplimit import InputError, ResidualChain
from deeplimit.errors import RunError
from deeplimit.network import Architecture, CifarResNet, load, save, storage

STORED = [name for name in FAMILIES if not name.startswith("chain")]


@pytest.fixture(params=STORED)
def stored(request: pytest.FixtureRequest) -> Sample:
    return sample(request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_loaded_network_gives_the_same_output_bit_for_bit(
    stored: Sample, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = stored.model.to(dtype).eval()
    if isinstance(model, CifarResNet):
        model.standardise(torch.tensor([0.1, 0.2, 0.7]), torch.tensor([0.3, 0.9, 1.1]))
    path = save(model, tmp_path / "network.safetensors")
    assert path == tmp_path / "network.safetensors"
    loaded = load(path)
    assert type(loaded) is type(model)
    assert loaded.architecture == model.architecture
    assert not any(module.training for module in loaded.modules())
    state, other = model.state_dict(), loaded.state_dict()
    assert list(state) == list(other)
    assert all(torch.equal(state[key], other[key]) for key in state)
    assert all(state[key].dtype == other[key].dtype for key in state)
    x = stored.x.to(dtype)
    assert torch.equal(model(x), loaded(x))
    assert all(p.requires_grad for p in loaded.parameters())


def test_saving_leaves_the_mode_alone(tmp_path: Path) -> None:
    model = sample("vector").model
    save(model, tmp_path / "network")
    assert model.training
    assert [p.name for p in tmp_path.iterdir()] == ["network"]


def test_the_file_says_what_it_is(tmp_path: Path) -> None:
    save(sample("vector").model, tmp_path / "network")
    with safe_open(tmp_path / "network", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["deeplimit.format"] == "1"
    assert metadata["deeplimit.kind"] == "ResidualClassifier"
    assert json.loads(metadata["deeplimit.architecture"])["depths"] == [4]


@pytest.mark.slow
def test_loading_needs_no_training_code(tmp_path: Path) -> None:
    wanted = sample("three stages, batch")
    save(wanted.model.eval(), tmp_path / "network")
    torch.save((wanted.x, wanted.model(wanted.x).detach()), tmp_path / "expected")
    script = """
import sys, torch
from pathlib import Path
from deeplimit.network import load
folder = Path(sys.argv[1])
x, expected = torch.load(folder / "expected", weights_only=True)
assert torch.equal(load(folder / "network")(x), expected)
print(*sorted({name.split(".")[1] for name in sys.modules if name.startswith("deeplimit.")}))
print(*sorted({"lightning", "lightning_fabric", "sklearn", "pyarrow", "plotly"} & set(sys.modules)))
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ours, theirs = done.stdout.split("\n")[:2]
    assert "network" in ours.split()
    assert not {"training", "data", "studies", "report", "cli"} & set(ours.split())
    assert theirs.split() == []


def _file(tmp_path: Path) -> Path:
    return save(sample("vector").model, tmp_path / "network")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere: no such file"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, keep: int) -> None:
    path = _file(tmp_path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match="damaged or not a safetensors file"):
        load(path)


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "network"
    save_file({"weight": torch.ones(3)}, path)
    with pytest.raises(InputError, match=r"format None, expected '1'.*another program"):
        load(path)
    path.write_bytes(b"PK\x03\x04 certainly no safetensors")
    with pytest.raises(InputError, match="damaged or not a safetensors file"):
        load(path)


def _rewritten(path: Path, **changes: str) -> Path:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    save_file(weights, path, metadata=metadata | {f"deeplimit.{k}": v for k, v in changes.items()})
    return path


def test_another_version_of_the_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"format '2', expected '1'.*another version"):
        load(_rewritten(_file(tmp_path), format="2"))


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "Transformer"},
        {"architecture": "{"},
        {"architecture": "[]"},
        {"architecture": '{"kind": "vector"}'},
        {"architecture": '{"unheard": 1}'},
    ],
)
def test_damaged_metadata_is_refused(tmp_path: Path, changes: dict[str, str]) -> None:
    with pytest.raises(InputError, match="weights and architecture do not fit"):
        load(_rewritten(_file(tmp_path), **changes))


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    other = json.dumps(sample("logit").model.architecture.to_dict())
    with pytest.raises(InputError, match="weights and architecture do not fit"):
        load(_rewritten(_file(tmp_path), architecture=other))


def test_a_failing_write_leaves_the_old_file(tmp_path: Path, monkeypatch) -> None:
    path = _file(tmp_path)
    before = path.read_bytes()

    def full_disk(weights: dict, aside: Path, **_: object) -> None:
        aside.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "save_file", full_disk)
    with pytest.raises(RunError, match="No space left on device; free some space"):
        save(sample("logit").model, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["network"]
    monkeypatch.undo()
    save(sample("logit").model, path)
    assert load(path).architecture.kind == "logit"


@pytest.mark.parametrize("model", [ResidualChain([]), nn.Linear(2, 2)])
def test_models_without_an_architecture_are_refused(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no architecture to store; expected Residual"):
        save(model, tmp_path / "network")
    assert list(tmp_path.iterdir()) == []


def rewritten(path: Path, tensors: dict[str, Tensor], **architecture: object) -> None:
    """The file again with other tensors, and other values in its architecture."""
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    values = json.loads(metadata["deeplimit.architecture"]) | architecture
    metadata["deeplimit.architecture"] = json.dumps(values)
    save_file(tensors, path, metadata=metadata)


@pytest.mark.parametrize(
    "architecture",
    [{"depths": [10**12]}, {"width": 10**9, "hidden": 10**9}, {"hidden": 2**62}, {"depths": {}}],
)
def test_an_architecture_larger_than_its_weights_is_refused_at_once(
    architecture: dict[str, object], tmp_path: Path
) -> None:
    path = save(Architecture("vector", (3,), 2, (2,), 4, 4).build(), tmp_path / "network")
    rewritten(path, load_file(path), **architecture)
    began = time.process_time()
    with pytest.raises(InputError, match="weights and architecture do not fit"):
        load(path)
    assert time.process_time() - began < 1


def test_weights_that_are_no_numbers_of_one_precision_are_refused(tmp_path: Path) -> None:
    path = save(Architecture("vector", (3,), 2, (2,), 4, 4).build(), tmp_path / "network")
    good, name = load_file(path), "head.weight"
    for bad, says in (
        (good[name].view(torch.int32), "head.weight is torch.int32"),
        (good[name].double(), "head.weight is torch.float64, others are torch.float32"),
        (good[name] * torch.inf, "head.weight is not finite: its training diverged"),
    ):
        rewritten(path, good | {name: bad})
        with pytest.raises(InputError, match=says):
            load(path)
    rewritten(path, good)
    assert torch.equal(load(path).state_dict()[name], good[name])
