"""Smoothness in depth: against loops, on controls of known kind, under what must not matter."""

import copy
import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_families import FAMILIES, sample
from torch import nn

from deeplimit.errors import InputError
from deeplimit.network import (
    CifarResNet,
    ConvolutionalResidual,
    Heun,
    LinearResidual,
    ResidualChain,
    TwoLayerResidual,
    identical_start,
    smooth_start,
)
from deeplimit.ode import smoothness
from deeplimit.ode.field import stages
from deeplimit.ode.limit import ROUGH, SMOOTH

BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: LinearResidual(12),
    "two-layer": lambda: TwoLayerResidual(8, 16, "tanh"),
    "convolutional": lambda: ConvolutionalResidual(4, 6, "batch"),
}
LENGTH_SCALE = 0.5
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def chain(blocks: str, count: int, start: float | str = "independent", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    made = [BLOCKS[blocks]().double() for _ in range(count)]
    if isinstance(start, float):
        smooth_start(made, start)
    elif start == "identical":
        identical_start(made)
    return ResidualChain(made, step=1 / count)


def roughness(model: nn.Module) -> float:
    (stage,) = smoothness(model).stages
    return stage.roughness


def naive(blocks: list[nn.Module], horizon: int) -> tuple[dict[str, list[float]], list[float]]:
    """The docstring's formulas, number by number."""
    named = [dict(block.named_parameters()) for block in blocks]
    speeds: dict[str, list[float]] = {}
    for name in named[0]:
        theta = [p[name].detach().flatten().tolist() for p in named]
        size = math.sqrt(sum(sum(v**2 for v in t) for t in theta) / len(theta))
        speeds[name] = []
        for n in range(len(theta) - 1):
            pairs = zip(theta[n], theta[n + 1], strict=True)
            change = math.sqrt(sum((b - a) ** 2 for a, b in pairs))
            speeds[name].append(horizon * change / size if size > 0 else 0.0)
    counts = {name: p.numel() for name, p in named[0].items()}
    alive = [name for name in counts if any(bool(p[name].any()) for p in named)]
    overall = [
        math.sqrt(sum(counts[g] * speeds[g][n] ** 2 for g in alive) / sum(counts[g] for g in alive))
        for n in range(len(blocks) - 1)
    ]
    return speeds, overall


@pytest.mark.parametrize("family", FAMILIES)
def test_figures_are_those_of_loops(family: str) -> None:
    model = sample(family).model
    try:
        found = stages(model)
    except InputError:
        with pytest.raises(InputError, match="no stage of two layers"):
            smoothness(model)
        return
    measured = smoothness(model)
    assert len(measured.stages) == len(found)
    for own, stage in zip(measured.stages, found, strict=True):
        speeds, overall = naive(list(stage.blocks), stage.horizon)
        assert (own.stage, own.first, own.horizon) == (stage.index, stage.first, stage.horizon)
        assert own.groups.keys() == speeds.keys()
        for name, expected in speeds.items():
            assert own.groups[name] == pytest.approx(expected, rel=1e-12, abs=1e-12)
        assert own.overall == pytest.approx(overall, rel=1e-12)
        mean = sum(v**2 for v in overall) / len(overall)
        assert own.roughness == pytest.approx(math.sqrt(mean / 2) / stage.horizon, rel=1e-12)
    assert json.loads(json.dumps(asdict(measured)))["stages"][0]["kind"] == measured.stages[0].kind


@pytest.mark.slow
@pytest.mark.parametrize("blocks", BLOCKS)
def test_roughness_falls_like_one_over_n_for_a_curve_and_stays_for_independent(
    blocks: str,
) -> None:
    horizons = [8, 32, 128]
    for start, slope in ((LENGTH_SCALE, -1.0), ("independent", 0.0)):
        # Root mean square over seeds: of small blocks one draw's roughness varies by a tenth.
        seen = [
            math.sqrt(np.mean([roughness(chain(blocks, n, start, seed)) ** 2 for seed in range(3)]))
            for n in horizons
        ]
        assert np.polyfit(np.log(horizons), np.log(seen), 1)[0] == pytest.approx(slope, abs=0.1)


@pytest.mark.parametrize("length_scale", [0.02, 0.1, 0.5])
def test_roughness_of_a_gaussian_process_is_its_formula(length_scale: float) -> None:
    count = 40
    seen = [roughness(chain("linear", count, length_scale, seed)) ** 2 for seed in range(8)]
    expected = 1 - math.exp(-1 / (2 * (count * length_scale) ** 2))
    assert np.mean(seen) == pytest.approx(expected, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("horizon", [8, 64])
def test_networks_of_known_kind_are_told(blocks: str, horizon: int) -> None:
    known = {"independent": "rough", "identical": "smooth"}
    known |= {scale: "smooth" for scale in (0.4, 1.0) if horizon * scale >= 3}  # type: ignore[misc]
    for start, kind in known.items():
        found = smoothness(chain(blocks, horizon, start))
        assert found.kind == found.stages[0].kind == kind
        assert found.verdict.startswith("ODE-like" if kind == "smooth" else "Not ODE-like")
    assert smoothness(chain(blocks, horizon, 1.2 / horizon)).kind == "between"


def test_the_limits_are_those_of_the_calibration() -> None:
    """benchmarks/smoothness_calibration.py says why: what coarsening does to the output."""
    rows = json.loads((RESULTS / "smoothness_calibration.json").read_text())["by_roughness"]
    medians = [row["coarsened"]["median"] for row in rows]
    assert [row["up_to"] for row in rows[:-1]] == [row["above"] for row in rows[1:]]
    smooth = [row["up_to"] for row, m in zip(rows, medians, strict=True) if m < 1.25 * medians[0]]
    rough = [row["above"] for row, m in zip(rows, medians, strict=True) if m > 0.5]
    assert (max(smooth), min(rough)) == (SMOOTH, ROUGH)


@pytest.mark.parametrize(
    ("layers", "kind"),
    [(3.0, "smooth"), (2.6, "between"), (0.92, "between"), (0.8, "rough")],
)
def test_on_both_sides_of_each_limit(layers: float, kind: str) -> None:
    """Gaussian processes with length scales of so many layers: roughness 0.23, 0.27, 0.67, 0.74."""
    found = smoothness(chain("linear", 64, layers / 64))
    assert found.kind == found.stages[0].kind == kind
    words = {"smooth": "ODE-like", "between": "Neither", "rough": "Not ODE-like"}
    assert found.verdict.startswith(words[kind])
    assert str(found).splitlines()[-1].split()[-1] == kind


def test_the_verdict_tells_what_becomes_of_the_output() -> None:
    """Every second control with twice the step: little of a smooth chain's output, all of another's
    (the figures of benchmarks/smoothness_calibration.py, bounded)."""
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(1)).double()
    for start, least, most in ((LENGTH_SCALE, 0.0, 0.15), ("independent", 0.5, 2.0)):
        whole = chain("two-layer", 32, start)
        half = ResidualChain([whole[n] for n in range(0, 32, 2)], step=2 / 32)
        y = whole(x).detach()
        assert least <= float((half(x).detach() - y).norm() / (y - x).norm()) <= most


def test_published_networks_are_rough(data_dir: Path) -> None:
    model = CifarResNet.from_weights(data_dir / "weights" / "cifar10-resnet20.safetensors")
    found = smoothness(model)
    assert found.kind == "rough"
    assert [stage.horizon for stage in found.stages] == [3, 2, 2]
    assert "in stage" in found.verdict
    # The norms' scales, which training left near each other, do not hide the convolutions.
    first = found.stages[0]
    groups = {g: np.sqrt(np.mean(np.square(v)) / 2) / 3 for g, v in first.groups.items()}
    assert groups["bn1.weight"] < 0.5
    assert first.roughness == pytest.approx(groups["conv1.weight"], abs=0.02)


def test_norms_of_one_hide_nothing() -> None:
    blocks = [ConvolutionalResidual(4, 4, "batch").double() for _ in range(20)]
    before = roughness(ResidualChain(blocks))
    with torch.no_grad():
        for block in blocks:
            block.norm1.weight.fill_(1e6)
    assert roughness(ResidualChain(blocks)) == before
    assert before == pytest.approx(1, abs=0.05)


def test_groups_that_are_zero_say_nothing() -> None:
    rough = chain("two-layer", 10)
    with torch.no_grad():
        for block in rough:
            block.outer.weight.zero_()
    (stage,) = smoothness(rough).stages
    assert stage.groups["outer.weight"] == (0.0,) * 9
    assert stage.roughness == pytest.approx(1, abs=0.1)
    with torch.no_grad():
        for p in rough.parameters():
            p.zero_()
    (stage,) = smoothness(rough).stages
    assert stage.roughness == 0
    assert stage.kind == "smooth"


def test_one_layer_of_zeros_is_no_division_by_zero() -> None:
    model = chain("linear", 3, "identical")
    with torch.no_grad():
        model[1].weight.zero_()
    # size² = 2/3 ‖θ‖², both changes ‖θ‖: 3 / √(2/3)
    assert smoothness(model).stages[0].overall == pytest.approx([3 / math.sqrt(2 / 3)] * 2)


def test_alternating_signs_are_rougher_than_independent() -> None:
    model = chain("linear", 50, "identical")
    with torch.no_grad():
        for block in list(model)[::2]:
            block.weight.neg_()
    assert roughness(model) == pytest.approx(math.sqrt(2), rel=1e-12)


def test_permuted_neurons_are_rough_though_the_functions_are_the_same() -> None:
    smooth = chain("two-layer", 32, LENGTH_SCALE)
    permuted = copy.deepcopy(smooth)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for block in permuted:
            order = torch.randperm(16, generator=generator)
            for p in (block.inner.weight, block.inner.bias):
                p.copy_(p[order].clone())
            block.outer.weight.copy_(block.outer.weight[:, order].clone())
    x = torch.randn(5, 8, dtype=torch.float64)
    assert torch.allclose(smooth(x), permuted(x), rtol=1e-12, atol=1e-12)
    assert smoothness(smooth).kind == "smooth"
    assert smoothness(permuted).kind == "rough"


def test_heun_has_one_control_more() -> None:
    blocks = [LinearResidual(3).double() for _ in range(5)]
    (stage,) = smoothness(ResidualChain(blocks, scheme=Heun())).stages
    assert (stage.horizon, len(stage.overall)) == (4, 4)
    assert stage.overall == pytest.approx(naive(blocks, 4)[1], rel=1e-12)


values = st.lists(
    st.lists(st.floats(-10, 10).map(lambda v: round(v, 6)), min_size=4, max_size=4),
    min_size=2,
    max_size=6,
)


def linear(theta: list[list[float]], factor: float = 1.0) -> nn.Module:
    model = ResidualChain([LinearResidual(2).double() for _ in theta])
    with torch.no_grad():
        for block, own in zip(model, theta, strict=True):
            block.weight.copy_(factor * torch.tensor(own, dtype=torch.float64).reshape(2, 2))
    return model


@pytest.mark.slow
@settings(max_examples=50)
@given(theta=values, factor=st.floats(1e-6, 1e6), sign=st.sampled_from([-1, 1]))
def test_neither_scale_nor_direction_matters(
    theta: list[list[float]], factor: float, sign: int
) -> None:
    (own,) = smoothness(linear(theta)).stages
    (scaled,) = smoothness(linear(theta, sign * factor)).stages
    (reverse,) = smoothness(linear(theta[::-1])).stages
    assert scaled.overall == pytest.approx(own.overall, rel=1e-9, abs=1e-9)
    assert scaled.roughness == pytest.approx(own.roughness, rel=1e-9, abs=1e-9)
    assert reverse.overall == pytest.approx(own.overall[::-1], rel=1e-9, abs=1e-9)
    assert reverse.roughness == pytest.approx(own.roughness, rel=1e-9, abs=1e-9)
    assert own.roughness <= math.sqrt(2 * len(theta) / (len(theta) - 1)) + 1e-9


def test_low_precision_is_measured_in_double() -> None:
    model = chain("linear", 20, LENGTH_SCALE)
    assert roughness(copy.deepcopy(model).float()) == pytest.approx(roughness(model), rel=1e-5)
    half = copy.deepcopy(model).bfloat16()
    widened = copy.deepcopy(half).double()
    assert roughness(half) == roughness(widened)


def unusable(what: str) -> nn.Module:
    model: nn.Module = chain("two-layer", 3)
    if what == "meta":
        return model.to("meta")
    if what == "one layer":
        return ResidualChain([LinearResidual(3)])
    if what == "unlike":
        return ResidualChain([LinearResidual(3), TwoLayerResidual(3, 4)])
    if what == "no parameters":
        return ResidualChain([nn.Tanh(), nn.Tanh()])
    if what == "unknown":
        return nn.Linear(3, 3)
    with torch.no_grad():
        model[1].inner.bias[2] = float(what)  # type: ignore[index]
    return model


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("meta", r"0\.inner\.weight is on the meta device.*load the model's weights"),
        ("nan", r"1\.inner\.bias has numbers that are not finite"),
        ("inf", r"1\.inner\.bias has numbers that are not finite"),
        ("one layer", "no stage of two layers or more"),
        ("unlike", "no stage of two layers or more"),
        ("no parameters", "the layers of this ResidualChain have no parameters"),
        ("unknown", "no stack of blocks in Linear"),
    ],
)
def test_what_has_no_smoothness_is_refused(what: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        smoothness(unusable(what))


def test_a_transformer_without_weights_is_refused() -> None:
    import transformers as hf

    config = hf.ViTConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
        image_size=16, patch_size=8, num_labels=4,
    )  # fmt: skip
    model = hf.ViTForImageClassification(config)
    assert smoothness(model).kind == "rough"
    with pytest.raises(InputError, match="on the meta device"):
        smoothness(model.to("meta"))
