"""Starts of a stage's controls: the Gaussian process's law, what stays as it is, which blocks."""

import copy
import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from deeplimit.errors import InputError
from deeplimit.network import (
    Architecture,
    CifarArchitecture,
    CifarResNet,
    ConvolutionalResidual,
    LinearResidual,
    ResidualClassifier,
    TwoLayerResidual,
    identical_start,
    initialise,
    smooth_start,
)
from deeplimit.network.blocks import parameter_groups

IMAGE = (3, 8, 8)
NETWORKS: dict[str, Callable[[], ResidualClassifier | CifarResNet]] = {
    "vector": lambda: Architecture("vector", (6,), 4, (7,), 5, 6).build(),
    "vector, Heun": lambda: Architecture("vector", (6,), 4, (7,), 5, 6, scheme="heun").build(),
    "logit": lambda: Architecture("logit", (6,), 4, (7,), 4, 6).build(),
    "convolutional": lambda: Architecture("convolutional", IMAGE, 4, (5, 4), 4, 4).build(),
    "cifar-resnet": lambda: CifarResNet(CifarArchitecture((3, 4, 3))),
}


def drawn(make: Callable[[], nn.Module], count: int, seed: int = 0) -> list[nn.Module]:
    torch.manual_seed(seed)
    return [make().double() for _ in range(count)]


def stacked(blocks: list[nn.Module], name: str) -> Tensor:
    return torch.stack([block.get_parameter(name).detach() for block in blocks])


def naive_kernel(count: int, length_scale: float) -> Tensor:
    """k(s_n, s_m), entry by entry, s_n = n/N."""
    return torch.tensor(
        [
            [math.exp(-(((n - m) / count) ** 2) / (2 * length_scale**2)) for m in range(count)]
            for n in range(count)
        ],
        dtype=torch.float64,
    )


@pytest.mark.parametrize("length_scale", [0.05, 0.3, 2.0])
def test_the_numbers_covariance_in_depth_is_the_kernel(length_scale: float) -> None:
    """Over 20,000 numbers of the blocks; the error of a sample covariance is about 1/√20000."""
    count, width = 6, 142
    torch.manual_seed(0)
    blocks: list[nn.Module] = [LinearResidual(width).double() for _ in range(count)]
    variance = 1 / (3 * width)  # PyTorch's: uniform on ±1/√width
    smooth_start(blocks, length_scale)
    theta = stacked(blocks, "weight").flatten(1)
    assert theta.mean(dim=1).abs().max() < 4 * math.sqrt(variance / theta.shape[1])
    covariance = theta @ theta.T / theta.shape[1] / variance
    assert torch.allclose(covariance, naive_kernel(count, length_scale), atol=0.03)


@pytest.mark.slow
def test_numbers_are_independent_of_each_other() -> None:
    """Of 1,500 draws of tiny blocks: only a number's own curve is correlated in depth."""
    blocks = drawn(lambda: LinearResidual(2), 3)
    draws = []
    for _ in range(1500):
        for block in blocks:
            block.reset_parameters()  # type: ignore[operator]
        smooth_start(blocks, 0.5)
        draws.append(stacked(blocks, "weight").flatten())
    sample = torch.stack(draws)
    covariance = sample.T @ sample / len(draws) * 6  # the variance is 1/(3·2)
    expected = torch.kron(naive_kernel(3, 0.5), torch.eye(4, dtype=torch.float64))
    assert torch.allclose(covariance, expected, atol=5 / math.sqrt(1500))


def test_the_mixture_is_the_square_root_of_the_kernel_times_the_draws() -> None:
    """That root R, read off the blocks themselves (unit vectors in), has R = Rᵀ and R R = K."""
    count = 9
    blocks = drawn(lambda: LinearResidual(count), count)
    with torch.no_grad():
        for n, block in enumerate(blocks):
            block.weight.zero_()  # type: ignore[operator]
            block.weight[0, n] = 1.0  # type: ignore[index]
    smooth_start(blocks, 0.2)
    root = stacked(blocks, "weight")[:, 0]
    assert torch.allclose(root, root.T, atol=1e-12)
    assert torch.allclose(root @ root, naive_kernel(count, 0.2), atol=1e-12)


def test_extreme_length_scales_are_the_other_starts() -> None:
    blocks = drawn(lambda: TwoLayerResidual(3, 4), 20)
    before = copy.deepcopy(blocks)
    smooth_start(blocks, 1e-4)
    for name, _ in before[0].named_parameters():
        assert torch.allclose(stacked(blocks, name), stacked(before, name), atol=1e-12)
    smooth_start(blocks, 1e9)
    for name, _ in blocks[0].named_parameters():
        theta = stacked(blocks, name)
        assert torch.allclose(theta, theta[:1].expand_as(theta), atol=1e-6)
        assert torch.allclose(theta[0], stacked(before, name).sum(0) / math.sqrt(20), atol=1e-6)


def test_what_is_constant_stays_number_by_number() -> None:
    blocks = drawn(lambda: ConvolutionalResidual(2, 3, "batch"), 8)
    with torch.no_grad():
        for block in blocks:
            block.conv1.weight[0].zero_()  # type: ignore[index]
    before = copy.deepcopy(blocks)
    smooth_start(blocks, 0.5)
    for block, own in zip(blocks, before, strict=True):
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
            assert torch.equal(block.get_parameter(name), own.get_parameter(name))
        assert torch.equal(block.conv1.weight[0], own.conv1.weight[0])  # type: ignore[index]
        assert not torch.equal(block.conv1.weight[1], own.conv1.weight[1])  # type: ignore[index]
        for name, buffer in block.named_buffers():
            assert torch.equal(buffer, own.get_buffer(name))


def test_parameters_stay_the_same_objects_and_kinds() -> None:
    blocks: list[nn.Module] = [LinearResidual(3) for _ in range(4)]
    parameters = [block.weight for block in blocks]
    smooth_start(blocks, 0.5)
    for block, parameter in zip(blocks, parameters, strict=True):
        assert block.weight is parameter
        assert parameter.dtype == torch.float32
        assert parameter.requires_grad
        assert parameter.grad_fn is None


def test_identical_blocks_have_copies_of_the_first() -> None:
    blocks = drawn(lambda: TwoLayerResidual(3, 4), 5)
    first = copy.deepcopy(blocks[0])
    identical_start(blocks)
    for block in blocks:
        for (_, p), q in zip(block.named_parameters(), first.parameters(), strict=True):
            assert torch.equal(p, q)
    with torch.no_grad():
        blocks[1].inner.weight.zero_()  # type: ignore[union-attr, operator]
    assert not torch.equal(blocks[1].inner.weight, blocks[2].inner.weight)  # type: ignore


@pytest.mark.parametrize("name", NETWORKS)
def test_only_the_alike_blocks_of_each_stage_change(name: str) -> None:
    torch.manual_seed(0)
    built = NETWORKS[name]()
    own = copy.deepcopy(built)
    state = torch.random.get_rng_state()
    initialise(own, "independent", 0.5)
    assert all(torch.equal(p, q) for p, q in _pairs(own, built))
    initialise(own, "smooth", 0.5)
    assert torch.equal(torch.random.get_rng_state(), state)
    changed = {
        key
        for key, value in own.state_dict().items()
        if not torch.equal(value, built.state_dict()[key])
    }
    if name == "cifar-resnet":
        convolutions = {f"layer{m}.{i}.conv{c}.weight" for m, i, c in np.ndindex(4, 5, 3)}
        strided = {f"layer{m}.0.conv{c}.weight" for m in (2, 3) for c in (1, 2)}
        expected = {k for k in built.state_dict() if k in convolutions} - strided
    elif name == "convolutional":
        counts = {0: 5, 1: 4}
        expected = {
            f"stages.{m}.{i}.conv{c}.weight"
            for m in counts
            for i in range(counts[m])
            for c in (1, 2)
        }
    else:
        count = 8 if "Heun" in name else 7
        expected = {f"stages.0.{i}.inner.{p}" for i in range(count) for p in ("weight", "bias")}
    assert changed == expected


def _pairs(a: nn.Module, b: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(a.state_dict().values(), b.state_dict().values(), strict=True)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_s_starts_are_those_of_its_blocks(name: str) -> None:
    torch.manual_seed(0)
    built = NETWORKS[name]()
    smooth, identical = copy.deepcopy(built), copy.deepcopy(built)
    initialise(smooth, "smooth", 0.4)
    initialise(identical, "identical", 0.5)
    for m, stage in enumerate(built.stages):
        strided = name == "cifar-resnet" and m > 0
        alike = list(stage)[strided:]
        smooth_start(alike, 0.4)
        for block, own in zip(alike, list(smooth.stages[m])[strided:], strict=True):
            assert all(torch.equal(p, q) for p, q in _pairs(block, own))
        same = list(identical.stages[m])[strided:]
        assert all(torch.equal(p, q) for block in same for p, q in _pairs(block, same[0]))


def test_empty_and_single_stages_are_left_alone() -> None:
    smooth_start([], 0.5)
    identical_start([])
    (block,) = drawn(lambda: LinearResidual(2), 1)
    before = block.weight.clone()  # type: ignore[operator]
    smooth_start([block], 0.5)
    assert torch.equal(block.weight, before)  # type: ignore[arg-type]


WRONG = {
    "names": ([LinearResidual(4), nn.Linear(4, 4, bias=True)], "block 0 has 1 parameters, block 1"),
    "shapes": ([LinearResidual(4), LinearResidual(5)], r"block 0 .* weight \[4, 4\] where block 1"),
    "kinds": ([LinearResidual(4), TwoLayerResidual(4, 4)], "where block 1 has inner.weight"),
    "meta": ([LinearResidual(4), LinearResidual(4).to("meta")], "1.weight is on the meta device"),
}


@pytest.mark.parametrize("case", WRONG)
def test_blocks_that_are_not_alike_are_refused(case: str) -> None:
    blocks, message = WRONG[case]
    for start in (lambda: smooth_start(blocks, 0.5), lambda: identical_start(blocks)):
        with pytest.raises(InputError, match=message):
            start()


def test_numbers_that_are_not_finite_are_refused() -> None:
    blocks = drawn(lambda: LinearResidual(2), 2)
    with torch.no_grad():
        blocks[1].weight[0, 0] = math.inf  # type: ignore[index]
    with pytest.raises(InputError, match=r"1\.weight has numbers that are not finite"):
        smooth_start(blocks, 0.5)


@pytest.mark.parametrize("length_scale", [0.0, -1.0, math.nan, math.inf])
def test_length_scales_are_positive(length_scale: float) -> None:
    with pytest.raises(InputError, match=r"the length scale is .*expected a number above 0"):
        smooth_start([LinearResidual(2)], length_scale)


def test_groups_are_the_blocks_own_parameters() -> None:
    blocks = drawn(lambda: TwoLayerResidual(2, 3), 3)
    groups = parameter_groups(blocks)
    assert list(groups) == ["inner.weight", "inner.bias", "outer.weight"]
    assert all(p is block.inner.bias for p, block in zip(groups["inner.bias"], blocks, strict=True))
