"""The CIFAR ResNet against a functional one, its shortcut against a loop, its published weights."""

import copy
import io
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from model_families import shaken
from naive_networks import naive_cifar_resnet, option_a
from safetensors.torch import load_file, save_file
from torch import Tensor

from deeplimit import InputError
from deeplimit.network import CifarArchitecture, CifarResNet
from deeplimit.network.cifar_resnet import Shortcut

STATED = {20: 0.810, 32: 0.826, 56: 0.832}  # ../shared/data/README.md, on these JPEGs
FIRST_THOUSAND = {32: 840, 56: 825}  # right answers among the first 1,000, measured here


def images(side: int = 8, count: int = 4) -> Tensor:
    shape = (count, 3, side, side)
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)).double()


@pytest.mark.parametrize("side", [7, 8])
def test_option_a_shortcut_is_the_loop(side: int) -> None:
    x = torch.randn(2, 6, side, side, generator=torch.Generator().manual_seed(0)).double()
    assert torch.equal(Shortcut(6, 12)(x), option_a(x))
    assert list(Shortcut(6, 12).parameters()) == []


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "architecture",
    [
        CifarArchitecture((2, 2, 2)),
        CifarArchitecture((1, 2, 1)),
        CifarArchitecture((0, 1, 2), (False, True)),
        CifarArchitecture((1, 0, 0), (False, False)),
    ],
)
def test_forward_is_the_functional_one(architecture: CifarArchitecture, training: bool) -> None:
    model = shaken(architecture.build()).train(training)
    naive = copy.deepcopy(model)
    walk, logits = naive_cifar_resnet(naive, images())
    assert torch.allclose(model(images()), logits, rtol=1e-11, atol=1e-12)
    assert len(walk) == sum(architecture.depths) + 1


def test_resnet_20_has_the_published_size_and_keys() -> None:
    model = CifarResNet(CifarArchitecture((3, 3, 3)))
    # Table 6 of He et al. 2015: 0.27 M parameters.
    assert sum(p.numel() for p in model.parameters()) == 269_722
    keys = list(model.state_dict())
    assert keys[0] == "conv1.weight"
    assert "layer2.0.conv1.weight" in keys
    assert "layer3.2.bn2.running_var" in keys
    assert keys[-2:] == ["linear.weight", "linear.bias"]
    assert not {"mean", "std"} & set(keys)


@pytest.mark.parametrize("depth", STATED)
def test_published_weights_load_as_they_are(data_dir: Path, depth: int) -> None:
    path = data_dir / "weights" / f"cifar10-resnet{depth}.safetensors"
    model = CifarResNet.from_weights(path)
    assert model.architecture.depths == ((depth - 2) // 6,) * 3
    weights = load_file(path)
    state = model.state_dict()
    counters = {key for key in state if key.endswith("num_batches_tracked")}  # not published
    assert set(weights) == set(state) - counters
    assert all(state[key] == 0 for key in counters)
    assert all(torch.equal(weights[key], state[key]) for key in weights)


@pytest.fixture(scope="session")
def test_images(data_dir: Path) -> tuple[Tensor, Tensor]:
    """The 10,000 test images as uint8 [n, 3, 32, 32], decoded here and not by the data room."""
    from PIL import Image
    from pyarrow import parquet

    table = parquet.read_table(next((data_dir / "cifar10").glob("test-*.parquet")))
    encoded = [image["bytes"] for image in table["img"].to_pylist()]
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(b)).convert("RGB")) for b in encoded])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.tensor(table["label"].to_numpy())


def right_answers(depth: int, data_dir: Path, x: Tensor, y: Tensor) -> int:
    path = data_dir / "weights" / f"cifar10-resnet{depth}.safetensors"
    model = CifarResNet.from_weights(path).eval()

    @torch.inference_mode()
    def right(batch: tuple[Tensor, Tensor]) -> int:
        images, labels = batch
        return int((model(images.float() / 255).argmax(1) == labels).sum())

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return sum(pool.map(right, zip(x.split(125), y.split(125), strict=True)))


@pytest.mark.slow
def test_resnet_20_reproduces_its_accuracy(data_dir: Path, test_images) -> None:
    assert right_answers(20, data_dir, *test_images) / 10_000 == pytest.approx(STATED[20], abs=6e-4)


@pytest.mark.slow
@pytest.mark.parametrize("depth", FIRST_THOUSAND)
def test_deeper_ones_reproduce_theirs_on_a_part(data_dir: Path, test_images, depth: int) -> None:
    """On all 10,000: 82.56 % and 83.20 %, as stated; that takes two minutes on one core."""
    x, y = test_images
    right = right_answers(depth, data_dir, x[:1000], y[:1000])
    assert abs(right - FIRST_THOUSAND[depth]) <= 2


def test_standardisation_is_published_or_set() -> None:
    model = CifarResNet(CifarArchitecture((1, 1, 1))).eval()
    x = images().float()
    seen: list[Tensor] = []
    model.conv1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(x)
    for channel, (mean, std) in enumerate([(0.485, 0.229), (0.456, 0.224), (0.406, 0.225)]):
        assert torch.allclose(seen[0][:, channel], (x[:, channel] - mean) / std, atol=1e-6)
    model.standardise(torch.tensor([0.0, 0.25, 0.5]), torch.tensor([1.0, 2.0, 4.0]))(x)
    assert torch.equal(seen[1][:, 2], (x[:, 2] - 0.5) / 4)
    assert model.architecture.mean == (0.0, 0.25, 0.5)
    assert model.architecture.std == (1.0, 2.0, 4.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depths": (1, 1)}, "give three numbers"),
        ({"depths": (1, -1, 1)}, "depths is 1 -1 1; expected at least 0"),
        ({"depths": (1, 0, 1)}, "cannot begin with one"),
    ],
)
def test_impossible_architectures_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        CifarArchitecture(**settings)


def test_files_that_are_no_such_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a readable safetensors file"):
        CifarResNet.from_weights(tmp_path / "none.safetensors")
    (tmp_path / "text").write_text("no weights")
    with pytest.raises(InputError, match="not a readable safetensors file"):
        CifarResNet.from_weights(tmp_path / "text")
    save_file({"weight": torch.ones(2)}, tmp_path / "other")
    with pytest.raises(InputError, match="no CIFAR ResNet in it"):
        CifarResNet.from_weights(tmp_path / "other")
    weights = CifarResNet(CifarArchitecture((1, 1, 1))).state_dict()
    save_file({k: v for k, v in weights.items() if k != "bn1.bias"}, tmp_path / "lacking")
    with pytest.raises(InputError, match=r"not the weights of a CIFAR ResNet.*bn1\.bias"):
        CifarResNet.from_weights(tmp_path / "lacking")
